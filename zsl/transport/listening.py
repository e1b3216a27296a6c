"""Listening sockets: their addresses, and the open files that their connections take."""

from __future__ import annotations

import errno
import resource
import socket
from ipaddress import ip_address

from zsl.errors import StartupError

BACKLOG = 1024  # after a restart, all clients connect at once
MAX_OPEN_FILES = 65_536
OTHER_FILES = 128  # of the process: model, log, event loop


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """Listen on an address, without blocking; return the socket and the real endpoint. `port` 0 picks one.

    Raises `StartupError`.
    """
    shown_host = f"[{host}]" if ":" in host else host
    try:
        listening = _listening_socket(host, port)
    except OSError as error:
        what, to_do = error.strerror, "choose another with --port (0 picks one)"
        if error.errno == errno.EADDRINUSE:
            what = "the port is in use"
        elif isinstance(error, socket.gaierror) or error.errno in (errno.EADDRNOTAVAIL, errno.EINVAL):
            what = "this machine has no such address"
            to_do = "name one of its own with --host, or 0.0.0.0 for all that it has"
        raise StartupError(f"cannot listen on {shown_host}:{port}: {what}; {to_do}") from error
    return listening, f"tcp://{shown_host}:{listening.getsockname()[1]}"


def _listening_socket(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind(address)
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches the address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def raise_file_limit() -> None:
    """Raise the limit of open files: every connection needs one. Call before making a `Router`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def most_connections() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else max(soft - OTHER_FILES, 1)
