"""Model references, checkpoints and their identity: resolve, load, quantize, divide."""
