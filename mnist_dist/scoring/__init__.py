"""From a list of images to a committed prediction table; knows nothing of Ray."""
