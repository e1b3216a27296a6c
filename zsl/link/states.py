"""States of a link, and the events that lead from one to the next.

`Pausing` waits before the next attempt, `Opening` (`zsl.link.opening`) says HELLO on a fresh socket, `Open`
(`zsl.link.open_session`) has a session. Each owns its sockets and timers. `zsl.link.link` has the transitions.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import zmq

from zsl.errors import WIRE_ERRORS, InternalError, WireError, ZslError
from zsl.link.endpoints import Endpoints
from zsl.link.pending import Requests
from zsl.link.traffic import TrafficCounter
from zsl.transport.curve import ClientKeys
from zsl.wire.messages import Error, Hello, Welcome

MAX_RELEASED = 1024  # steps of which a session that goes on is told again that they are released


@dataclass(frozen=True, slots=True)
class Welcomed:
    """The daemon has opened a session, or goes on with the last one."""

    welcome: Welcome


@dataclass(frozen=True, slots=True)
class Failed:
    """The attempt to open a session came to nothing. `why` is empty where the endpoint's own reason says it."""

    why: str = ""


@dataclass(frozen=True, slots=True)
class Lost:
    """The connection of the open session is of no use any more."""

    why: str


@dataclass(frozen=True, slots=True)
class Unfit:
    """The endpoint will never do, for this reason."""

    error: ZslError


@dataclass(frozen=True, slots=True)
class Left:
    """The daemon is shutting down, and what was asked of it is answered."""


@dataclass(frozen=True, slots=True)
class PauseOver:
    """The next attempt is due."""


@dataclass(frozen=True, slots=True)
class Interrupted:
    """Ctrl-C came in the middle of a turn: what is queued on the sockets is not known."""


Event = Welcomed | Failed | Lost | Unfit | Left | PauseOver | Interrupted


class State(Protocol):
    """A state that owns its sockets and timers. An event ends it; its other events die with it."""

    sockets: tuple[zmq.Socket[bytes], ...]  # to be polled; another tuple where they change

    def due(self, now: float) -> Sequence[float]:
        """Times of its timers."""

    def receive(self) -> Event | None:
        """Handle what has arrived, up to the first event."""

    def act(self, now: float) -> Event | None:
        """Do what is due, and send what can go."""

    def leave(self) -> None:
        """Close the sockets, with a word to the daemon where it expects one."""

    def close(self) -> None:
        """Close the sockets: nothing that is queued on them is sent. Again is nothing."""


class Pausing:
    """No socket until the next attempt is due."""

    sockets: tuple[zmq.Socket[bytes], ...] = ()

    def __init__(self, until: float) -> None:
        self._until = until

    def __repr__(self) -> str:
        return f"Pausing({max(0.0, self._until - time.monotonic()):.1f} s)"

    def due(self, now: float) -> Sequence[float]:
        return (self._until,)

    def receive(self) -> Event | None:
        return None

    def act(self, now: float) -> Event | None:
        return PauseOver() if now >= self._until else None

    def leave(self) -> None:
        pass

    def close(self) -> None:
        pass


class LastSession:
    """Name of the newest session and its released steps, which outlive its connection."""

    def __init__(self) -> None:
        self._endpoint, self._id = "", b""
        self._released: deque[int] = deque(maxlen=MAX_RELEASED)

    def at(self, endpoint: str) -> bytes | None:
        """Id of the session to resume at an endpoint."""
        return self._id if self._id and endpoint == self._endpoint else None

    def opened(self, endpoint: str, session: bytes) -> list[int]:
        """Note that a session is open. Returns the steps of which it must be told that they are released.

        A RELEASE on a connection that broke may not have arrived, and between two nothing could be said.
        """
        if session != self._id:
            self._released.clear()
        self._endpoint, self._id = endpoint, session
        return list(self._released)

    def release(self, step: int, session: bytes) -> bool:
        """Note that a step is released. False if its session is not the newest one."""
        if session != self._id:
            return False
        self._released.append(step)
        return True


@dataclass(slots=True)
class FirstSession:
    """Patience with daemons until the first session is open; `opened` gets its WELCOME."""

    opened: Future[Welcome]
    open_by: float
    loaded_by: float | None = None  # a daemon that is loading must be done
    not_yet: ZslError | None = None  # why a daemon that answers opens no session; of later sessions, too
    unreadable: int = 0  # answers

    @property
    def is_open(self) -> bool:
        return self.opened.done()


@dataclass(slots=True)
class Shared:
    """Parts of a link that outlive its states."""

    endpoints: Endpoints
    hello: Hello
    keys: ClientKeys | None
    new_request_id: Callable[[], int]
    connect_timeout_seconds: float
    request_timeout_seconds: float
    first: FirstSession
    context: zmq.Context[zmq.Socket[bytes]] = field(default_factory=zmq.Context)
    requests: Requests = field(default_factory=Requests)
    traffic: TrafficCounter = field(default_factory=TrafficCounter)
    last: LastSession = field(default_factory=LastSession)
    # Endpoints whose connections reach several daemons; there a session has one, for its pings too.
    balanced: set[str] = field(default_factory=set)


def error_of(header: Error, endpoint: str) -> WireError:
    """The exception for an ERROR of the daemon at `endpoint`."""
    kind = WIRE_ERRORS.get(header.code, InternalError)
    return kind(f"{header.text} [trunk {endpoint}]", retry_after_ms=header.retry_after_ms)
