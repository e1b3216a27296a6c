"""Attach, save, load, join, export and merge PEFT adapters of a split model."""
