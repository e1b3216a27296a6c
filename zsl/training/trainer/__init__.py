"""Hugging Face `Trainer` for a split model: overlap, validation loss, timing, checkpoints."""
