"""ROUTER of the daemon on an asyncio loop: accept DEALERs, receive, send, and find slow peers.

It implements ZMTP itself (`zmtp`, `mechanisms`, `peer_connection`) instead of using libzmq, whose ROUTER lets a peer
choose the address that answers are sent to, buffers a message without bound, and aborts the process on some input.

A connection with a session is a member, every other one a stranger. Strangers are limited to small messages, short
silence, the connections that members leave, and a share of the loop's time, so that members are always served.
"""

from __future__ import annotations

import asyncio
import logging
import selectors
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

from zsl.errors import StartupError
from zsl.transport.connection_digest import digest_at_server
from zsl.transport.connection_places import Places
from zsl.transport.curve_keys import KeyPair
from zsl.transport.listening import listen, most_connections
from zsl.transport.mechanisms import Curve, Mechanism, Null
from zsl.transport.peer_connection import Connection, MessageLimits, State
from zsl.transport.receiving_memory import ReceivingMemory
from zsl.transport.turns import Turns
from zsl.wire.frames import HEAD_FRAMES, MAX_HEADER_BYTES, Frame
from zsl.wire.messages import MAX_TENSORS

logger = logging.getLogger(__name__)

LINGER_SECONDS = 2.0
SCRATCH_BYTES = 64 * 1024
CRYPTO_THREADS = 2

# Activations, gradients, masks and positions of the largest request.
FRAMES_OF_THE_LARGEST = 4
STRANGER_MESSAGE_BYTES = 32 * 1024
STRANGER_SECONDS = 30.0  # of silence
ACCEPTED_PER_TURN = 16
HOUSEKEEPING_SECONDS = 1.0

# Arguments: peer, tenant's public key ("" without keys), frames.
Receiver = Callable[[bytes, str, list[Frame]], None]


class Router:
    """ROUTER socket. On the loop, `receive(peer, tenant, frames)` is called for each message, and `received()` after a
    batch of messages that arrived together.

    A peer is one connection; its name is never reused. `keys` and `allowed(public key)`, called for each client that
    connects, are given together or not at all. `max_receiving_bytes` bounds partly received messages. `clock` returns
    seconds.
    """

    def __init__(
        self,
        *,
        max_message_bytes: int,
        send_hwm_messages: int,
        max_connections: int,
        max_receiving_bytes: int = 1 << 30,
        keys: KeyPair | None = None,
        allowed: Callable[[str], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert (keys is None) == (allowed is None), "keys and allowed are given together or not at all"
        self._keys = keys
        self._allowed = allowed
        self._clock = clock
        self._send_hwm_messages = send_hwm_messages
        self._places = Places(min(max_connections, most_connections()), clock)
        self.memory = ReceivingMemory(max_receiving_bytes)
        frame_bytes = max(max_message_bytes, MAX_HEADER_BYTES + 1)
        frames = 4 * (HEAD_FRAMES + MAX_TENSORS)  # more than valid messages have, so that a few too many get an ERROR
        self._member_limits = MessageLimits(frames, frame_bytes, FRAMES_OF_THE_LARGEST * frame_bytes)
        stranger_bytes = min(frame_bytes, STRANGER_MESSAGE_BYTES)
        self._stranger_limits = MessageLimits(frames, stranger_bytes, 2 * stranger_bytes)
        self._executor = None if keys is None else ThreadPoolExecutor(CRYPTO_THREADS, "zsl-curve")
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._listening: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._receive: Receiver | None = None
        self._received: Callable[[], None] = lambda: None
        self._peers = 0  # accepted so far
        self._connections: dict[bytes, Connection] = {}
        self._strangers: dict[Connection, None] = {}  # oldest first
        self._unread: set[Connection] = set()  # peers with unsent bytes
        self._turns = Turns(
            turn=self._turn,
            accept=self._accept,
            ended=lambda: self._received(),
            has_members=lambda: len(self._strangers) < len(self._connections),
            clock=clock,
        )
        self._housekeeping: asyncio.Handle | None = None

    @property
    def connections(self) -> Mapping[bytes, Connection]:
        """Open TCP connections by peer, also before their handshake."""
        return MappingProxyType(self._connections)

    def bind(self, host: str, port: int) -> str:
        """Bind, and return the endpoint (`port` 0 picks one). On a running loop, handshakes are answered at once.

        Raises `StartupError`.
        """
        try:
            self._listening, endpoint = listen(host, port)
        except StartupError:
            self.close()
            raise
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            self._begin()
        return endpoint

    def start(self, receive: Receiver, received: Callable[[], None]) -> None:
        """Start to receive, on the running loop."""
        self._receive = receive
        self._received = received
        self._begin()
        for connection in list(self._connections.values()):
            self._changed(connection)

    def drain(self) -> None:
        """Receive the messages that members have sent, without waiting."""
        self._turns.of_members()

    def send(self, peer: bytes, frames: Sequence[Frame]) -> bool:
        """Send without waiting. Return False, with nothing sent, if the peer is gone or does not read.

        The frames' memory must not be written any more: large ones are not copied.
        """
        connection = self._connections.get(peer)
        return connection is not None and connection.send(frames)

    def hold(self, peer: bytes) -> None:
        """Make a connection a member: it has a session from now on."""
        connection = self._connections.get(peer)
        if connection is not None and connection in self._strangers:
            del self._strangers[connection]
            connection.limits = self._member_limits
            self._turns.forget(connection)
            self._changed(connection)

    def release(self, peer: bytes) -> None:
        """Make a connection a stranger: its session has ended."""
        connection = self._connections.get(peer)
        if connection is not None:
            connection.limits = self._stranger_limits
            self.distrust(peer)

    def distrust(self, peer: bytes) -> None:
        """Treat a connection as a stranger until `hold`, because it sent an invalid message."""
        connection = self._connections.get(peer)
        if connection is not None and connection not in self._strangers:
            self._strangers[connection] = None
            self._turns.forget(connection)
            self._changed(connection)

    def unsent_bytes(self, peer: bytes) -> int:
        """Return the bytes in memory that wait for a peer to read them."""
        connection = self._connections.get(peer)
        return 0 if connection is None else connection.unsent.nbytes

    @property
    def all_unsent_bytes(self) -> int:
        """Total bytes in memory that wait for peers to read them."""
        return sum(connection.unsent.nbytes for connection in self._unread)

    def is_connected(self, peer: bytes) -> bool:
        """Return whether the connection of a peer is open."""
        return peer in self._connections

    def digest(self, peer: bytes) -> bytes | None:
        """Return the digest of a connection; None if it leaves the machine, or is closed."""
        connection = self._connections.get(peer)
        return None if connection is None else digest_at_server(connection.socket)

    def slow_peers(self, now: float) -> list[bytes]:
        """Return the peers that have not read for too long."""
        return [connection.peer for connection in self._unread if connection.unsent.is_slow(now)]

    def cut(self, peer: bytes) -> None:
        """Close the connection of a peer, and drop its unsent messages. It may connect again."""
        connection = self._connections.get(peer)
        if connection is not None:
            connection.close("it was cut")

    def close(self) -> None:
        """Stop receiving, send waiting messages for up to `LINGER_SECONDS`, and free the sockets."""
        self._turns.stop()
        if self._housekeeping is not None:
            self._housekeeping.cancel()
        self._loop = self._receive = None
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
        self._linger()
        for connection in list(self._connections.values()):
            connection.close("the daemon ends")
        self._turns.close()

    def _linger(self) -> None:
        until = time.monotonic() + LINGER_SECONDS
        with selectors.DefaultSelector() as leaving:
            for connection in list(self._unread):
                if connection.wants_to_write:
                    leaving.register(connection.socket, selectors.EVENT_WRITE, connection)
            while leaving.get_map() and (seconds := until - time.monotonic()) > 0:
                for key, _ in leaving.select(seconds):
                    connection = key.data
                    connection.write()
                    if not connection.wants_to_write:
                        leaving.unregister(key.fileobj)

    # --- the loop ------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._loop is not None:
            return
        assert self._listening is not None
        self._loop = asyncio.get_running_loop()
        self._turns.begin(self._listening)
        self._keep_house()

    def _turn(self, connection: Connection, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE and connection.state is not State.CLOSED:
                connection.write()
            if events & selectors.EVENT_READ and connection.wants_to_read and self.memory.admits(connection):
                connection.read(self._scratch)
                self._changed(connection)
        except Exception:
            # No input of a peer may stop the loop, or fail again and again.
            logger.exception("a connection of %s failed", connection.address)
            connection.close("it failed")

    def _changed(self, connection: Connection) -> None:
        """Update turns and counts after a change of a connection."""
        if connection.peer not in self._connections:
            return
        self.memory.count(connection)
        if connection.state is State.CLOSED:
            self._forget(connection)
            return
        if connection.unsent.nbytes:
            self._unread.add(connection)
        else:
            self._unread.discard(connection)
        # Messages are read only after `start`.
        reads = connection.wants_to_read and (self._receive is not None or connection.state is not State.OPEN)
        self._turns.watch(connection, stranger=connection in self._strangers, reads=reads)

    def _forget(self, connection: Connection) -> None:
        self._turns.forget(connection)
        del self._connections[connection.peer]
        self._strangers.pop(connection, None)
        self.memory.forget(connection)
        self._unread.discard(connection)
        logger.debug("a connection of %s ended: %s", connection.address, connection.why)

    def _hand_on(self, connection: Connection, frames: list[Frame]) -> None:
        assert self._receive is not None
        try:
            self._receive(connection.peer, connection.tenant, frames)
        except Exception:
            # No input of a peer may stop the loop; the receiver answers the errors that it expects.
            logger.exception("a message could not be handled")

    def _call_soon(self, finish: Callable[[object], None], done: object) -> None:
        """Have the loop finish what another thread has opened or sealed."""
        loop = self._loop
        if loop is not None:  # else the router is closed
            loop.call_soon_threadsafe(self._finish, finish, done)

    def _finish(self, finish: Callable[[object], None], done: object) -> None:
        """Finish, and let a message that this completes be handled: there may be no turn after it."""
        finish(done)
        if self._loop is not None:
            self._received()

    # --- connections ---------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._listening is not None and self._loop is not None
        for _ in range(ACCEPTED_PER_TURN):
            try:
                accepted, address = self._listening.accept()
            except (BlockingIOError, ConnectionError, InterruptedError):
                return
            except OSError as error:
                logger.warning("a connection could not be accepted: %s", error.strerror)
                self._places.make(self._strangers)
                return
            if len(self._connections) >= self._places.number and not self._places.make(self._strangers):
                accepted.close()
                continue
            self._open(accepted, str(address[0]))

    def _open(self, accepted: socket.socket, address: str) -> None:
        assert self._loop is not None
        accepted.setblocking(False)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._peers += 1
        mechanism: Mechanism = Null()
        if self._keys is not None and self._allowed is not None:
            mechanism = Curve(self._keys, self._allowed)
        connection = Connection(
            self._peers.to_bytes(8, "big"),
            accepted,
            address,
            mechanism,
            self._stranger_limits,
            max_unsent_messages=self._send_hwm_messages,
            receive=self._hand_on,
            changed=self._changed,
            executor=self._executor,
            call_soon=self._call_soon,
            clock=self._clock,
        )
        self._connections[connection.peer] = connection
        self._strangers[connection] = None
        connection.write()

    def _keep_house(self) -> None:
        """Close connections that take too long, and resume those that wait for memory."""
        assert self._loop is not None
        now = self._clock()
        for connection in list(self._connections.values()):
            if connection.overdue(now) and connection not in self.memory:
                connection.close("its handshake or a message took too long")
        for connection in list(self._strangers):
            if now - connection.heard_at > STRANGER_SECONDS:
                connection.close("silent, without a session")
        self.memory.unpark()
        self._housekeeping = self._loop.call_later(HOUSEKEEPING_SECONDS, self._keep_house)
