"""The directory of a run: record, checkpoints, resuming."""
