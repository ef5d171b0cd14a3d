"""The scoring job on Ray Data: the driver's and the workers' side."""
