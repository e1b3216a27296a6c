"""Events and shared parts of a link's states, and the state `Pausing`.

`Pausing` waits before the next attempt, `Opening` (`zsl.link.opening`) sends HELLO on a fresh socket, `Open`
(`zsl.link.open_session`) has a session. Each owns its sockets and timers. `zsl.link.link` has the transitions.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import zmq

from zsl.errors import WIRE_ERRORS, InternalError, WireError, ZslError
from zsl.link.adapter_versions import SentVersions
from zsl.link.endpoints import Endpoints
from zsl.link.traffic import TrafficCounter
from zsl.link.unanswered_requests import Requests
from zsl.transport.curve_keys import ClientKeys
from zsl.wire.messages import Error, Hello, Welcome

MAX_RELEASED = 1024  # RELEASEs that are sent again to a resumed session


@dataclass(frozen=True, slots=True)
class Welcomed:
    """The daemon has opened a session, or resumed the last one."""

    welcome: Welcome


@dataclass(frozen=True, slots=True)
class Failed:
    """The attempt to open a session failed. `why` is empty if the endpoint's own reason explains it."""

    why: str = ""


@dataclass(frozen=True, slots=True)
class Lost:
    """The connection of the open session is lost or broken."""

    why: str


@dataclass(frozen=True, slots=True)
class Unfit:
    """The endpoint cannot be used, and retrying cannot help."""

    error: ZslError


@dataclass(frozen=True, slots=True)
class Left:
    """The daemon is shutting down, and has answered all requests."""


@dataclass(frozen=True, slots=True)
class PauseOver:
    """The next attempt is due."""


@dataclass(frozen=True, slots=True)
class Interrupted:
    """Ctrl-C interrupted a turn: the messages queued on the sockets are unknown."""


Event = Welcomed | Failed | Lost | Unfit | Left | PauseOver | Interrupted


class State(Protocol):
    """State of a link, with its own sockets and timers. An event ends it; its later events are dropped."""

    sockets: tuple[zmq.Socket[bytes], ...]  # to poll; replaced by another tuple if they change

    def due(self, now: float) -> Sequence[float]:
        """Return the times of its timers."""

    def receive(self, readable: Set[object]) -> Event | None:
        """Handle the messages of `readable` sockets, up to the first event."""

    def act(self, now: float, readable: Set[object]) -> Event | None:
        """Handle due timers, and send waiting requests."""

    def leave(self) -> None:
        """Close the sockets, after a BYE if a session is open."""

    def close(self) -> None:
        """Close the sockets and drop the messages queued on them. Idempotent."""


class Pausing:
    """State without a socket, until the next attempt is due."""

    sockets: tuple[zmq.Socket[bytes], ...] = ()

    def __init__(self, until: float) -> None:
        self._until = until

    def __repr__(self) -> str:
        return f"Pausing({max(0.0, self._until - time.monotonic()):.1f} s)"

    def due(self, now: float) -> Sequence[float]:
        return (self._until,)

    def receive(self, readable: Set[object]) -> Event | None:
        return None

    def act(self, now: float, readable: Set[object]) -> Event | None:
        return PauseOver() if now >= self._until else None

    def leave(self) -> None:
        pass

    def close(self) -> None:
        pass


class LastSession:
    """Id and released steps of the newest session, kept when its connection is lost."""

    def __init__(self) -> None:
        self._endpoint, self._id = "", b""
        self._released: deque[int] = deque(maxlen=MAX_RELEASED)

    def at(self, endpoint: str) -> bytes | None:
        """Return the id of the session to resume at an endpoint, or None."""
        return self._id if self._id and endpoint == self._endpoint else None

    def opened(self, endpoint: str, session: bytes) -> list[int]:
        """Note that a session is open. Return the released steps that the daemon must be told again.

        A RELEASE may have been lost with its connection, or may have had none to be sent on.
        """
        if session != self._id:
            self._released.clear()
        self._endpoint, self._id = endpoint, session
        return list(self._released)

    def release(self, step: int, session: bytes) -> bool:
        """Note that a step is released. Return False if its session is not the newest one."""
        if session != self._id:
            return False
        self._released.append(step)
        return True


@dataclass(slots=True)
class FirstSession:
    """Deadlines until the first session is open; `opened` gets its WELCOME."""

    opened: Future[Welcome]
    open_by: float
    loaded_by: float | None = None  # a loading daemon must have loaded by then
    not_yet: ZslError | None = None  # the last refusal of a daemon that may open a session later; of later sessions too
    unreadable: int = 0  # number of unreadable answers

    @property
    def is_open(self) -> bool:
        return self.opened.done()


@dataclass(slots=True)
class Shared:
    """Parts of a link that its states share and that outlive them."""

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
    adapters: SentVersions = field(default_factory=SentVersions)
    # Endpoints behind a balancer: a session there sends its pings on its only connection.
    balanced: set[str] = field(default_factory=set)


def error_of(header: Error, endpoint: str) -> WireError:
    """Return the exception for an ERROR of the daemon at `endpoint`."""
    kind = WIRE_ERRORS.get(header.code, InternalError)
    return kind(f"{header.text} [trunk {endpoint}]", retry_after_ms=header.retry_after_ms)
