"""The client's DEALER socket, with eyes on its connection.

ZeroMQ reconnects silently and forgets what was outstanding. The monitor tells when a connection was lost, so that
the owner can take a fresh socket and say again what needs saying. One thread owns a `Dealer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from itertools import count

import zmq
from zmq.utils.monitor import recv_monitor_message

from zsl.errors import ConfigError
from zsl.wire.frames import Frame

LINGER_MS = 1_000
RECONNECT_MS = 100
RECONNECT_MAX_MS = 2_000
HEARTBEAT_MS = 5_000
# A heartbeat queues behind the message that is being sent: on a slow line that can be minutes of one large tensor.
HEARTBEAT_TIMEOUT_MS = 120_000
HANDSHAKE_MS = 5_000

_monitor_numbers = count()


class LinkEvent(Enum):
    """What the monitor saw."""

    UP = "up"
    LOST = "lost"
    REFUSED = "refused"  # nothing listens there
    MUTE = "mute"  # something listens, but it does not speak ZeroMQ


_LINK_EVENTS: dict[int, LinkEvent] = {
    zmq.EVENT_HANDSHAKE_SUCCEEDED: LinkEvent.UP,
    zmq.EVENT_DISCONNECTED: LinkEvent.LOST,
    zmq.EVENT_CONNECTED: LinkEvent.MUTE,  # until its handshake has succeeded
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: LinkEvent.MUTE,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: LinkEvent.MUTE,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: LinkEvent.MUTE,
    zmq.EVENT_CLOSED: LinkEvent.REFUSED,  # a connection attempt that failed
}


class Dealer:
    """A connected DEALER and its monitor. `socket` and `monitor` are there to be polled."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, LINGER_MS),
            (zmq.RCVHWM, 0),
            (zmq.SNDHWM, 0),  # what is in flight is bounded by the daemon's limits, not here
            (zmq.IMMEDIATE, 1),
            (zmq.RECONNECT_IVL, RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS),
            (zmq.HANDSHAKE_IVL, HANDSHAKE_MS),
            (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
            (zmq.TCP_KEEPALIVE, 1),
            # A name is resolved to one address, and with IPV6 to that of IPv6, where no daemon may listen.
            (zmq.IPV6, int("[" in endpoint)),
        ):
            self.socket.setsockopt(option, value)
        address = f"inproc://zsl-dealer-{next(_monitor_numbers)}"
        self.socket.monitor(address, sum(_LINK_EVENTS))
        self.monitor = context.socket(zmq.PAIR)
        self.monitor.linger = 0
        self.monitor.connect(address)
        try:
            self.socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close(linger_ms=0)
            raise ConfigError(f"endpoint {endpoint!r}: {error.strerror}; write HOST:PORT or tcp://HOST:PORT") from error

    def send(self, frames: Sequence[Frame]) -> bool:
        """Send without waiting; False while there is no connection. Large frames are not copied."""
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True

    def receive(self) -> list[Frame] | None:
        """The next message, or None if none is here."""
        if not int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            return None
        return [frame.buffer for frame in self.socket.recv_multipart(zmq.NOBLOCK, copy=False)]

    def link_event(self) -> LinkEvent | None:
        """The next event of the connection, or None if nothing happened."""
        if not int(self.monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            return None
        return _LINK_EVENTS.get(recv_monitor_message(self.monitor, zmq.NOBLOCK)["event"])

    def close(self, *, linger_ms: int = LINGER_MS) -> None:
        """Close the socket, and the monitor before it: an open one would keep the context from ending."""
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(linger_ms)


def normalized_endpoint(text: str) -> str:
    """`HOST:PORT` or `tcp://HOST:PORT` as a ZeroMQ endpoint. Raises `ConfigError`."""
    address = text.removeprefix("tcp://")
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(f"endpoint {text!r}: write HOST:PORT or tcp://HOST:PORT, for example 127.0.0.1:5555")
    return f"tcp://{address}"
