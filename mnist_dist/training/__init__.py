"""Training of one classifier: the loop and its parts. Knows nothing of Ray; `on_ray/train.py` runs it on workers."""
