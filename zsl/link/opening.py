"""State of a link that opens a session: HELLO on a fresh socket, until WELCOME, refusal or timeout."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence, Set

import zmq

import zsl
from zsl.errors import (
    CorruptError,
    ForbiddenError,
    LoadingError,
    ProtocolVersionError,
    Retry,
    TrunkUnreachable,
    WireError,
    WrongModelError,
)
from zsl.link.states import Event, Failed, Shared, Unfit, Welcomed, error_of
from zsl.transport.dealer import Dealer, LinkEvent
from zsl.wire.frames import Frame, decode, encode
from zsl.wire.messages import MAX_TENSOR_BYTES, TO_CLIENT, Error, Welcome

logger = logging.getLogger(__name__)

# An endpoint that opens no session in this time is left for the next one, or tried again.
ATTEMPT_SECONDS = 5.0
UNREADABLE_ANSWERS = 2  # may be damage; more mean another protocol
HELLO_AGAIN_SECONDS = 1.0  # an unanswered HELLO is sent again; the daemon recognizes it by its id
DRAINING_RETRY_SECONDS = 0.5
HELLO_RETRY_SECONDS = 0.05
LONGEST_HELLO_RETRY_SECONDS = 1.0
# A WELCOME is matched by its request id alone, so HELLO ids are random: those of two clients differ.
HELLO_REQUESTS = range(2**52, 2**53)


class Opening:
    """Attempt on a fresh socket to the current endpoint, so that messages queued on an old one cannot arrive twice."""

    def __init__(self, shared: Shared, now: float) -> None:
        self.endpoint = shared.endpoints.current
        self._shared = shared
        self._until = now + ATTEMPT_SECONDS
        self._hello_request: int | None = None  # the HELLO that has no answer yet
        self._say_after = 0.0
        self.dealer = Dealer(shared.context, self.endpoint, shared.keys, max_frame_bytes=MAX_TENSOR_BYTES)
        self.sockets: tuple[zmq.Socket[bytes], ...] = (self.dealer.socket, self.dealer.monitor)

    def __repr__(self) -> str:
        said = "" if self._hello_request is None else ", HELLO said"
        return f"Opening({self.endpoint}, {max(0.0, self._until - time.monotonic()):.1f} s left{said})"

    def due(self, now: float) -> Sequence[float]:
        if self._shared.endpoints.is_up:
            return self._until, max(self._say_after, now + HELLO_RETRY_SECONDS)
        return (self._until,)

    def receive(self, readable: Set[object]) -> Event | None:
        while (frames := self.dealer.receive()) is not None:
            self._shared.traffic.received(frames)
            if (event := self._on_frames(frames)) is not None:
                return event
        while (happened := self.dealer.link_event()) is not None:
            if (event := self._on_link_event(happened)) is not None:
                return event
        return None

    def act(self, now: float, readable: Set[object]) -> Event | None:
        if now >= self._until:
            not_yet = self._shared.first.not_yet
            return Failed("" if not_yet is None else str(not_yet))
        if now >= self._say_after:
            self._say_hello(now)
        return None

    def leave(self) -> None:
        self.close()

    def close(self) -> None:
        self.dealer.close(linger_ms=0)

    def _say_hello(self, now: float) -> None:
        request = self._hello_request or secrets.choice(HELLO_REQUESTS)
        resume = self._shared.last.at(self.endpoint)
        changes = {"request": request, "software": zsl.__version__, "resume": resume}
        frames = encode(self._shared.hello.model_copy(update=changes))
        if self.dealer.send(frames):
            self._shared.traffic.sent(frames)
            self._hello_request = request
            self._say_after = now + HELLO_AGAIN_SECONDS

    def _on_link_event(self, happened: LinkEvent) -> Event | None:
        error = self._shared.endpoints.saw(happened)
        if error is not None:
            return Unfit(error)
        if happened in (LinkEvent.UP, LinkEvent.MUTE):
            return None
        self._shared.first.not_yet = None
        return Failed()

    def _on_frames(self, frames: list[Frame]) -> Event | None:
        try:
            header = decode(frames, TO_CLIENT).header
        except WireError as error:
            return self._on_unreadable(error)
        if isinstance(header, Welcome) and header.request == self._hello_request:
            return self._on_welcome(header)
        # Every client numbers its own requests, so a late or misdirected message may have any request id.
        if isinstance(header, Error) and header.session is None and header.request in (None, self._hello_request):
            return self._on_error(header)
        logger.debug("%s sent a %s of another session", self.endpoint, type(header).__name__)
        return None

    def _on_welcome(self, welcome: Welcome) -> Event:
        first = self._shared.first
        if first.is_open:
            try:
                check_same_trunk(first.opened.result(), welcome, self.endpoint)
            except WrongModelError as error:
                return Unfit(error)
        return Welcomed(welcome)

    def _on_unreadable(self, error: WireError) -> Event:
        first = self._shared.first
        if isinstance(error, CorruptError) or first.is_open or first.unreadable < UNREADABLE_ANSWERS:
            first.unreadable += 1
            return Failed(f"it sent something that is not of the protocol ({error})")
        if isinstance(error, ProtocolVersionError):
            return Unfit(ProtocolVersionError(f"the trunk at {self.endpoint}: {error}"))
        return Unfit(
            TrunkUnreachable(
                f"no trunk daemon at {self.endpoint}: what listens there does not speak its protocol ({error})"
            )
        )

    def _on_error(self, header: Error) -> Event | None:
        error = error_of(header, self.endpoint)
        if header.request is not None:
            return self._on_refusal(error, header.retry)
        if isinstance(error, ForbiddenError):
            return Unfit(error)
        if isinstance(error, CorruptError):
            return Failed("a message was damaged on its way")
        logger.debug("%s", error)
        return None

    def _on_refusal(self, error: WireError, retry: Retry) -> Event | None:
        """Schedule another HELLO if the daemon may open a session later; otherwise return the event."""
        self._hello_request = None
        now, loading, first = time.monotonic(), isinstance(error, LoadingError), self._shared.first
        if loading and not first.is_open:
            self._wait_for_loading(now)
        if (loading or retry is Retry.ELSEWHERE) and self._shared.endpoints.others:
            return Failed(str(error))
        if retry is Retry.ELSEWHERE:
            self._say_after = now + DRAINING_RETRY_SECONDS
        elif retry is Retry.SAME:
            first.not_yet = error
            retry_seconds = min(error.retry_after_ms / 1000, LONGEST_HELLO_RETRY_SECONDS)
            self._say_after = now + max(retry_seconds, HELLO_RETRY_SECONDS)
        else:
            return Unfit(error)
        return None

    def _wait_for_loading(self, now: float) -> None:
        """Extend the connect timeout, up to the request timeout, while a daemon is loading its model."""
        shared, first = self._shared, self._shared.first
        if first.loaded_by is None:
            first.loaded_by = now + shared.request_timeout_seconds
            logger.warning(
                "the trunk at %s is still loading its model; waiting for up to %.0f s",
                self.endpoint,
                shared.request_timeout_seconds,
            )
        longest_silence = max(shared.connect_timeout_seconds, ATTEMPT_SECONDS)
        first.open_by = max(first.open_by, min(now + longest_silence, first.loaded_by))


def check_same_trunk(first: Welcome, now: Welcome, endpoint: str) -> None:
    """Check that a daemon serves the same trunk as the first WELCOME. Raises `WrongModelError`."""
    for name in ("model", "cut", "dtype", "forward_only", "packs", "deterministic"):
        before, after = getattr(first, name), getattr(now, name)
        if before != after and (name != "deterministic" or before):
            raise WrongModelError(
                f"the trunk at {endpoint} came back with another {name} than this run began with"
                + (f" ({after}, before {before})" if name != "model" else "")
            )
