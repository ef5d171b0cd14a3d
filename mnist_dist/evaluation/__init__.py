"""Evaluates the predictions of a model: finds the labels, computes metrics, compares two tables, writes the report."""
