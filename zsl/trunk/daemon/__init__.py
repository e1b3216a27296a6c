"""The daemon's process: start-up, loading, the served port, logs and signals."""
