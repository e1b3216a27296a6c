"""From a table of the configuration to rows of tokens with labels, which stay at the client."""
