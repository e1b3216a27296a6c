"""The daemon's ROUTER socket on an asyncio loop.

The socket is a plain one, read by a callback when its file descriptor says so. There is no future that could be
cancelled with a message in it (a cancelled `recv` of zmq.asyncio loses messages). The descriptor is edge-triggered:
every receive and every send is followed by another look at the socket's own state, and a slow timer looks again
for an edge that was missed.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Sequence

import zmq

from zsl.errors import StartupError
from zsl.wire.frames import MAX_HEADER_BYTES, Frame

logger = logging.getLogger(__name__)

# A turn of the loop ends after this many messages, so that a burst does not starve what else the loop does.
MESSAGES_PER_TURN = 64
WATCHDOG_SECONDS = 1.0
LINGER_MS = 2_000
HANDSHAKE_MS = 5_000
HEARTBEAT_MS = 5_000
HEARTBEAT_TIMEOUT_MS = 120_000  # a heartbeat queues behind the large message that is being sent
RECEIVE_HWM_MESSAGES = 16

Receiver = Callable[[bytes, list[Frame]], None]


class Router:
    """A bound ROUTER. On the loop `receive(peer, frames)` is called for each message that comes in, and `received()`
    when those that had arrived together are through."""

    def __init__(self, *, max_message_bytes: int, send_hwm_messages: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, LINGER_MS),
            (zmq.MAXMSGSIZE, max(max_message_bytes, MAX_HEADER_BYTES + 1)),
            (zmq.RCVHWM, RECEIVE_HWM_MESSAGES),
            (zmq.SNDHWM, send_hwm_messages),
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.HANDSHAKE_IVL, HANDSHAKE_MS),
            (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
            (zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS),
            (zmq.TCP_KEEPALIVE, 1),
        ):
            self._socket.setsockopt(option, value)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._receive: Receiver | None = None
        self._received: Callable[[], None] | None = None
        self._turn: asyncio.Handle | None = None
        self._watchdog: asyncio.Handle | None = None

    def bind(self, host: str, port: int) -> str:
        """Bind, and return the real endpoint (`port` 0 picks one). Raises `StartupError`."""
        shown_host = f"[{host}]" if ":" in host else host
        self._socket.setsockopt(zmq.IPV6, int(":" in host))
        try:
            self._socket.bind(f"tcp://{shown_host}:{port or '*'}")
        except zmq.ZMQError as error:
            self.close()
            what = "the port is in use" if error.errno == errno.EADDRINUSE else error.strerror
            raise StartupError(
                f"cannot listen on {host}:{port}: {what}; choose another with --port (0 picks one)"
            ) from (error)
        real_port = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2]
        return f"tcp://{shown_host}:{real_port}"

    def start(self, receive: Receiver, received: Callable[[], None]) -> None:
        """Begin to receive, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._receive = receive
        self._received = received
        self._loop.add_reader(self._socket.fileno(), self.drain)
        self._watch()

    def drain(self) -> None:
        """Receive what has arrived, without waiting."""
        assert self._loop is not None and self._received is not None
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        if self._take_turn():
            self._look_again()
        self._received()

    def _take_turn(self) -> bool:
        """Hand on what has arrived; whether there may be more."""
        assert self._receive is not None
        for _ in range(MESSAGES_PER_TURN):
            # Asked first: to be told by an exception that nothing is there costs more.
            if not int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return False
            peer, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            try:
                self._receive(peer.bytes, [frame.buffer for frame in frames])
            except Exception:
                # Nothing that a peer sends may stop the reader; the receiver answers errors that it expects.
                logger.exception("a message could not be handled")
        return True

    def send(self, peer: bytes, frames: Sequence[Frame]) -> bool:
        """Send without waiting. False if the peer is gone or does not read: nothing was sent then.

        The memory of the frames must not be written any more: large ones are not copied.
        """
        try:
            self._socket.send_multipart([peer, *frames], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            if error.errno not in (errno.EHOSTUNREACH, errno.EAGAIN):
                raise
            return False
        finally:
            self._look_again()  # a send may consume the edge that announced a message
        return True

    def close(self) -> None:
        """Stop receiving, give what was sent up to `LINGER_MS` to leave, and free the socket."""
        if self._socket.closed:
            return
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._socket.fileno())
        for handle in (self._turn, self._watchdog):
            if handle is not None:
                handle.cancel()
        self._socket.close()
        self._context.term()

    def _look_again(self) -> None:
        if self._turn is None and self._loop is not None:
            self._turn = self._loop.call_soon(self.drain)

    def _watch(self) -> None:
        assert self._loop is not None
        self._look_again()
        self._watchdog = self._loop.call_later(WATCHDOG_SECONDS, self._watch)
