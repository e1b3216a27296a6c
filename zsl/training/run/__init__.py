"""A whole run of `zsl-train`."""
