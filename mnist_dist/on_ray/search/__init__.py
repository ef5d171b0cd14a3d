"""The search on Ray Tune: the driver's and the trials' side."""
