"""Load, tokenize, pack and pad training data, which stays at the client."""
