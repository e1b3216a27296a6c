"""DEALER socket of a client, with a monitor that reports lost connections and failed handshakes.

ZeroMQ reconnects silently and loses outstanding messages. The monitor tells when a connection was lost, so that the
owner can open a fresh socket and send again, and why no connection is made. One thread owns a `Dealer`.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from enum import Enum

import zmq

from zsl.errors import ConfigError
from zsl.transport.connection_digest import digest_at_client
from zsl.transport.curve_keys import ClientKeys, encrypt_client
from zsl.transport.greeting import offered_mechanism
from zsl.transport.monitor import Monitor, is_readable
from zsl.wire.frames import HEAD_FRAMES, MAX_HEADER_BYTES, Frame
from zsl.wire.messages import MAX_TENSORS

LINGER_MS = 1_000
RECONNECT_MS = 100
RECONNECT_MAX_MS = 2_000
HANDSHAKE_MS = 5_000
GREETING_SECONDS = 1.0
MOST_FRAMES = HEAD_FRAMES + MAX_TENSORS
CURVE_OVERHEAD_BYTES = 33  # of a CURVE frame over its content
# TCP keepalive keeps an idle connection open in firewalls, and ends it 70 s after its peer is lost. libzmq's heartbeats
# stay off: their timer aborts the process if a connection that a high-water mark has stopped loses its peer. Pings are
# ordinary messages.
KEEPALIVE = (
    (zmq.TCP_KEEPALIVE, 1),
    (zmq.TCP_KEEPALIVE_IDLE, 10),
    (zmq.TCP_KEEPALIVE_INTVL, 10),
    (zmq.TCP_KEEPALIVE_CNT, 6),
)


class LinkEvent(Enum):
    """Event of a connection."""

    UP = "up"
    LOST = "lost"  # it has ended, after a handshake or before
    REFUSED = "refused"  # nothing listens at the endpoint
    MUTE = "mute"  # something listens, but it does not speak ZeroMQ
    CUT = "cut"  # something listens, and closes the connection before its greeting, as a full daemon does
    UNKNOWN_KEY = "unknown key"  # the server does not know this client's key
    WRONG_SERVER_KEY = "wrong server key"  # the server has another key than expected
    OTHER_MECHANISM = "other mechanism"  # one end encrypts, the other does not


_LINK_EVENTS: dict[int, LinkEvent] = {
    zmq.EVENT_HANDSHAKE_SUCCEEDED: LinkEvent.UP,
    zmq.EVENT_DISCONNECTED: LinkEvent.LOST,
    zmq.EVENT_CONNECTED: LinkEvent.MUTE,  # until its handshake has succeeded
    zmq.EVENT_CLOSED: LinkEvent.REFUSED,  # a connection attempt that failed
}
# The value of each is the reason: an errno, one of libzmq's PROTOCOL_ERROR, or the server's status code.
_FAILED_HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
)
# Status codes of the server's ERROR: see `zsl.transport.mechanisms`.
_REFUSALS = {400: LinkEvent.UNKNOWN_KEY, 500: LinkEvent.WRONG_SERVER_KEY}


class Dealer:
    """Connected DEALER and its monitor, encrypted with `keys`. Poll `socket` and `monitor`.

    `digest`: of the connection, once `link_event` has returned that it is made; None if it leaves the machine.
    A frame over `max_frame_bytes` ends the connection before memory is allocated for it.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        keys: ClientKeys | None = None,
        *,
        max_frame_bytes: int = MAX_HEADER_BYTES,
    ) -> None:
        self.digest: bytes | None = None
        self._endpoint = endpoint
        self._mechanism = "NULL" if keys is None else "CURVE"
        self.socket = context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, LINGER_MS),
            (zmq.RCVHWM, 0),
            (zmq.SNDHWM, 0),  # the daemon's limits bound what is in flight
            (zmq.IMMEDIATE, 1),
            (zmq.RECONNECT_IVL, RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS),
            (zmq.HANDSHAKE_IVL, HANDSHAKE_MS),
            (zmq.MAXMSGSIZE, max_frame_bytes + CURVE_OVERHEAD_BYTES),
            *KEEPALIVE,
            # libzmq resolves a name to one address; with IPV6 set, to an IPv6 address, where no daemon may listen.
            (zmq.IPV6, int("[" in endpoint)),
        ):
            self.socket.setsockopt(option, value)
        if keys is not None:
            encrypt_client(self.socket, keys)
        self._monitor = Monitor(context, self.socket, sum(_LINK_EVENTS) + sum(_FAILED_HANDSHAKES))
        self.monitor = self._monitor.socket
        try:
            self.socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close(linger_ms=0)
            raise ConfigError(f"endpoint {endpoint!r}: {error.strerror}; write HOST:PORT or tcp://HOST:PORT") from error

    def send(self, frames: Sequence[Frame]) -> bool:
        """Send without waiting. Return False if not connected. Large frames are not copied."""
        try:
            self.socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True

    def receive(self) -> list[Frame] | None:
        """Return the next message, or None. Frames beyond `MOST_FRAMES` + 1 are dropped."""
        if not is_readable(self.socket):
            return None
        frames: list[Frame] = []
        more = True
        while more:
            frame = self.socket.recv(zmq.NOBLOCK, copy=False)
            more = frame.more
            if len(frames) <= MOST_FRAMES:  # one too many, so that `decode` refuses it
                frames.append(frame.buffer)
        return frames

    def link_event(self) -> LinkEvent | None:
        """Return the next event of the connection, or None.

        After a handshake that failed, this may ask the server for its reason, for up to `GREETING_SECONDS`.
        """
        happened = self._monitor.next_event()
        if happened is None:
            return None
        event, value = happened
        if event == zmq.EVENT_CONNECTED:
            self.digest = digest_at_client(value)
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return _REFUSALS.get(value, LinkEvent.MUTE)
        return self._why_no_handshake(value) if event in _FAILED_HANDSHAKES else _LINK_EVENTS.get(event)

    def skip_events(self) -> None:
        """Drop all events of the connection."""
        while self._monitor.next_event() is not None:
            pass

    def _why_no_handshake(self, reason: int) -> LinkEvent:
        """Return why a handshake failed. An end that rejects the other's greeting closes the connection; it is chance
        whether this end has read the greeting by then, and so knows the reason:

            this end        the server      the event, and its value
            with keys       without         PROTOCOL, MECHANISM_MISMATCH; NO_DETAIL, EPIPE
            without         with keys       PROTOCOL, MECHANISM_MISMATCH; NO_DETAIL, EPIPE
            any             not ZeroMQ      NO_DETAIL, with EPIPE, ECONNRESET or after HANDSHAKE_IVL EAGAIN; or nothing
            any             full            NO_DETAIL, EPIPE or ECONNRESET; the question is cut off too, or it is not
        """
        if reason == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            return LinkEvent.OTHER_MECHANISM
        if reason not in (errno.EPIPE, errno.ECONNRESET):
            return LinkEvent.MUTE
        offered = offered_mechanism(self._endpoint, timeout_seconds=GREETING_SECONDS)
        if offered not in (None, self._mechanism):
            return LinkEvent.OTHER_MECHANISM
        return LinkEvent.CUT

    def close(self, *, linger_ms: int = LINGER_MS) -> None:
        """Close the monitor, then the socket."""
        self._monitor.close()
        self.socket.close(linger_ms)


def normalized_endpoint(text: str) -> str:
    """Return `HOST:PORT` or `tcp://HOST:PORT` as a ZeroMQ endpoint. Raises `ConfigError`."""
    address = text.removeprefix("tcp://")
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(f"endpoint {text!r}: write HOST:PORT or tcp://HOST:PORT, for example 127.0.0.1:5555")
    return f"tcp://{address}"


def resolves(endpoint: str) -> bool:
    """Return whether the host of an endpoint is an address, or a name that resolves to one."""
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return False
    return True
