"""Division of a model into the client's layers and the trunk's, by transformers and PEFT."""
