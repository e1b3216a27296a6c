"""Read a server's ZMTP greeting to find its security mechanism.

libzmq reports only a failed handshake if a server closed the connection before the client had read all of its greeting.
So the greeting is read once more, on a plain TCP connection. Needs no keys.
"""

from __future__ import annotations

import socket
import time

from zsl.transport.zmtp import MECHANISM, MIN_MAJOR, SIGNATURE


def offered_mechanism(endpoint: str, *, timeout_seconds: float) -> str | None:
    """Return `NULL`, `PLAIN` or `CURVE` from the greeting at `tcp://HOST:PORT`; None without a valid one in time."""
    deadline = time.monotonic() + timeout_seconds
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    greeting = b""
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout_seconds) as connection:
            # No mechanism is sent: the other end would close at one it does not accept, before it has sent its own.
            connection.sendall(SIGNATURE + bytes([MIN_MAJOR]))
            while len(greeting) < MECHANISM.stop:
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
                received = connection.recv(MECHANISM.stop - len(greeting))
                if not received:
                    return None
                greeting += received
    except OSError:
        return None
    name = greeting[MECHANISM].rstrip(b"\0")
    if greeting[0] != SIGNATURE[0] or greeting[9] != SIGNATURE[9] or not (name.isalnum() and name.isascii()):
        return None
    return name.decode()
