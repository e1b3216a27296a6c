"""Places of connections: choose those to close when all are taken.

Connections with a session stay. Of the others, the tenant or address with the most connections loses its oldest: a
client that takes all places loses its own, and others can still connect.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection

from zsl.transport.peer_connection import Connection

logger = logging.getLogger(__name__)

WARNING_SECONDS = 10.0


class Places:
    """Places for `number` connections. `clock` returns seconds."""

    def __init__(self, number: int, clock: Callable[[], float]) -> None:
        self.number = number
        self._clock = clock
        self._turned_away = 0  # since the last warning
        self._warned_at = float("-inf")

    def make(self, strangers: Collection[Connection]) -> bool:
        """Close some strangers (oldest first) to make place. Return False without strangers."""
        to_go = those_to_go(strangers, max(1, self.number // 64))
        for stranger in to_go:
            stranger.close("another one needs its place")
        self._turned_away += max(len(to_go), 1)
        if self._clock() - self._warned_at >= WARNING_SECONDS:
            logger.warning(
                "all %d connections are taken: %d %s",
                self.number,
                self._turned_away,
                f"without a session were cut, the last one from {to_go[-1].address}" if to_go else "turned away",
            )
            self._turned_away, self._warned_at = 0, self._clock()
        return bool(to_go)


def whose(connection: Connection) -> str:
    """Return the tenant of a connection, or its address without a proven key."""
    return connection.tenant or connection.address


def those_to_go(strangers: Collection[Connection], most: int) -> list[Connection]:
    """Return up to `most` connections to close; `strangers` are those without a session, oldest first.

    Several at once, so that a flood does not cause a count for each new connection.
    """
    if not strangers:
        return []
    (greediest, has), (_, others_have) = [*Counter(map(whose, strangers)).most_common(2), ("", 0)][:2]
    count = max(1, min(most, has - others_have))
    return [connection for connection in strangers if whose(connection) == greediest][:count]
