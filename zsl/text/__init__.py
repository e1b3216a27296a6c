"""Text for people: escaped, counted, with units. Knows nothing of models and sockets."""
