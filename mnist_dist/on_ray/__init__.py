"""The jobs on a Ray cluster. The only place that imports Ray; the work itself is in the other packages."""
