"""Connection to a daemon: socket, session, requests, heartbeat. Imports no torch."""
