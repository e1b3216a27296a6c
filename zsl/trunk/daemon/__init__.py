"""The daemon's process: settings to a served port, logs, signals."""
