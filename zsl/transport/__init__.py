"""Sockets: the daemon's ROUTER, the client's DEALER, CURVE and ZMTP. Imports no torch."""
