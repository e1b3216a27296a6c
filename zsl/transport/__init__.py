"""Sockets: the daemon's ROUTER and the client's DEALER. Knows the wire's frames, knows no model."""
