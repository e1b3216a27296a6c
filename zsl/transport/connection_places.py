"""Choose the connections to close when the maximum number is reached. Pure.

Connections with a session stay. Of the others, the tenant or address with the most connections loses its oldest: a
client that takes all places loses its own, and others can still connect.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from zsl.transport.peer_connection import Connection


def whose(connection: Connection) -> str:
    """Return the tenant of a connection, or its address without a proven key."""
    return connection.tenant or connection.address


def those_to_go(strangers: Iterable[Connection], most: int) -> list[Connection]:
    """Return up to `most` connections to close; `strangers` are those without a session, oldest first.

    Several at once, so that a flood does not cause a count for each new connection.
    """
    waiting = list(strangers)
    if not waiting:
        return []
    (greediest, has), (_, others_have) = [*Counter(map(whose, waiting)).most_common(2), ("", 0)][:2]
    count = max(1, min(most, has - others_have))
    return [connection for connection in waiting if whose(connection) == greediest][:count]
