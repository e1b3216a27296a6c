"""Training of an adapter from a configuration file (`zsl-train`), on Hugging Face `Trainer`."""
