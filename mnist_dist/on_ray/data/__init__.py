"""Prepares the images of a job for training: decodes them once, and computes features once."""
