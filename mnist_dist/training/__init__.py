"""Training of one classifier: the loop and its parts. Knows nothing of Ray, on which `on_ray/training` runs it."""
