"""Checks every node before an expensive job is started."""
