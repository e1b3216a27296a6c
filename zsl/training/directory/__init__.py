"""The run directory: record, checkpoints, resume."""
