"""Inference engines: a bundle's model loaded for prediction, converted to other runtimes, checked and exported."""
