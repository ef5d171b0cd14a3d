"""Measures the figures in the README and in docs/performance.md.

Everything that is compared is measured in one run on one machine.
"""
