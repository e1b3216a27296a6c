"""A connection to a daemon: socket, session, requests, heartbeat. Knows no torch."""
