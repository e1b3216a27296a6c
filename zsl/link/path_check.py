"""Check that the connection of the requests still carries them, in both directions and all of them.

A daemon may be well while this connection is not: its bytes are swallowed, or a message was lost on it. Pings go over
it too while requests are under way. They queue behind tensors, so more patience is due than with the heartbeat. A
connection keeps the order of its messages, so a pong tells which requests the daemon must have had. Pure: the clock is
given.
"""

from __future__ import annotations

from collections.abc import Set

from zsl.link.heartbeat import MISSED_PINGS
from zsl.wire.messages import Ping, Pong, Welcome

# A connection that moves less than this is taken for broken.
MIN_BYTES_PER_SECOND = 100_000


class PathCheck:
    """The pings of one connection."""

    def __init__(self, welcome: Welcome, now: float) -> None:
        self._welcome = welcome
        self._interval_seconds = welcome.limits.ping_ms / 1000
        self._missed = 0
        self._asked_about: tuple[int, frozenset[int]] = (0, frozenset())
        self.next_ping = now

    def heard(self) -> None:
        """Something came over it, or nothing is under way."""
        self._missed = 0

    def is_broken(self, under_way_bytes: int) -> bool:
        """Whether it should have answered by now, with so much to carry."""
        transfer_seconds = 2 * under_way_bytes / MIN_BYTES_PER_SECOND
        return (self._missed - MISSED_PINGS) * self._interval_seconds > transfer_seconds

    def ping(self, request: int, under_way: Set[int], now: float) -> Ping:
        """The next ping, with this id."""
        self.next_ping = now + self._interval_seconds
        self._missed += 1
        self._asked_about = request, frozenset(under_way)
        return Ping(session=self._welcome.session, epoch=self._welcome.epoch, request=request)

    def has_lost(self, pong: Pong, under_way: Set[int]) -> bool:
        """Whether the daemon has less than what was sent before the ping and is still without an answer."""
        ping, asked_about = self._asked_about
        return pong.request == ping and len(asked_about & under_way) > pong.inflight_requests
