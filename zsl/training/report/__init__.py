"""Metrics of a run, and their output to file, screen and plot."""
