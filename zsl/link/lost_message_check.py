"""Check that the requests' connection carries messages in both directions and loses none.

A healthy daemon may be behind a broken connection, which swallows bytes or has lost a message. While requests are under
way, pings use this connection too. They queue behind tensors, so they get more time than those of the heartbeat. A
connection keeps the order of its messages, so a pong tells which requests the daemon must have received. Pure: the
clock is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Set

from zsl.link.heartbeat import MISSED_PINGS
from zsl.wire.messages import Ping, Pong, Welcome

# A slower connection counts as broken.
MIN_BYTES_PER_SECOND = 100_000


class LostMessageCheck:
    """Pings of one connection."""

    def __init__(self, welcome: Welcome, now: float) -> None:
        self._welcome = welcome
        self._interval_seconds = welcome.limits.ping_ms / 1000
        self._missed = 0
        self._asked_about: tuple[int, frozenset[int]] = (0, frozenset())
        self.next_ping = now

    def heard(self) -> None:
        """Reset the count of missed pings: a message arrived, or no request is under way."""
        self._missed = 0

    def is_broken(self, under_way_bytes: Callable[[], int]) -> bool:
        """Return whether a ping should have been answered by now, given the bytes under way."""
        if self._missed <= MISSED_PINGS:
            return False
        transfer_seconds = 2 * under_way_bytes() / MIN_BYTES_PER_SECOND
        return (self._missed - MISSED_PINGS) * self._interval_seconds > transfer_seconds

    def ping(self, request: int, under_way: Set[int], now: float) -> Ping:
        """Return the next ping, with this request id."""
        self.next_ping = now + self._interval_seconds
        self._missed += 1
        self._asked_about = request, frozenset(under_way)
        return Ping(session=self._welcome.session, epoch=self._welcome.epoch, request=request)

    def has_lost(self, pong: Pong, under_way: Set[int]) -> bool:
        """Return whether the daemon has fewer requests than were sent before the ping and are still unanswered."""
        ping, asked_about = self._asked_about
        return pong.request == ping and len(asked_about & under_way) > pong.inflight_requests
