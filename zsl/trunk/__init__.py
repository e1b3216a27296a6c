"""The daemon: sessions, requests, scheduling and computation of a trunk. Never imports the client."""
