"""`zsl-train`: a configuration file to a trained adapter, on Hugging Face `Trainer`."""
