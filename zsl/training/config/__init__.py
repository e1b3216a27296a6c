"""The configuration file: schema, defaults, checks. Knows no torch."""
