"""Division of a model into the client's layers and the trunk's. Uses transformers and PEFT, no sockets."""
