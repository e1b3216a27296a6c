"""Checks of `zsl doctor`: installation, model, and a daemon as this machine sees it."""
