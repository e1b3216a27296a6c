"""The daemon's ROUTER socket on an asyncio loop: receives, sends, and knows who is too slow to be sent to.

With keys it is encrypted, and who gets in is asked of `allowed`. What its connections do is followed in
`zsl.transport.connections`, what they have not read in `zsl.transport.unsent`.
"""

from __future__ import annotations

import errno
import resource
import time
from collections.abc import Callable, Sequence

import zmq

from zsl.errors import StartupError
from zsl.transport.connections import Connections
from zsl.transport.curve import KeyPair, encrypt_server
from zsl.transport.reading import Reader
from zsl.transport.unsent import TRACKED_BYTES, Unsent
from zsl.transport.zap import Authenticator
from zsl.wire.frames import MAX_HEADER_BYTES, Frame

LINGER_MS = 2_000
HANDSHAKE_MS = 5_000
HEARTBEAT_MS = 5_000
HEARTBEAT_TIMEOUT_MS = 120_000  # a heartbeat queues behind the large message that is being sent
RECEIVE_HWM_MESSAGES = 16
CURVE_BYTES = 64  # that encryption adds to a frame: its command's name, nonce, flags and tag
BACKLOG = 1024  # when a daemon comes back, all its clients connect at once
MAX_OPEN_FILES = 65_536
OTHER_FILES = 128  # of the process: the model's, the log's, ZeroMQ's own

# The peer, the tenant's public key ("" without keys), the frames.
Receiver = Callable[[bytes, str, list[Frame]], None]


class Router:
    """A bound ROUTER. On the loop `receive(peer, tenant, frames)` is called for each message that comes in, and
    `received()` when those that had arrived together are through.

    `keys`, and `allowed(public key)` for each client that connects, come together; then `bind` belongs on the loop.
    `clock` gives seconds.
    """

    def __init__(
        self,
        *,
        max_message_bytes: int,
        send_hwm_messages: int,
        max_connections: int,
        keys: KeyPair | None = None,
        allowed: Callable[[str], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._context = zmq.Context(io_threads=1)  # `Connections` relies on it
        self._socket = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, LINGER_MS),
            (zmq.MAXMSGSIZE, max(max_message_bytes, MAX_HEADER_BYTES + 1) + (0 if keys is None else CURVE_BYTES)),
            (zmq.RCVHWM, RECEIVE_HWM_MESSAGES),
            (zmq.SNDHWM, send_hwm_messages),
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.BACKLOG, BACKLOG),
            (zmq.HANDSHAKE_IVL, HANDSHAKE_MS),
            (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
            (zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS),
            (zmq.TCP_KEEPALIVE, 1),
        ):
            self._socket.setsockopt(option, value)
        assert (keys is None) == (allowed is None), "keys and who is allowed come together"
        self._encrypted = keys is not None
        self._authenticator: Authenticator | None = None
        if keys is not None and allowed is not None:
            encrypt_server(self._socket, keys)
            self._authenticator = Authenticator(self._context, allowed)
        self._unsent = Unsent(clock)
        self._connections = Connections(
            self._context,
            self._socket,
            max_connections=min(max_connections, _connections_that_can_be()),
            gone=self._unsent.forget,
            clock=clock,
        )
        self._reader = Reader(self._socket, self._take, self._taken)
        self._receive: Receiver
        self._received: Callable[[], None]

    @property
    def connections(self) -> int:
        """How many TCP connections are open, those that have said nothing yet too."""
        return len(self._connections)

    def bind(self, host: str, port: int) -> str:
        """Bind, and return the real endpoint (`port` 0 picks one). Raises `StartupError`."""
        shown_host = f"[{host}]" if ":" in host else host
        self._socket.setsockopt(zmq.IPV6, int(":" in host))
        if self._authenticator is not None:
            self._authenticator.start()  # before anyone can connect
        try:
            self._socket.bind(f"tcp://{shown_host}:{port or '*'}")
        except zmq.ZMQError as error:
            self.close()
            what, to_do = error.strerror, "choose another with --port (0 picks one)"
            if error.errno == errno.EADDRINUSE:
                what = "the port is in use"
            elif error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV, errno.EINVAL):
                what = "this machine has no such address"
                to_do = "name one of its own with --host, or 0.0.0.0 for all that it has"
            raise StartupError(f"cannot listen on {shown_host}:{port}: {what}; {to_do}") from error
        if self._authenticator is not None:
            self._connections.start()
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def start(self, receive: Receiver, received: Callable[[], None]) -> None:
        """Begin to receive, on the running loop."""
        self._receive = receive
        self._received = received
        self._connections.start()
        self._reader.start()

    def drain(self) -> None:
        """Receive what has arrived, without waiting."""
        self._reader.drain()

    def _take(self) -> None:
        first, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        peer = first.bytes
        if not self._connections.knows(peer):
            self._connections.heard(peer, _descriptor(frames[-1]))
        tenant = str(frames[-1].get("User-Id")) if self._encrypted else ""
        self._receive(peer, tenant, [frame.buffer for frame in frames])

    def _taken(self, empty: bool) -> None:
        if empty:
            self._connections.heard_all()
        self._received()

    def send(self, peer: bytes, frames: Sequence[Frame]) -> bool:
        """Send without waiting. False if the peer is gone or does not read: nothing was sent then.

        The memory of the frames must not be written any more: large ones are not copied.
        """
        # Each frame has its own tracker: that of a whole message follows its last frame only.
        parts: list[Frame | zmq.Frame] = [
            zmq.Frame(frame, track=True, copy=False) if len(frame) >= TRACKED_BYTES else frame for frame in frames
        ]
        try:
            self._socket.send_multipart([peer, *parts], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            if error.errno not in (errno.EHOSTUNREACH, errno.EAGAIN):
                raise
            return False
        finally:
            self._reader.look_again()  # a send may consume the edge that announced a message
        tracked = [part for part in parts if isinstance(part, zmq.Frame)]
        if tracked:
            self._unsent.add(peer, tracked)
        return True

    def unsent_bytes(self, peer: bytes) -> int:
        """The bytes of large frames that wait in memory for a peer to read them."""
        return self._unsent.nbytes(peer)

    @property
    def all_unsent_bytes(self) -> int:
        """What all peers together have not read."""
        return self._unsent.all_nbytes

    def is_connected(self, peer: bytes) -> bool:
        """Whether the connection of a peer that has sent something is still there."""
        return self._connections.knows(peer)

    def slow_peers(self, now: float) -> list[bytes]:
        """The peers that have not read for too long what was sent to them."""
        return self._unsent.slow(now)

    def cut(self, peer: bytes) -> None:
        """End the connection of a peer, and drop what waits for it. It may connect again."""
        self._connections.cut(peer)

    def close(self) -> None:
        """Stop receiving, give what was sent up to `LINGER_MS` to leave, and free the socket."""
        if self._socket.closed:
            return
        self._reader.stop()
        self._connections.close()
        self._socket.close()
        if self._authenticator is not None:
            self._authenticator.close()
        self._context.term()


def _descriptor(frame: zmq.Frame) -> int:
    """The file descriptor of the connection that a message came through; -1 if that is not told."""
    try:
        return int(frame.get(zmq.MessageOption.SRCFD))
    except zmq.ZMQError:
        return -1  # bytes that are no ZeroMQ


def raise_file_limit() -> None:
    """Let this process have as many open files as it may: every connection takes one. Before a `Router` is made."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _connections_that_can_be() -> int:
    """At the limit of open files, libzmq would do nothing but try to accept."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else max(soft - OTHER_FILES, 1)
