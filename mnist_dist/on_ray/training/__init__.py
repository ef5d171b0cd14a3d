"""The training job on Ray Train: the driver's and the workers' side."""
