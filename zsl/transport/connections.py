"""The TCP connections of a ROUTER: how many there are, which peer has which, and how to cut one.

ZeroMQ hides them. Its monitor tells which file descriptors it accepted and gave up, in that order, and each message
which one it came through. A number that was given up is soon that of another connection, so what is remembered of it
ends with it, and nothing is cut but through a duplicate that was made before the monitor was last asked.
All that holds for a context with one I/O thread: with several, a connection could be given up before it was accepted.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from zsl.transport.monitor import Monitor
from zsl.transport.reading import Reader

logger = logging.getLogger(__name__)

WARNING_SECONDS = 10.0


@dataclass(slots=True, eq=False)
class _Connection:
    descriptor: int
    peer: bytes | None = None  # known from its first message on
    cut: bool = False


class Connections:
    """Follows the connections of `router`, from before its bind on. Over `max_connections` the newest is cut.

    `gone(peer)` is called when the connection of a peer has ended.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        router: zmq.Socket[bytes],
        *,
        max_connections: int,
        gone: Callable[[bytes], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_connections = max_connections
        self._gone = gone
        self._clock = clock
        self._open: dict[int, _Connection] = {}  # by descriptor; also those that are being cut
        self._of_peer: dict[bytes, _Connection] = {}
        self._cut_count = 0
        self._freed: set[int] = set()  # descriptors given up since the ROUTER was last seen empty
        self._turned_away = 0
        self._warned_at = float("-inf")
        self._monitor = Monitor(context, router, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._reader = Reader(self._monitor.socket, self._take_event, lambda _: self._cut_those_over())

    def start(self) -> None:
        """Begin to follow, on the running loop. A second time does nothing."""
        self._reader.start()

    def __len__(self) -> int:
        return len(self._open)

    def knows(self, peer: bytes) -> bool:
        """Whether the connection of this peer is known."""
        return peer in self._of_peer

    def heard(self, peer: bytes, descriptor: int) -> None:
        """A message of a peer came through this descriptor."""
        self._take_events()
        # A late message of a connection that has ended must not be taken for one of its successor's. Before anything of
        # the successor can be here, all of the ended one is; so once the ROUTER was seen empty, none of that is left.
        # Until then it is not said whose the connection is; the peer's next message will tell.
        connection = self._open.get(descriptor)
        if connection is not None and connection.peer is None and descriptor not in self._freed:
            connection.peer = peer
            self._of_peer[peer] = connection

    def heard_all(self) -> None:
        """The ROUTER was seen empty."""
        self._freed.clear()

    def cut(self, peer: bytes) -> None:
        """End the connection of a peer, if it has one still."""
        connection = self._of_peer.get(peer)
        if connection is not None:
            self._cut(connection)

    def close(self) -> None:
        """Before the ROUTER is closed."""
        self._reader.stop()
        self._monitor.close()

    def _take_events(self) -> None:
        while self._take_event():
            pass
        self._reader.look_again()  # for those that are over

    def _take_event(self) -> bool:
        """Take in one event; whether there was one."""
        happened = self._monitor.next_event()
        if happened is None:
            return False
        event, descriptor = happened
        if event == zmq.EVENT_ACCEPTED:
            self._open[descriptor] = _Connection(descriptor)
        elif event == zmq.EVENT_DISCONNECTED:
            ended = self._open.pop(descriptor, None)
            self._freed.add(descriptor)
            if ended is not None:
                self._cut_count -= ended.cut
                if ended.peer is not None:
                    del self._of_peer[ended.peer]
                    self._gone(ended.peer)
        return True

    def _cut_those_over(self) -> None:
        over = len(self._open) - self._cut_count - self._max_connections
        if over > 0:
            newest = [connection for connection in reversed(self._open.values()) if not connection.cut]
            for connection in newest[:over]:
                self._cut(connection)
                self._turned_away += 1
        if self._turned_away and self._clock() - self._warned_at >= WARNING_SECONDS:
            logger.warning(
                "more than %d connections: %d turned away; others wait for a place",
                self._max_connections,
                self._turned_away,
            )
            self._turned_away, self._warned_at = 0, self._clock()

    def _cut(self, connection: _Connection) -> None:
        try:
            descriptor = os.dup(connection.descriptor)
        except OSError:
            return  # it has ended; the monitor will say so
        try:
            duplicate = socket.socket(fileno=descriptor)
        except OSError:
            os.close(descriptor)  # the number is that of a file by now
            return
        with duplicate:
            self._take_events()
            # Still its descriptor now, so it was when the duplicate was made.
            if self._open.get(connection.descriptor) is connection and not connection.cut:
                connection.cut = True
                self._cut_count += 1
                try:
                    duplicate.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # the peer was faster
