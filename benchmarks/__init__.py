"""Measurements behind the figures in the README: everything that is compared runs in one run, on one machine."""
