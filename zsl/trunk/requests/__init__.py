"""Requests from the wire to their answers, on the asyncio loop. Knows no torch."""
