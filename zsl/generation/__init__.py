"""Generate text with transformers' `generate`, on local and split models: prompts, sampling, text of tokens."""
