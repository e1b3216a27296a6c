"""Access to the daemon: hosts, keys and tenants. Knows no torch."""
