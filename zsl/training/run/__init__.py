"""Run a training from a configuration: the main function of `zsl-train` and its checks."""
