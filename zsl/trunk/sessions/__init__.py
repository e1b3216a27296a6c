"""Sessions: leases, credit, and the memory held for them. Pure."""
