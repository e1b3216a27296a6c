"""The driver's side of a connection: the socket, the session, and the requests that wait for an answer.

Every request has a deadline, and ends with its answer or a typed error. When the connection is lost, or the daemon
was started anew, a fresh socket is taken, a new session opened, and what was unanswered is sent once more, complete
in itself: the trunk is a pure function, so the answer is the same. The new session must be with the same trunk.

For one thread at a time. Knows no torch.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import zmq

import zsl
from zsl.errors import (
    WIRE_ERRORS,
    ConnectionLost,
    DeadlineError,
    InternalError,
    RequestTimeout,
    Retry,
    TooLargeError,
    TrunkUnreachable,
    WireError,
    WrongModelError,
    ZslError,
)
from zsl.transport.dealer import Dealer, LinkEvent
from zsl.wire.frames import Frame, Message, decode, encode
from zsl.wire.messages import (
    TO_CLIENT,
    Bye,
    Cancel,
    Error,
    GoAway,
    Header,
    Hello,
    Ping,
    Pong,
    Release,
    Welcome,
)

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 2  # a request is sent, and replayed once
# A daemon that is silent for so long is taken for dead. A sign of life queues behind large messages on a slow line.
SILENT_SECONDS = 120.0
DRAINING_RETRY_SECONDS = 0.5
HELLO_RETRY_SECONDS = 0.05

Build = Callable[["Welcome", "Pending"], tuple[Header, Sequence[Frame]]]


@dataclass(slots=True)
class Pending:
    """A request without an answer. `build` makes its message for the session that is open when it is sent."""

    request: int
    build: Build
    deadline: float
    nbytes: int
    future: Future[Message] = field(default_factory=Future)
    attempt: int = 0
    complete: bool = False  # send along everything that the request needs
    not_before: float = 0.0

    def budget_ms(self) -> int:
        return max(1, round((self.deadline - time.monotonic()) * 1000))


class Link:
    """`connect`, then `wait` and `turn` until `close`. `opened` gets the first WELCOME."""

    def __init__(
        self,
        endpoint: str,
        hello: Hello,
        *,
        opened: Future[Welcome],
        new_request_id: Callable[[], int],
        connect_timeout_seconds: float,
        request_timeout_seconds: float,
    ) -> None:
        self._endpoint = endpoint
        self._hello = hello
        self._opened = opened
        self._new_request_id = new_request_id
        self._connect_timeout_seconds = connect_timeout_seconds
        self._request_timeout_seconds = request_timeout_seconds
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealer: Dealer | None = None
        self._poller: zmq.Poller | None = None
        self._last_event: LinkEvent | None = None
        self._welcome: Welcome | None = None
        self._hello_request: int | None = None  # the HELLO that has no answer yet
        self._hello_not_before = 0.0
        self._hello_deadline = time.monotonic() + connect_timeout_seconds
        self._waiting: deque[Pending] = deque()
        self._sent: dict[int, Pending] = {}
        self._last_heard = self._last_ping = 0.0

    def connect(self) -> None:
        """Take a fresh socket: nothing that is queued on an old one can arrive twice."""
        if self._dealer is not None:
            self._dealer.close(linger_ms=0)
            self._dealer = None
        self._dealer = Dealer(self._context, self._endpoint)
        self._poller = None
        self._last_event = None
        self._begin_hello()

    @property
    def busy(self) -> bool:
        """Whether something is to come: an answer, or the session itself."""
        return self._welcome is None or bool(self._sent) or bool(self._waiting)

    def add(self, pending: Pending) -> None:
        """Take a request in charge."""
        self._waiting.append(pending)

    def release(self, step: int, session: bytes) -> None:
        """Say RELEASE, if the session that holds the step is still the open one."""
        if self._welcome is not None and self._welcome.session == session:
            self._say(Release(session=session, epoch=self._welcome.epoch, step=step))

    def wait(self, wake: int) -> None:
        """Sleep until something arrives, the file descriptor `wake` is readable, or a timer is due."""
        assert self._dealer is not None
        if self._poller is None:
            self._poller = zmq.Poller()
            for readable in (self._dealer.socket, self._dealer.monitor, wake):
                self._poller.register(readable, zmq.POLLIN)
        self._poller.poll(max(0, math.ceil(self._seconds_to_next_timer() * 1000)))

    def turn(self) -> None:
        """Handle what has arrived and what is due, and send what can go.

        Raises `ZslError` when the connection cannot go on.
        """
        dealer = self._dealer
        assert dealer is not None
        while self._dealer is dealer and (frames := dealer.receive()) is not None:
            self._on_frames(frames)
        while self._dealer is dealer and (event := dealer.link_event()) is not None:
            self._on_link_event(event)
        self._check_deadlines()
        self._check_connection()
        if self._welcome is None:
            self._say_hello()
        else:
            self._send_waiting()

    def close(self, error: ZslError) -> None:
        """Say BYE, fail with `error` what has no answer, and free the socket."""
        if not self._opened.done():
            self._opened.set_exception(error)
        for pending in (*self._sent.values(), *self._waiting):
            _fail(pending, error)
        if self._dealer is not None:
            if self._welcome is not None:
                self._say(Bye(session=self._welcome.session, epoch=self._welcome.epoch))
            self._dealer.close()
        self._context.term()

    # --- what goes out -----------------------------------------------------------------------------------------

    def _begin_hello(self) -> None:
        """No session is open; what was sent in the last one is to be sent again."""
        if self._welcome is not None:
            self._hello_deadline = time.monotonic() + self._connect_timeout_seconds
        self._welcome = None
        self._hello_request = None
        lost = ConnectionLost(f"the connection to {self._endpoint} was lost twice in one request")
        in_order = sorted(self._sent.values(), key=lambda pending: pending.request)
        self._sent.clear()
        for pending in reversed(in_order):
            self._replay(pending, lost)

    def _say_hello(self) -> None:
        if self._hello_request is not None or time.monotonic() < self._hello_not_before:
            return
        request = self._new_request_id()
        if self._say(self._hello.model_copy(update={"request": request, "software": zsl.__version__})):
            self._hello_request = request

    def _say(self, header: Header) -> bool:
        return self._dealer is not None and self._dealer.send(encode(header))

    def _replay(self, pending: Pending, error: ZslError) -> None:
        """Put a request in front of the queue again, complete; or fail it if it was replayed before."""
        pending.attempt += 1
        pending.complete = True
        if pending.attempt >= MAX_ATTEMPTS:
            _fail(pending, error)
        else:
            self._waiting.appendleft(pending)

    def _later(self, pending: Pending, seconds: float) -> None:
        """Send a request again after a while."""
        pending.not_before = time.monotonic() + seconds
        self._waiting.append(pending)

    def _send_waiting(self) -> None:
        """Send what may go: within the credit that the daemon has granted, and not before its time."""
        assert self._welcome is not None
        limits = self._welcome.limits
        now = time.monotonic()
        inflight_bytes = sum(pending.nbytes for pending in self._sent.values())
        for pending in list(self._waiting):
            if len(self._sent) >= limits.max_inflight_requests:
                return
            if pending.not_before > now or (self._sent and inflight_bytes + pending.nbytes > limits.max_inflight_bytes):
                continue
            self._waiting.remove(pending)
            if not pending.future.running() and not pending.future.set_running_or_notify_cancel():
                continue
            self._sent[pending.request] = pending
            inflight_bytes += pending.nbytes
            if not self._send(pending, self._welcome):
                self.connect()  # the connection has just gone; this request and the others are replayed
                return

    def _send(self, pending: Pending, welcome: Welcome) -> bool:
        """Build and send; a request that cannot be built fails. False if there is no connection."""
        assert self._dealer is not None
        try:
            header, buffers = pending.build(welcome, pending)
            largest = max((len(buffer) for buffer in buffers), default=0)
            if largest > welcome.limits.max_message_bytes:
                raise TooLargeError(
                    f"a tensor of {largest} bytes is over the {welcome.limits.max_message_bytes} that "
                    f"{self._endpoint} takes; use a smaller batch"
                )
            frames = encode(header, buffers)
        except Exception as error:
            del self._sent[pending.request]
            _fail(pending, error)
            return True
        return self._dealer.send(frames)

    # --- what comes in -----------------------------------------------------------------------------------------

    def _on_frames(self, frames: list[Frame]) -> None:
        self._last_heard = time.monotonic()
        try:
            message = decode(frames, TO_CLIENT)
        except WireError as error:
            if not self._opened.done():
                raise TrunkUnreachable(
                    f"no trunk daemon at {self._endpoint}: what listens there does not speak its protocol ({error})"
                ) from error
            logger.warning("%s sent a message that is not of the protocol: %s", self._endpoint, error)
            return
        header = message.header
        if isinstance(header, Welcome):
            if header.request == self._hello_request:
                self._on_welcome(header)
        elif isinstance(header, Error):
            self._on_error(header)
        elif isinstance(header, GoAway):
            logger.warning("the trunk at %s is shutting down; waiting for it to come back", self._endpoint)
        elif not isinstance(header, Pong):
            pending = self._sent.pop(getattr(header, "request", -1), None)
            if pending is not None:  # otherwise a late answer to something given up
                pending.future.set_result(message)

    def _on_welcome(self, welcome: Welcome) -> None:
        if self._opened.done():
            check_same_trunk(self._opened.result(), welcome, self._endpoint)
        else:
            self._opened.set_result(welcome)
        self._welcome = welcome
        self._hello_request = None
        self._last_ping = self._last_heard

    def _on_error(self, header: Error) -> None:
        error = WIRE_ERRORS.get(header.code, InternalError)(
            f"{header.text} [trunk {self._endpoint}]", retry_after_ms=header.retry_after_ms
        )
        if header.request is not None and header.request == self._hello_request:
            if header.retry is not Retry.ELSEWHERE:
                raise error
            self._hello_request = None
            self._hello_not_before = time.monotonic() + DRAINING_RETRY_SECONDS
            return
        pending = self._sent.pop(header.request, None) if header.request is not None else None
        if header.retry is Retry.REHELLO:
            if pending is not None:
                self._replay(pending, error)
            if self._welcome is not None:
                self._begin_hello()
        elif pending is None:
            logger.warning("%s", error)
        elif isinstance(error, DeadlineError):
            _fail(pending, self._timeout())  # the daemon noticed first
        elif header.retry is Retry.REPLAY:
            self._replay(pending, error)
        elif header.retry is Retry.SAME:
            self._later(pending, header.retry_after_ms / 1000)
        elif header.retry is Retry.ELSEWHERE:
            self._later(pending, DRAINING_RETRY_SECONDS)
        else:
            _fail(pending, error)

    def _on_link_event(self, event: LinkEvent) -> None:
        self._last_event = event
        if event is LinkEvent.LOST and (self._welcome is not None or self._hello_request is not None):
            logger.warning(
                "the connection to %s was lost; connecting again (a request waits for up to %.0f s)",
                self._endpoint,
                self._request_timeout_seconds,
            )
            self.connect()

    # --- time --------------------------------------------------------------------------------------------------

    def _seconds_to_next_timer(self) -> float:
        now = time.monotonic()
        times = [pending.deadline for pending in (*self._sent.values(), *self._waiting)]
        times += [pending.not_before for pending in self._waiting if pending.not_before > now]
        if self._welcome is not None:
            times.append(self._last_ping + self._welcome.limits.ping_ms / 1000)
        else:
            times.append(self._hello_deadline)
            if self._hello_request is None and self._last_event is LinkEvent.UP:
                times.append(max(self._hello_not_before, now + HELLO_RETRY_SECONDS))
        return min(times) - now

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        for pending in [pending for pending in self._sent.values() if pending.deadline <= now]:
            del self._sent[pending.request]
            if self._welcome is not None:
                session, epoch = self._welcome.session, self._welcome.epoch
                self._say(Cancel(session=session, epoch=epoch, request=pending.request))
            _fail(pending, self._timeout())
        for pending in [pending for pending in self._waiting if pending.deadline <= now]:
            self._waiting.remove(pending)
            _fail(pending, self._timeout())

    def _check_connection(self) -> None:
        """Keep the session alive, or keep trying to get one; once there was one, only requests' deadlines end that."""
        now = time.monotonic()
        if self._welcome is None:
            if now < self._hello_deadline:
                return
            if not self._opened.done():
                raise self._unreachable()
            self._hello_deadline = now + self._connect_timeout_seconds
            self.connect()
        elif now - self._last_heard > SILENT_SECONDS:
            logger.warning("%s has been silent for %.0f s; connecting again", self._endpoint, now - self._last_heard)
            self.connect()
        elif now - self._last_ping >= self._welcome.limits.ping_ms / 1000:
            self._last_ping = now
            session, epoch = self._welcome.session, self._welcome.epoch
            self._say(Ping(session=session, epoch=epoch, request=self._new_request_id()))

    def _timeout(self) -> ZslError:
        seconds = f"{self._request_timeout_seconds:g} s"
        if self._welcome is None:
            return ConnectionLost(f"the connection to {self._endpoint} was lost and did not come back in {seconds}")
        return RequestTimeout(
            f"{self._endpoint} did not answer within {seconds}; "
            "is the daemon overloaded or shutting down, or the request too large for it?"
        )

    def _unreachable(self) -> TrunkUnreachable:
        reasons = {
            None: "it cannot be reached",
            LinkEvent.REFUSED: "nothing listens there",
            LinkEvent.MUTE: "something listens there that does not answer as a trunk daemon",
            LinkEvent.UP: "something listens there that does not answer as a trunk daemon, or is still loading",
            LinkEvent.LOST: "the connection broke",
        }
        return TrunkUnreachable(
            f"no trunk daemon at {self._endpoint}: {reasons[self._last_event]} "
            f"(tried for {self._connect_timeout_seconds:g} s); start one with zsl-trunkd, or check host and port"
        )


def check_same_trunk(first: Welcome, now: Welcome, endpoint: str) -> None:
    """Raises `WrongModelError` if a daemon that came back serves another trunk than the run began with."""
    for name in ("model", "cut", "dtype", "forward_only"):
        before, after = getattr(first, name), getattr(now, name)
        if before != after:
            raise WrongModelError(
                f"the trunk at {endpoint} came back with another {name} than this run began with"
                + (f" ({after}, before {before})" if name != "model" else "")
            )


def _fail(pending: Pending, error: BaseException) -> None:
    if not pending.future.running() and not pending.future.set_running_or_notify_cancel():
        return
    if not pending.future.done():
        pending.future.set_exception(error)
