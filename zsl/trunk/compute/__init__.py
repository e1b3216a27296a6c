"""Computation of passes on the compute thread. Imports no sockets and no asyncio (except `worker`)."""
