"""Passes of the trunk on the compute thread. Knows no socket and no asyncio."""
