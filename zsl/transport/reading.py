"""Reading a plain ZeroMQ socket on an asyncio loop.

The socket is read by a callback when its file descriptor says so. There is no future that could be cancelled with a
message in it (a cancelled `recv` of zmq.asyncio loses messages). The descriptor is edge-triggered: every receive and
every send is followed by another look at the socket's own state, and a slow timer looks again for an edge that was
missed. Knows nothing of what is read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import zmq

logger = logging.getLogger(__name__)

# A turn of the loop ends after this many messages, so that a burst does not starve what else the loop does.
MESSAGES_PER_TURN = 64
WATCHDOG_SECONDS = 1.0


class Reader:
    """Calls `take()` while there is a message, which it has to receive, and `taken()` when those that had arrived
    together are through. `taken` is told whether the socket was seen empty."""

    def __init__(
        self, socket: zmq.Socket[bytes], take: Callable[[], object], taken: Callable[[bool], None] = lambda _: None
    ) -> None:
        self._socket = socket
        self._take = take
        self._taken = taken
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn: asyncio.Handle | None = None
        self._watchdog: asyncio.Handle | None = None

    def start(self) -> None:
        """Begin, on the running loop. A second time does nothing."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._socket.fileno(), self.drain)
            self._watch()

    def drain(self) -> None:
        """Take what has arrived, without waiting."""
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        empty = self._take_turn()
        if not empty:
            self.look_again()
        self._taken(empty)

    def look_again(self) -> None:
        """Drain in the next turn of the loop: something may have consumed the edge that announced a message."""
        if self._turn is None and self._loop is not None:
            self._turn = self._loop.call_soon(self.drain)

    def stop(self) -> None:
        """Before the socket is closed."""
        for handle in (self._turn, self._watchdog):
            if handle is not None:
                handle.cancel()
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._socket.fileno())
        self._loop = None

    def _take_turn(self) -> bool:
        """Take what has arrived, up to the end of the turn; whether that was all."""
        for _ in range(MESSAGES_PER_TURN):
            # Asked first: to be told by an exception that nothing is there costs more.
            if not int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return True
            try:
                self._take()
            except Exception:
                # Nothing that a peer sends may stop the reader; who takes a message answers the errors it expects.
                logger.exception("a message could not be handled")
        return False

    def _watch(self) -> None:
        assert self._loop is not None
        self.look_again()
        self._watchdog = self._loop.call_later(WATCHDOG_SECONDS, self._watch)
