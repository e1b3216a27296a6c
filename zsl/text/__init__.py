"""Text for people: escapes, plurals, sizes. Independent of models and sockets."""
