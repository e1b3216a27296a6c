"""Turns of connections on the asyncio loop: members when they can read or write, strangers in a share of the time."""

from __future__ import annotations

import asyncio
import selectors
import socket
from collections.abc import Callable

from zsl.transport.peer_connection import Connection
from zsl.transport.time_share import TimeShare

TURN_SECONDS = 0.002  # for strangers


class Turns:
    """Watches connections, and gives them turns. A member is a connection with a session, a stranger one without.

    `turn(connection, events)` reads and writes without waiting, `accept()` accepts waiting connections, `ended()` is
    called after turns that came together. `has_members()`: without any, strangers need not wait. `clock` returns
    seconds.
    """

    def __init__(
        self,
        *,
        turn: Callable[[Connection, int], None],
        accept: Callable[[], None],
        ended: Callable[[], None],
        has_members: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._turn = turn
        self._accept = accept
        self._ended = ended
        self._has_members = has_members
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._members, self._strangers = selectors.DefaultSelector(), selectors.DefaultSelector()
        self._members_left: dict[Connection, None] = {}  # with bytes read but not parsed
        self._strangers_due: dict[Connection, int] = {}  # events that wait for a turn
        self._share = TimeShare(clock())
        self._timers: dict[str, asyncio.Handle] = {}

    def begin(self, listening: socket.socket) -> None:
        """Begin on the running loop, and accept connections."""
        self._loop = asyncio.get_running_loop()
        self._strangers.register(listening, selectors.EVENT_READ, None)
        self._loop.add_reader(self._members.fileno(), self.of_members)
        self._loop.add_reader(self._strangers.fileno(), self._of_strangers)

    def stop(self) -> None:
        """Give no more turns."""
        if self._loop is not None and not self._loop.is_closed():
            for selector in (self._members, self._strangers):
                self._loop.remove_reader(selector.fileno())
        for timer in self._timers.values():
            timer.cancel()
        self._loop = None

    def close(self) -> None:
        """Free the selectors, after `stop`."""
        self._members.close()
        self._strangers.close()

    def watch(self, connection: Connection, *, stranger: bool, reads: bool) -> None:
        """Give a connection turns to read if it `reads`, and to write if it has to."""
        selector = self._strangers if stranger else self._members
        wanted = reads * selectors.EVENT_READ | connection.wants_to_write * selectors.EVENT_WRITE
        registered = selector.get_map().get(connection.socket)
        if registered is None:
            if wanted:
                selector.register(connection.socket, wanted, connection)
        elif not wanted:
            selector.unregister(connection.socket)
        elif registered.events != wanted:
            selector.modify(connection.socket, wanted, connection)
        if reads and connection.has_left and self._loop is not None:
            if stranger:
                self._strangers_due.setdefault(connection, selectors.EVENT_READ)
                self._strangers_soon()
            else:
                self._members_left[connection] = None
                if "members" not in self._timers:
                    self._timers["members"] = self._loop.call_soon(self._of_members_left)

    def forget(self, connection: Connection) -> None:
        """Give a connection no more turns, until it is watched again."""
        self._members_left.pop(connection, None)
        self._strangers_due.pop(connection, None)
        for selector in (self._members, self._strangers):
            if connection.socket.fileno() >= 0 and connection.socket in selector.get_map():
                selector.unregister(connection.socket)

    def of_members(self) -> None:
        """Give one bounded turn to each member that can read or write."""
        left, self._members_left = self._members_left, {}
        turns: dict[Connection, int] = dict.fromkeys(left, selectors.EVENT_READ)
        for key, events in self._members.select(0):
            turns[key.data] = turns.get(key.data, 0) | events
        for connection, events in turns.items():
            self._turn(connection, events)
        self._ended()

    def _of_members_left(self) -> None:
        del self._timers["members"]
        self.of_members()

    def _of_strangers(self) -> None:
        """Give strangers turns until their time is used up; the others keep their place."""
        began = self._clock()
        self._timers.pop("strangers", None)
        due = self._strangers_due
        for key, events in self._strangers.select(0):
            if key.data is None:
                self._accept()
            else:
                due[key.data] = due.get(key.data, 0) | events
        now = began
        while due and now - began < TURN_SECONDS:
            connection = next(iter(due))
            self._turn(connection, due.pop(connection))
            now = self._clock()
        self._ended()
        self._charge_strangers(began, self._clock())

    def _charge_strangers(self, began: float, now: float) -> None:
        """Schedule the strangers' next turn by the time they used."""
        assert self._loop is not None
        pause = self._share.charge(began, now, bounded=self._has_members())
        if pause:
            self._loop.remove_reader(self._strangers.fileno())
            self._timers["strangers"] = self._loop.call_later(pause, self._strangers_again)
        elif self._strangers_due:
            self._strangers_soon()

    def _strangers_again(self) -> None:
        assert self._loop is not None
        self._loop.add_reader(self._strangers.fileno(), self._of_strangers)
        self._of_strangers()

    def _strangers_soon(self) -> None:
        if self._loop is not None and "strangers" not in self._timers:
            self._timers["strangers"] = self._loop.call_soon(self._of_strangers)
