"""Requests: decode, validate, queue, run and answer them, on the asyncio loop. Imports no torch."""
