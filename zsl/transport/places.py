"""Whose connection has to go when all places are taken. Pure.

Connections that carry a session stay. Of the others, those of the tenant or the address that has most of them go first,
of these the oldest: whoever takes all places loses its own, and everyone else gets in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from zsl.transport.peer_connection import Connection


def whose(connection: Connection) -> str:
    """The tenant, or for one that has not shown a key the address."""
    return connection.tenant or connection.address


def those_to_go(strangers: Iterable[Connection], most: int) -> list[Connection]:
    """Up to `most` connections that make place for new ones; `strangers` are those without a session, oldest first.

    Several at once, so that a flood does not have them counted for each of its own.
    """
    waiting = list(strangers)
    if not waiting:
        return []
    (greediest, has), (_, others_have) = [*Counter(map(whose, waiting)).most_common(2), ("", 0)][:2]
    count = max(1, min(most, has - others_have))
    return [connection for connection in waiting if whose(connection) == greediest][:count]
