"""Sessions: leases, held steps and their memory. Pure."""
