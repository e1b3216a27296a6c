"""Numbers of a run and their presentation: metrics, screen, plot."""
