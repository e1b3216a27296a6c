"""Adapters of a split model: attach, save, load, join, export, merge."""
