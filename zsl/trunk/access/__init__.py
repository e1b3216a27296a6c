"""Access control of the daemon: listening address, keys and tenants. Imports no torch."""
