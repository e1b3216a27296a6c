"""Digest of a TCP connection, equal at both ends only if it stays within the machine and nothing relays it.

A loopback address alone proves neither: a tunnel or a balancer may listen there. The digest has the address and port of
the client's end as each end sees them, which differ if something between passes the bytes on, and an id of the running
kernel, which differs between machines.
"""

from __future__ import annotations

import hashlib
import os
import socket
from functools import cache
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
DIGEST_BYTES = 16


def digest_at_client(descriptor: int) -> bytes | None:
    """Return the digest of a connection by its file descriptor; None if it leaves the machine, or has been closed."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as duplicate:
            return _digest(duplicate.getsockname(), duplicate.getpeername())
    except OSError:
        return None


def digest_at_server(accepted: socket.socket) -> bytes | None:
    """Return the digest of an accepted connection; None if it leaves the machine, or has been closed."""
    try:
        return _digest(accepted.getpeername(), accepted.getsockname())
    except OSError:
        return None


def _digest(client: tuple[object, ...], server: tuple[object, ...]) -> bytes | None:
    # Within a machine both ends have the same address: the kernel sends from the one that it sends to.
    boot_id, host = _boot_id(), _plain(client[0])
    if not boot_id or host != _plain(server[0]):
        return None
    return hashlib.blake2b(f"{boot_id} {host} {client[1]}".encode(), digest_size=DIGEST_BYTES).digest()


def _plain(host: object) -> str:
    """Return an address without the prefix of IPv4 on an IPv6 socket."""
    return str(host).removeprefix("::ffff:")


@cache
def _boot_id() -> str:
    try:
        return BOOT_ID.read_text()
    except OSError:
        return ""  # not Linux
