"""From the images that a job names to what is trained on: decoded once, features computed once."""
