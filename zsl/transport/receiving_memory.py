"""A bound on the large messages that all peers together have sent in part."""

from __future__ import annotations

from zsl.transport.peer_connection import Connection, State


class ReceivingMemory:
    """Admits large messages up to `max_bytes`. Over that only the oldest one is received; the others are parked."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._nbytes = 0  # received of all of them
        self._receiving: dict[Connection, int] = {}  # bytes received of a large message; oldest first
        self._parked: dict[Connection, None] = {}

    def __repr__(self) -> str:
        return f"<ReceivingMemory: {self._nbytes} bytes of {len(self._receiving)} messages, {self.parked} parked>"

    @property
    def nbytes(self) -> int:
        """Bytes received of large messages."""
        return self._nbytes

    @property
    def parked(self) -> int:
        """Number of parked connections."""
        return len(self._parked)

    def __contains__(self, connection: Connection) -> bool:
        """True if the connection is parked."""
        return connection in self._parked

    def admits(self, connection: Connection) -> bool:
        """Admit more of a connection's large message, or park the connection."""
        if not connection.wants_memory:
            return True
        if self._nbytes > self._max_bytes and connection is not next(iter(self._receiving)):
            self._parked[connection] = None
            connection.park()
            return False
        connection.has_memory = True
        self._receiving.setdefault(connection, 0)
        return True

    def count(self, connection: Connection) -> None:
        """Count what was received of its large message; once that is whole, parked connections go on."""
        before = self._receiving.get(connection)
        if before is None:
            return
        if connection.has_memory and connection.state is State.OPEN:
            self._receiving[connection] = connection.receiving_bytes
            self._nbytes += connection.receiving_bytes - before
        else:
            del self._receiving[connection]
            self._nbytes -= before
            self.unpark()

    def unpark(self) -> None:
        """Let parked connections ask for memory again, at their next turn."""
        parked, self._parked = self._parked, {}
        for connection in parked:
            connection.unpark()

    def forget(self, connection: Connection) -> None:
        """Forget a closed connection."""
        self._parked.pop(connection, None)
