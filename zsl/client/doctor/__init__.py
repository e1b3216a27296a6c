"""The checks of `zsl doctor`: of this installation, of a model, and of a daemon as this machine sees it."""
