"""What stands at an endpoint: the first bytes of ZMTP, in which each end says how it secures the connection.

libzmq tells a client no more than that a handshake failed, when a server closed the connection before the client had
read all of its greeting. So the question is asked once more, by hand. Knows no keys.
"""

from __future__ import annotations

import socket
import time

from zsl.transport.zmtp import MECHANISM, MIN_MAJOR, SIGNATURE


def offered_mechanism(endpoint: str, *, timeout_seconds: float) -> str | None:
    """`NULL`, `PLAIN` or `CURVE`, as a ZeroMQ socket at `tcp://HOST:PORT` greets; None if there is none in time."""
    deadline = time.monotonic() + timeout_seconds
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    greeting = b""
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout_seconds) as connection:
            # No more than this: to a mechanism it does not take, the other end would close before it has said its own.
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
