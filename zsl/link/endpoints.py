"""Choose the next daemon of a list, with backoff and jitter, and explain why none answered.

A daemon that answers is kept. When it is lost, the list is tried in turn, beginning with it, with pauses that grow and
are drawn at random ("full jitter", Brooker, "Exponential Backoff and Jitter", 2015), so that the clients of a restarted
daemon do not all reconnect at the same instant. Pure: clock, random numbers and name lookup are arguments.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from zsl.errors import ConfigError, TrunkAuthError, TrunkUnreachable, ZslError
from zsl.transport.dealer import LinkEvent, normalized_endpoint, resolves

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 2.0
LASTING_SECONDS = 60.0  # a session that lasted this long does not count as a repeated loss

# Each is proven by the daemon's own ERROR or greeting.
_KEY_ERRORS: dict[LinkEvent | None, str] = {
    LinkEvent.UNKNOWN_KEY: "the daemon does not know this client's key: have its public key added to tenants.toml",
    LinkEvent.WRONG_SERVER_KEY: "the daemon has another key than server_key says: ask its owner for its .key file",
    LinkEvent.OTHER_MECHANISM: "one end encrypts and the other does not: give server_key and client_key just where "
    "the daemon runs with --keys",
}
_UNREACHABLE: dict[LinkEvent | None, str] = {
    None: "it cannot be reached",
    LinkEvent.REFUSED: "nothing listens there",
    LinkEvent.MUTE: "something listens there that does not answer as a trunk daemon",
    LinkEvent.UP: "something listens there that does not answer as a trunk daemon",
    LinkEvent.LOST: "the connection broke",
    LinkEvent.CUT: "it closes the connection before the handshake: it may be full, or be no trunk daemon",
    **_KEY_ERRORS,
}


def parse_endpoints(text: str) -> tuple[str, ...]:
    """Parse `HOST:PORT`, or several separated by commas. Raises `ConfigError`."""
    endpoints = tuple(normalized_endpoint(part.strip()) for part in text.split(","))
    if len(set(endpoints)) < len(endpoints):
        raise ConfigError(f"endpoint {text!r} names the same daemon twice")
    return endpoints


class Endpoints:
    """Daemons that serve the same trunk. `draw` returns a number from 0 to 1, `resolves` whether a host is known."""

    def __init__(
        self,
        endpoints: tuple[str, ...],
        *,
        longest_pause_seconds: float = LONGEST_PAUSE_SECONDS,
        draw: Callable[[], float] = random.random,
        resolves: Callable[[str], bool] = resolves,
    ) -> None:
        self._left = list(endpoints)
        self._longest_pause_seconds = longest_pause_seconds
        self._draw = draw
        self._resolves = resolves
        self._place = 0
        self._failures = 0  # since a daemon answered a request
        self._losses = 0  # of sessions, in a row
        self._opened_at = 0.0
        self._have_answered: set[str] = set()
        self._last_seen: dict[str, LinkEvent | None] = dict.fromkeys(endpoints)
        self.not_before = 0.0  # when to try `current`

    @property
    def current(self) -> str:
        return self._left[self._place]

    @property
    def others(self) -> bool:
        """True if the list has more than one endpoint."""
        return len(self._left) > 1

    @property
    def is_up(self) -> bool:
        """True if the last event of the current endpoint was a completed handshake."""
        return self._last_seen[self.current] is LinkEvent.UP

    def saw(self, event: LinkEvent) -> TrunkAuthError | None:
        """Note an event of the current endpoint. Return an error if retrying cannot help."""
        if event is not LinkEvent.LOST or self.is_up:  # otherwise the earlier event says why it was lost
            self._last_seen[self.current] = event
        if event not in _KEY_ERRORS:
            return None
        if event is not LinkEvent.UNKNOWN_KEY and self.current in self._have_answered:
            return None  # the keys were right before, so the handshake was damaged
        return TrunkAuthError(f"{self.current}: {_KEY_ERRORS[event]}")

    def unreachable(self, seconds: float) -> TrunkUnreachable:
        """Return the error that no daemon answered in this time, with the reasons."""
        tried = "; ".join(f"no trunk daemon at {one}: {self.reason(one)}" for one in self._last_seen)
        how_long = f"{seconds:g} s" if seconds else "less than 0.1 s"
        return TrunkUnreachable(f"{tried} (tried for {how_long}); start one with zsl-trunkd, or check host and port")

    def reason(self, endpoint: str) -> str:
        """Return why an endpoint has not answered, in words."""
        seen = self._last_seen[endpoint]
        if seen is None and not self._resolves(endpoint):
            return "the name of its host is not known here"
        return _UNREACHABLE[seen]

    def opened(self, now: float) -> None:
        """Note that the current endpoint opened a session."""
        self._have_answered.add(self.current)
        self._opened_at = now

    def answered(self) -> None:
        """Note an answered request: the next pauses are short again."""
        self._failures = self._losses = 0

    def lost(self, now: float) -> None:
        """Note a lost session. Retry the same endpoint at once, unless losses repeat without an answer."""
        if now - self._opened_at >= LASTING_SECONDS:
            self.answered()
        self._losses += 1
        if self._losses > 1:
            self.failed(now)
        else:
            self.not_before = now

    def failed(self, now: float) -> None:
        """Move to the next endpoint, after a pause."""
        self._place = (self._place + 1) % len(self._left)
        rounds = self._failures // len(self._left)  # an untried endpoint is tried at once
        self._failures += 1
        if rounds or len(self._left) == 1:
            pause = min(self._longest_pause_seconds, FIRST_PAUSE_SECONDS * 2 ** min(rounds, 10))
            self.not_before = now + self._draw() * pause

    def leave(self, now: float) -> None:
        """Move to the next endpoint at once, because the current daemon is shutting down."""
        self._place = (self._place + 1) % len(self._left)
        self.not_before = now

    def strike_out(self, error: ZslError) -> None:
        """Remove the current endpoint. Raises `error` if it is the last one."""
        if len(self._left) == 1:
            raise error
        del self._left[self._place]
        self._place %= len(self._left)
        self._failures = 0
        self.not_before = 0.0
