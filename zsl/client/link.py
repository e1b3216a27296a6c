"""The driver's side of a connection: the socket, the session, and what becomes of requests when either is lost.

When the connection is lost, the daemon is silent, or it was started anew, a fresh socket is taken, to the same daemon
or the next of the list; the session goes on if it is still there, or a new one is opened; and what was unanswered is
sent again, complete in itself. The new session must be with the same trunk.

For one thread at a time. Knows no torch.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import zmq

import zsl
from zsl.client.carrying import Carrying
from zsl.client.endpoints import LONGEST_PAUSE_SECONDS, Endpoints
from zsl.client.pulse import Progress, Pulse
from zsl.client.reconnects import Reconnects
from zsl.client.requests import Pending, Requests
from zsl.client.traffic import Traffic, TrafficCounter
from zsl.errors import (
    WIRE_ERRORS,
    ConnectionLost,
    CorruptError,
    DeadlineError,
    ForbiddenError,
    InternalError,
    LoadingError,
    ProtocolVersionError,
    RequestTimeout,
    Retry,
    TooLargeError,
    TrunkUnreachable,
    WireError,
    WrongModelError,
    ZslError,
)
from zsl.transport.curve import ClientKeys
from zsl.transport.dealer import Dealer, LinkEvent
from zsl.wire.frames import Frame, decode, encode
from zsl.wire.messages import (
    MAX_TENSOR_BYTES,
    TO_CLIENT,
    Bye,
    Cancel,
    Error,
    GoAway,
    Header,
    Hello,
    InSession,
    Pong,
    Release,
    Status,
    Welcome,
)

logger = logging.getLogger(__name__)

# An endpoint that does not open a session in this time is given up: for the next, or for another try.
ATTEMPT_SECONDS = 5.0
UNREADABLE_ANSWERS = 2  # may be damage; more are not
HELLO_AGAIN_SECONDS = 1.0  # a HELLO that has no answer is said again; the daemon knows it by its id
DRAINING_RETRY_SECONDS = 0.5
MAX_RELEASED = 1024  # steps of which a session that goes on is told again that they are released
HELLO_RETRY_SECONDS = 0.05
LONGEST_HELLO_RETRY_SECONDS = 1.0
# A WELCOME is known by its request alone: ids of HELLO are drawn from here, where no two clients have the same.
HELLO_REQUESTS = range(2**52, 2**53)


class Link:
    """`connect`, then `wait` and `turn` until `close`. `opened` gets the first WELCOME."""

    def __init__(
        self,
        endpoints: tuple[str, ...],
        hello: Hello,
        *,
        keys: ClientKeys | None,
        opened: Future[Welcome],
        new_request_id: Callable[[], int],
        connect_timeout_seconds: float,
        request_timeout_seconds: float,
    ) -> None:
        # Several tries within the time of the shortest request.
        pause_seconds = min(LONGEST_PAUSE_SECONDS, request_timeout_seconds / 4)
        self._endpoints = Endpoints(endpoints, longest_pause_seconds=pause_seconds)
        self._hello = hello
        self._keys = keys
        self._opened = opened
        self._new_request_id = new_request_id
        self._connect_timeout_seconds = connect_timeout_seconds
        self._request_timeout_seconds = request_timeout_seconds
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._requests = Requests()
        self._traffic = TrafficCounter()
        self._open_by = time.monotonic() + connect_timeout_seconds
        self._loaded_by: float | None = None  # when a daemon that is loading must be done
        self._not_yet: ZslError | None = None  # why a daemon that answers opens no session
        self._unreadable = 0  # answers, before the first session
        self._poller: zmq.Poller | None = None
        # An attempt: a socket, which is None between two of them.
        self._dealer: Dealer | None = None
        self._attempt_until = 0.0
        self._hello_request: int | None = None  # the HELLO that has no answer yet
        self._hello_not_before = 0.0
        # The session that is open, and the last one that was, with its endpoint.
        self._welcome: Welcome | None = None
        self._pulse: Pulse | None = None
        self._carrying: Carrying | None = None
        self._progress = Progress("")
        self._reconnects = Reconnects()
        # Endpoints whose connections reach several daemons; there a session has one, for its pings too.
        self._balanced: set[str] = set()
        self._heard = False  # anything, in the session that is open
        self._last_session: tuple[str, bytes] | None = None
        self._released: deque[int] = deque(maxlen=MAX_RELEASED)  # its steps, said or not
        self._leaves = False  # the daemon takes no forwards any more, and there are others

    def connect(self) -> None:
        """Take a fresh socket: nothing that is queued on an old one can arrive twice."""
        self._drop_sockets()
        self._dealer = Dealer(self._context, self._endpoints.current, self._keys, max_frame_bytes=MAX_TENSOR_BYTES)
        self._attempt_until = time.monotonic() + ATTEMPT_SECONDS
        self._hello_request = None
        self._hello_not_before = 0.0

    @property
    def traffic(self) -> Traffic:
        """What went over the link so far."""
        return self._traffic.so_far(self._requests.replays)

    @property
    def busy(self) -> bool:
        """Whether something is to come: an answer, or the session itself."""
        return self._welcome is None or len(self._requests) > 0

    def add(self, pending: Pending) -> None:
        """Take a request in charge."""
        self._requests.add(pending)

    def release(self, step: int, session: bytes) -> None:
        """Say RELEASE, if the session that holds the step is still the open one, or may go on."""
        if self._last_session is not None and self._last_session[1] == session:
            self._released.append(step)
            if self._welcome is not None:
                self._say(Release(session=session, epoch=self._welcome.epoch, step=step))

    def wait(self, wake: int) -> None:
        """Sleep until something arrives, the file descriptor `wake` is readable, or a timer is due."""
        if self._poller is None:
            poller = zmq.Poller()
            poller.register(wake, zmq.POLLIN)
            readables = () if self._dealer is None else (self._dealer.socket, self._dealer.monitor)
            for readable in (*readables, *(() if self._pulse is None else self._pulse.sockets)):
                poller.register(readable, zmq.POLLIN)
            self._poller = poller  # when it is whole: Ctrl-C may come before
        self._poller.poll(max(0, math.ceil(self._seconds_to_next_timer() * 1000)))

    def turn(self) -> None:
        """Handle what has arrived and what is due, and send what can go.

        Raises `ZslError` when the connection cannot go on.
        """
        dealer = self._dealer
        if dealer is not None:
            while self._dealer is dealer and (frames := dealer.receive()) is not None:
                self._traffic.received(frames)
                self._on_frames(frames)
            while self._dealer is dealer and (event := dealer.link_event()) is not None:
                self._on_link_event(event)
        now = time.monotonic()
        self._check_deadlines(now)
        if self._welcome is not None:
            self._check_session(now)
        else:
            self._check_attempt(now)
        if self._welcome is not None:
            self._send_waiting(now, self._welcome)
        elif self._dealer is not None:
            self._say_hello(now)

    def start_over(self) -> None:
        """Take a fresh socket and send again what has no answer: after a `turn` that Ctrl-C ended anywhere."""
        logger.warning("%s: interrupted; connecting again", self._endpoints.current)
        self._welcome = None
        self._leaves = False
        self._requests.start_over()
        self.connect()

    def close(self, error: ZslError, *, say_bye: bool = True) -> None:
        """Say BYE, fail with `error` what has no answer, and free the sockets."""
        if not self._opened.done():
            self._opened.set_exception(error)
        self._requests.fail_all(error)
        if say_bye:  # else a message may be half sent
            self._leave_session()
            if self._dealer is not None:
                self._dealer.close()
                self._dealer = None
        self._drop_sockets()
        self._context.destroy()  # also sockets of a step that was interrupted, which nobody else knows of

    # --- the connection ----------------------------------------------------------------------------------------

    def _drop_sockets(self) -> None:
        if self._dealer is not None:
            self._dealer.close(linger_ms=0)
        if self._pulse is not None:
            self._pulse.close()
        self._dealer = self._pulse = self._carrying = self._poller = None

    def _lost(self, why: str) -> None:
        """The open session's connection is of no use any more: connect again, and send again what was unanswered."""
        said = self._reconnects.lost(why, time.monotonic())
        if said is not None:
            logger.warning(
                "%s: %s; connecting again (a request waits for up to %.0f s)",
                self._endpoints.current,
                said,
                self._request_timeout_seconds,
            )
        self._end_session()
        if not self._heard:
            self._attempt_failed(why)  # a session by which nothing ever comes is no better than none
            return
        now = time.monotonic()
        self._endpoints.lost(now)
        if self._endpoints.not_before <= now:
            self.connect()
        else:
            self._drop_sockets()

    def _end_session(self) -> None:
        self._welcome = None
        self._leaves = False
        self._requests.all_again()

    def _leave_session(self) -> None:
        if self._welcome is not None:
            self._say(Bye(session=self._welcome.session, epoch=self._welcome.epoch))

    def _attempt_failed(self, why: str = "") -> None:
        """The present attempt came to nothing; another one follows, after a pause."""
        self._drop_sockets()
        endpoint, now = self._endpoints.current, time.monotonic()
        if self._opened.done():
            said = self._reconnects.failed(why or self._endpoints.reason(endpoint), now)
            if said is not None:
                logger.warning("%s: %s; trying on", endpoint, said)
        self._endpoints.failed(now)

    def _never_again(self, error: ZslError) -> None:
        """This endpoint will not do. Raises the error if there is no other."""
        endpoint = self._endpoints.current
        self._endpoints.strike_out(error)
        logger.warning("%s is left out from now on: %s", endpoint, error)
        if self._welcome is not None:
            self._end_session()
        self.connect()

    def _on_link_event(self, event: LinkEvent) -> None:
        if self._welcome is not None:
            if event not in (LinkEvent.UP, LinkEvent.MUTE):
                self._lost("the connection was lost")
            return
        error = self._endpoints.saw(event)
        if error is not None:
            self._never_again(error)
        elif event not in (LinkEvent.UP, LinkEvent.MUTE):
            self._not_yet = None
            self._attempt_failed()

    def _check_attempt(self, now: float) -> None:
        """Keep trying to get a session; once there was one, only requests' deadlines end that."""
        if not self._opened.done() and now >= self._open_by:
            raise self._not_yet or self._endpoints.unreachable(self._connect_timeout_seconds)
        if self._dealer is None:
            if now >= self._endpoints.not_before:
                self.connect()
        elif now >= self._attempt_until:
            self._attempt_failed("" if self._not_yet is None else str(self._not_yet))

    # --- the session -------------------------------------------------------------------------------------------

    def _say_hello(self, now: float) -> None:
        if now < self._hello_not_before:
            return
        request = self._hello_request or secrets.choice(HELLO_REQUESTS)
        endpoint, session = self._last_session or ("", b"")
        resume = session if endpoint == self._endpoints.current else None
        changes = {"request": request, "software": zsl.__version__, "resume": resume}
        if self._say(self._hello.model_copy(update=changes)):
            self._hello_request = request
            self._hello_not_before = now + HELLO_AGAIN_SECONDS

    def _on_welcome(self, welcome: Welcome) -> None:
        endpoint, now = self._endpoints.current, time.monotonic()
        self._hello_request = None
        if self._opened.done():
            try:
                check_same_trunk(self._opened.result(), welcome, endpoint)
            except WrongModelError as error:
                self._never_again(error)
                return
        else:
            self._opened.set_result(welcome)
        self._endpoints.opened(now)
        self._not_yet = None
        self._welcome = welcome
        self._say_released_again(welcome)
        self._last_session = endpoint, welcome.session
        self._carrying = Carrying(welcome, now)
        self._heard = False
        if self._reconnects.opened():
            logger.warning("the trunk at %s answers", endpoint)
        self._progress = Progress(endpoint)
        if endpoint not in self._balanced:
            self._pulse = Pulse(
                self._context,
                endpoint,
                self._keys,
                welcome,
                progress=self._progress,
                new_request_id=self._new_request_id,
                now=now,
            )
        self._poller = None

    def _say_released_again(self, welcome: Welcome) -> None:
        """What was said on a connection that broke may not have arrived, and between two nothing could be said."""
        if self._last_session is None or self._last_session[1] != welcome.session:
            self._released.clear()
        for step in self._released:
            self._say(Release(session=welcome.session, epoch=welcome.epoch, step=step))

    def _check_session(self, now: float) -> None:
        """See to it that the daemon lives and the connection carries; both show by pings."""
        assert self._carrying is not None
        if self._pulse is not None:
            self._pulse.turn(now)
            if self._pulse.reaches_another:
                self._give_up_pulse(now)
        pulse, under_way = self._pulse, self._requests.under_way
        if not under_way and pulse is not None:
            self._carrying.heard()
        if pulse is not None and pulse.silent:
            self._lost(f"silent for {pulse.silent_seconds:.0f} s")
        elif pulse is not None and pulse.session_is_gone:
            self._lost("the session is not known there any more")
        elif self._carrying.is_broken(self._requests.under_way_bytes):
            self._lost("the connection carries nothing")
        elif (under_way or pulse is None) and now >= self._carrying.next_ping:
            self._say(self._carrying.ping(self._new_request_id(), under_way, now))
        elif self._leaves and not under_way:
            self._go_elsewhere(now)

    def _give_up_pulse(self, now: float) -> None:
        """Ping on the session's own connection only: the other one leads to another life of a daemon.

        If this one is answered too, something between balances connections over daemons; if not, the daemon was lost.
        """
        assert self._pulse is not None and self._carrying is not None
        self._pulse.close()
        self._pulse = self._poller = None
        self._carrying.heard()
        self._carrying.next_ping = now

    def _go_elsewhere(self, now: float) -> None:
        """The daemon is shutting down, and what was asked of it is answered."""
        self._leave_session()
        if self._dealer is not None:
            self._dealer.close()  # with time for that to leave
            self._dealer = None
        self._end_session()
        self._endpoints.leave(now)
        logger.warning("going on with the trunk at %s", self._endpoints.current)
        self.connect()

    # --- requests ----------------------------------------------------------------------------------------------

    def _say(self, header: Header) -> bool:
        return self._dealer is not None and self._put(self._dealer, encode(header))

    def _put(self, dealer: Dealer, frames: list[Frame]) -> bool:
        sent = dealer.send(frames)
        if sent:
            self._traffic.sent(frames)
        return sent

    def _send_waiting(self, now: float, welcome: Welcome) -> None:
        while (pending := self._requests.take_next(welcome.limits, welcome.epoch, now)) is not None:
            if not self._send(pending, welcome):
                self._lost("the connection was lost")  # this request and the others are sent again
                return

    def _send(self, pending: Pending, welcome: Welcome) -> bool:
        """Build and send; a request that cannot be built fails. False if there is no connection."""
        assert self._dealer is not None
        try:
            header, buffers = pending.build(welcome, pending)
            pending.in_session = isinstance(header, InSession)
            largest = max((len(buffer) for buffer in buffers), default=0)
            if largest > welcome.limits.max_message_bytes:
                raise TooLargeError(
                    f"a tensor of {largest} bytes is over the {welcome.limits.max_message_bytes} that "
                    f"{self._endpoints.current} takes; use a smaller batch"
                )
            frames = encode(header, buffers)
            pending.nbytes = sum(len(buffer) for buffer in buffers)
        except Exception as error:
            self._requests.ended(pending.request)
            pending.fail(error)
            return True
        return self._put(self._dealer, frames)

    def _on_frames(self, frames: list[Frame]) -> None:
        try:
            message = decode(frames, TO_CLIENT)
        except WireError as error:
            self._on_unreadable(error)
            return
        header = message.header
        if not self._is_meant_for_this(header):
            logger.debug("%s sent a %s of another session", self._endpoints.current, type(header).__name__)
            return
        if self._carrying is not None:
            self._carrying.heard()
            if self._pulse is not None:
                self._pulse.heard()
            self._heard = True
        if isinstance(header, Welcome):
            self._on_welcome(header)
        elif isinstance(header, Error):
            self._on_error(header)
        elif isinstance(header, GoAway):
            logger.warning(
                "the trunk at %s is shutting down; steps that are open there may end within %.0f s",
                self._endpoints.current,
                header.drain_ms / 1000,
            )
        elif isinstance(header, Pong):
            self._on_pong(header)
        elif self._welcome is not None:
            pending = self._requests.ended(getattr(header, "request", None))
            if pending is not None:  # otherwise a late answer to something given up
                self._endpoints.answered()
                self._traffic.answered(header)
                pending.future.set_result(message)

    def _is_meant_for_this(self, header: Header) -> bool:
        """Check that a message names the session that is open, or answers what this end asked outside of one.

        Requests are numbered anew by every client, so what is late, or meant for another one, may have any number.
        """
        if isinstance(header, Welcome):
            return header.request == self._hello_request
        if isinstance(header, Error) and header.session is None:
            asked = (None, self._hello_request)  # None: what it answers could not be read
            return header.request in asked or self._requests.names_no_session(header.request)
        if isinstance(header, Status):
            return self._requests.names_no_session(header.request)
        return self._welcome is not None and getattr(header, "session", None) == self._welcome.session

    def _on_pong(self, header: Pong) -> None:
        """Whether the daemon has all that this end waits for an answer to."""
        self._progress.heard(header)
        endpoint = self._endpoints.current
        if self._pulse is None and endpoint not in self._balanced:
            self._balanced.add(endpoint)
            logger.warning(
                "%s: another connection to it reaches another daemon, so something between balances connections over "
                "several; each session has one connection there from now on, and its pings queue behind its tensors",
                endpoint,
            )
        if self._carrying is not None and self._carrying.has_lost(header, self._requests.under_way):
            self._lost("a message was lost on its way")

    def _on_unreadable(self, error: WireError) -> None:
        """An answer that cannot be read: which one it was is not known, so all are asked again."""
        if self._welcome is not None:
            self._lost(f"sent something that is not of the protocol ({error})")
        elif isinstance(error, CorruptError) or self._opened.done() or self._unreadable < UNREADABLE_ANSWERS:
            self._unreadable += 1
            self._attempt_failed(f"it sent something that is not of the protocol ({error})")
        elif isinstance(error, ProtocolVersionError):
            self._never_again(ProtocolVersionError(f"the trunk at {self._endpoints.current}: {error}"))
        else:
            self._never_again(
                TrunkUnreachable(
                    f"no trunk daemon at {self._endpoints.current}: what listens there does not speak its protocol "
                    f"({error})"
                )
            )

    def _on_error(self, header: Error) -> None:
        error = WIRE_ERRORS.get(header.code, InternalError)(
            f"{header.text} [trunk {self._endpoints.current}]", retry_after_ms=header.retry_after_ms
        )
        if header.request is not None and header.request == self._hello_request:
            self._on_hello_refused(error, header.retry)
            return
        if self._welcome is not None and header.epoch != self._welcome.epoch and header.retry is not Retry.REHELLO:
            return  # an echo from an earlier life
        if isinstance(error, ForbiddenError):
            self._never_again(error)  # what it was about is sent to the next, or fails with the others
            return
        pending = self._requests.ended(header.request)
        now = time.monotonic()
        if isinstance(error, CorruptError):
            self._on_damaged_request(pending, error)
        elif header.retry is Retry.REHELLO:
            if pending is not None:
                self._requests.refused(pending, error)
            if self._welcome is not None:
                self._lost("the session is not known there any more")
        elif pending is None:
            logger.debug("%s", error)  # an echo of something given up
        elif isinstance(error, DeadlineError):
            pending.fail(self._timeout())  # the daemon noticed first
        elif header.retry is Retry.REPLAY:
            self._requests.refused(pending, error)
        elif header.retry is Retry.SAME:
            self._requests.later(pending, now + header.retry_after_ms / 1000, now)
        elif header.retry is Retry.ELSEWHERE:
            self._requests.later(pending, now + DRAINING_RETRY_SECONDS, now)
            self._leaves = self._endpoints.others
        else:
            pending.fail(error)

    def _on_damaged_request(self, pending: Pending | None, error: CorruptError) -> None:
        """Something that this end sent was damaged on its way; which it was is not known."""
        if pending is not None:
            self._requests.refused(pending, error)
        if self._welcome is not None:
            self._lost("a message was damaged on its way")
        elif self._dealer is not None:
            self._attempt_failed("a message was damaged on its way")

    def _on_hello_refused(self, error: WireError, retry: Retry) -> None:
        self._hello_request = None
        now = time.monotonic()
        if isinstance(error, LoadingError) and not self._opened.done():
            self._wait_for_loading(now)
        if (retry is Retry.ELSEWHERE or isinstance(error, LoadingError)) and self._endpoints.others:
            self._attempt_failed(str(error))
        elif retry is Retry.ELSEWHERE:
            self._hello_not_before = now + DRAINING_RETRY_SECONDS
        elif retry is Retry.SAME:
            self._not_yet = error
            retry_seconds = min(error.retry_after_ms / 1000, LONGEST_HELLO_RETRY_SECONDS)
            self._hello_not_before = now + max(retry_seconds, HELLO_RETRY_SECONDS)
        else:
            self._never_again(error)

    def _wait_for_loading(self, now: float) -> None:
        """Give a daemon that says it is loading as long as a request may take: the connect timeout is for silence."""
        if self._loaded_by is None:
            self._loaded_by = now + self._request_timeout_seconds
            logger.warning(
                "the trunk at %s is still loading its model; waiting for up to %.0f s",
                self._endpoints.current,
                self._request_timeout_seconds,
            )
        longest_silence = max(self._connect_timeout_seconds, ATTEMPT_SECONDS)
        self._open_by = max(self._open_by, min(now + longest_silence, self._loaded_by))

    # --- time --------------------------------------------------------------------------------------------------

    def _seconds_to_next_timer(self) -> float:
        now = time.monotonic()
        times = self._requests.times(now)
        if self._carrying is not None:
            if self._pulse is not None:
                times.append(self._pulse.next_ping)
            if self._requests.under_way or self._pulse is None:
                times.append(self._carrying.next_ping)
        elif self._dealer is None:
            times.append(self._endpoints.not_before)
        else:
            times.append(self._attempt_until)
            if self._endpoints.is_up:
                times.append(max(self._hello_not_before, now + HELLO_RETRY_SECONDS))
        if not self._opened.done():
            times.append(self._open_by)
        return min(times) - now

    def _check_deadlines(self, now: float) -> None:
        for pending, sent in self._requests.expired(now):
            if sent and self._welcome is not None:
                session, epoch = self._welcome.session, self._welcome.epoch
                self._say(Cancel(session=session, epoch=epoch, request=pending.request))
            pending.fail(self._timeout())

    def _timeout(self) -> ZslError:
        endpoint, seconds = self._endpoints.current, f"{self._request_timeout_seconds:g} s"
        if self._welcome is None:
            return ConnectionLost(f"the connection to {endpoint} was lost and did not come back in {seconds}")
        busy = f" (it has been at one pass for {self._progress.pass_seconds:.0f} s)"
        return RequestTimeout(
            f"{endpoint} did not answer within {seconds}{busy}; "
            "is the daemon overloaded or shutting down, or the request too large for it?"
        )


def check_same_trunk(first: Welcome, now: Welcome, endpoint: str) -> None:
    """Raises `WrongModelError` if a daemon serves another trunk than the run began with."""
    for name in ("model", "cut", "dtype", "forward_only", "packs", "deterministic"):
        before, after = getattr(first, name), getattr(now, name)
        if before != after and (name != "deterministic" or before):
            raise WrongModelError(
                f"the trunk at {endpoint} came back with another {name} than this run began with"
                + (f" ({after}, before {before})" if name != "model" else "")
            )
