"""Hugging Face `Trainer` on a split model."""
