"""Heartbeat of a daemon: pings on a separate connection, so that they do not queue behind tensors.

A daemon that is stopped, hung or unreachable is noticed after a few missed pings, however large a request is under way.
Unanswered pings count, not time: a client that was itself stopped for a minute has missed no ping. Not thread-safe.
Imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Set

import zmq

from zsl.errors import Retry, WireError
from zsl.transport.curve_keys import ClientKeys
from zsl.transport.dealer import Dealer
from zsl.wire.frames import decode, encode
from zsl.wire.messages import TO_CLIENT, Error, Ping, Pong, Welcome

logger = logging.getLogger(__name__)

MISSED_PINGS = 5
# Of one pass. A large pass may be slow; one warning tells the user to look.
LONG_PASS_SECONDS = 60.0


class Progress:
    """Duration of the daemon's current pass, from its pongs."""

    def __init__(self, endpoint: str) -> None:
        self.pass_seconds = 0.0  # duration so far
        self._endpoint = endpoint
        self._said = False

    def heard(self, pong: Pong) -> None:
        self.pass_seconds = pong.progress_age_ms / 1000
        if self.pass_seconds > LONG_PASS_SECONDS and not self._said:
            logger.warning("the trunk at %s has been at one pass for %.0f s", self._endpoint, self.pass_seconds)
        self._said = self.pass_seconds > LONG_PASS_SECONDS


class Heartbeat:
    """Pings for a session. Poll `sockets`; call `turn` when they are ready, and at `next_ping`.

    `reaches_another`: pongs come from another daemon process than the one that opened the session. Its replies about
    the session are ignored.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        keys: ClientKeys | None,
        welcome: Welcome,
        *,
        progress: Progress,
        new_request_id: Callable[[], int],
        now: float,
    ) -> None:
        self._dealer = Dealer(context, endpoint, keys)
        self._endpoint = endpoint
        self._welcome = welcome
        self._new_request_id = new_request_id
        self._interval_seconds = welcome.limits.ping_ms / 1000
        self._next_ping = now
        self._unanswered = 0
        self._pings: set[int] = set()
        self._progress = progress
        self.session_is_gone = self.reaches_another = False

    @property
    def sockets(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        return self._dealer.socket, self._dealer.monitor

    @property
    def next_ping(self) -> float:
        """Time of the next ping."""
        return self._next_ping

    @property
    def silent(self) -> bool:
        """True if too many pings are unanswered: the daemon counts as dead."""
        return self._unanswered > MISSED_PINGS

    @property
    def silent_seconds(self) -> float:
        return self._unanswered * self._interval_seconds

    def heard(self) -> None:
        """Reset the count of missed pings: a message came on the session's connection."""
        self._unanswered = 0

    def turn(self, now: float, readable: Set[object]) -> None:
        """Handle the pongs of `readable` sockets, and send a ping if one is due."""
        if self._dealer.monitor in readable:
            self._dealer.skip_events()  # it reconnects by itself, and an unsent ping counts as missed
        while self._dealer.socket in readable and (frames := self._dealer.receive()) is not None:
            try:
                self._on_header(decode(frames, TO_CLIENT).header)
            except WireError as error:
                logger.debug("%s sent a damaged pong: %s", self._endpoint, error)
        if now >= self._next_ping:
            self._next_ping = now + self._interval_seconds
            self._unanswered += 1
            request = self._new_request_id()
            self._pings = {request, *sorted(self._pings)[-MISSED_PINGS:]}
            session, epoch = self._welcome.session, self._welcome.epoch
            self._dealer.send(encode(Ping(session=session, epoch=epoch, request=request)))

    def close(self) -> None:
        self._dealer.close(linger_ms=0)

    def _on_header(self, header: object) -> None:
        if not isinstance(header, (Pong, Error)) or header.request not in self._pings:
            return
        if header.epoch != self._welcome.epoch:
            self.reaches_another = True
        elif header.session != self._welcome.session:
            logger.debug("%s answered a ping of another session", self._endpoint)
        elif isinstance(header, Pong):
            self._unanswered = 0
            self._progress.heard(header)
        elif header.retry is Retry.REHELLO:
            self.session_is_gone = True
