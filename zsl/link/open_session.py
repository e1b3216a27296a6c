"""State of a link with an open session: send requests, receive answers, check by pings."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence, Set

import zmq

from zsl.errors import (
    CorruptError,
    DeadlineError,
    ForbiddenError,
    RequestTimeout,
    Retry,
    TooLargeError,
    UnknownAdapterError,
    WireError,
)
from zsl.link.heartbeat import Heartbeat, Progress
from zsl.link.lost_message_check import LostMessageCheck
from zsl.link.opening import DRAINING_RETRY_SECONDS
from zsl.link.states import Event, Left, Lost, Shared, Unfit, error_of
from zsl.link.unanswered_requests import Pending
from zsl.transport.dealer import Dealer, LinkEvent
from zsl.wire.frames import Frame, Message, decode, encode
from zsl.wire.messages import (
    TO_CLIENT,
    Bye,
    Cancel,
    Error,
    GoAway,
    Header,
    InSession,
    Pong,
    Release,
    Result,
    Status,
    Welcome,
)

logger = logging.getLogger(__name__)


class Open:
    """Open session, on the socket that received its `welcome`.

    `heard`: a message has come in this session. The loss of a session without one counts as a failed attempt.
    """

    def __init__(self, shared: Shared, dealer: Dealer, welcome: Welcome, now: float) -> None:
        self.endpoint = shared.endpoints.current
        self.welcome = welcome
        self.heard = False
        self._shared = shared
        self._dealer = dealer
        self._leaving = False  # the daemon accepts no more forwards, and other endpoints exist
        self._goes_away = False  # a GOAWAY has come
        self._progress = Progress(self.endpoint)
        self._path = LostMessageCheck(welcome, now)
        self._heartbeat: Heartbeat | None = None
        if self.endpoint not in shared.balanced:
            self._heartbeat = Heartbeat(
                shared.context,
                self.endpoint,
                shared.keys,
                welcome,
                progress=self._progress,
                new_request_id=shared.new_request_id,
                now=now,
            )
        own = () if self._heartbeat is None else self._heartbeat.sockets
        self.sockets: tuple[zmq.Socket[bytes], ...] = (dealer.socket, dealer.monitor, *own)
        for step in shared.last.opened(self.endpoint, welcome.session):
            self.release(step)

    def __repr__(self) -> str:
        pings = ", pings on the same connection" if self._heartbeat is None else ""
        leaving = ", leaving" if self._leaving else ""
        under_way = len(self._shared.requests.under_way)
        return f"Open({self.endpoint}, session {self.welcome.session.hex()[:8]}, {under_way} under way{pings}{leaving})"

    @property
    def pings_alone(self) -> bool:
        """True if the session pings on its only connection, because a balancer sends others elsewhere."""
        return self._heartbeat is None and self.endpoint in self._shared.balanced

    @property
    def _needs_checksums(self) -> bool:
        """True if tensors need a checksum: nothing else notices damage, and the connection may leave the machine."""
        digest = self._dealer.digest
        return self._shared.keys is None and (digest is None or digest != self.welcome.connection)

    def due(self, now: float) -> Sequence[float]:
        times = [] if self._heartbeat is None else [self._heartbeat.next_ping]
        if self._shared.requests.under_way or self._heartbeat is None:
            times.append(self._path.next_ping)
        return times

    def receive(self, readable: Set[object]) -> Event | None:
        while self._dealer.socket in readable and (frames := self._dealer.receive()) is not None:
            self._shared.traffic.received(frames)
            if (event := self._on_frames(frames)) is not None:
                return event
        while self._dealer.monitor in readable and (happened := self._dealer.link_event()) is not None:
            if happened not in (LinkEvent.UP, LinkEvent.MUTE):
                return Lost("the connection was lost")
        return None

    def act(self, now: float, readable: Set[object]) -> Event | None:
        return self._check(now, readable) or self._send_waiting(now)

    def release(self, step: int) -> None:
        """Send RELEASE."""
        self._say(Release(session=self.welcome.session, epoch=self.welcome.epoch, step=step))

    def cancel(self, request: int) -> None:
        """Send CANCEL."""
        self._say(Cancel(session=self.welcome.session, epoch=self.welcome.epoch, request=request))

    def timeout(self) -> RequestTimeout:
        """Return the error for a request without an answer by its deadline."""
        busy = f" (it has been at one pass for {self._progress.pass_seconds:.0f} s)"
        return RequestTimeout(
            f"{self.endpoint} did not answer within {self._shared.request_timeout_seconds:g} s{busy}; "
            "is the daemon overloaded or shutting down, or the request too large for it?"
        )

    def leave(self) -> None:
        """Send BYE, and close with time for it to be sent."""
        self._say(Bye(session=self.welcome.session, epoch=self.welcome.epoch))
        self._dealer.close()
        self.close()

    def close(self) -> None:
        self._dealer.close(linger_ms=0)
        if self._heartbeat is not None:
            self._heartbeat.close()

    # --- liveness ----------------------------------------------------------------------------------------------

    def _check(self, now: float, readable: Set[object]) -> Event | None:
        """Check by pings that the daemon is alive and that the connection carries messages."""
        if self._heartbeat is not None:
            self._heartbeat.turn(now, readable)
            if self._heartbeat.reaches_another:
                self._give_up_heartbeat(now)
        heartbeat, under_way = self._heartbeat, self._shared.requests.under_way
        if not under_way and heartbeat is not None:
            self._path.heard()
        if heartbeat is not None and heartbeat.silent:
            return Lost(f"silent for {heartbeat.silent_seconds:.0f} s")
        if heartbeat is not None and heartbeat.session_is_gone:
            return Lost("the session is not known there any more")
        if self._path.is_broken(lambda: self._shared.requests.transferred_bytes):
            return Lost("the connection carries nothing")
        if (under_way or heartbeat is None) and now >= self._path.next_ping:
            self._say(self._path.ping(self._shared.new_request_id(), under_way, now))
        elif self._leaving and not under_way:
            return Left()
        return None

    def _give_up_heartbeat(self, now: float) -> None:
        """Ping on the session's own connection only: the heartbeat's reaches another daemon process.

        If such a ping is answered, a balancer distributes connections over daemons; if not, the daemon was lost.
        """
        assert self._heartbeat is not None
        self._heartbeat.close()
        self._heartbeat = None
        self.sockets = (self._dealer.socket, self._dealer.monitor)
        self._path.heard()
        self._path.next_ping = now

    def _on_pong(self, header: Pong) -> Event | None:
        """Check that the daemon has every request that waits for an answer here."""
        self._progress.heard(header)
        if self._heartbeat is None and self.endpoint not in self._shared.balanced:
            self._shared.balanced.add(self.endpoint)
            logger.warning(
                "%s: another connection to it reaches another daemon, so something between balances connections over "
                "several; each session has one connection there from now on, and its pings queue behind its tensors",
                self.endpoint,
            )
        lost = self._path.has_lost(header, self._shared.requests.under_way)
        return Lost("a message was lost on its way") if lost else None

    # --- requests ----------------------------------------------------------------------------------------------

    def _say(self, header: Header) -> bool:
        return self._put(encode(header))

    def _put(self, frames: list[Frame]) -> bool:
        sent = self._dealer.send(frames)
        if sent:
            self._shared.traffic.sent(frames)
        return sent

    def _send_waiting(self, now: float) -> Event | None:
        requests, welcome = self._shared.requests, self.welcome
        while (pending := requests.take_next(welcome.limits, welcome.epoch, now)) is not None:
            if not self._send(pending):
                return Lost("the connection was lost")  # all unanswered requests are sent again
        return None

    def _send(self, pending: Pending) -> bool:
        """Build and send a request; fail it if it cannot be built. Return False if not connected."""
        most = self.welcome.limits.max_message_bytes
        try:
            header, buffers = pending.build(self.welcome, pending)
            pending.in_session = isinstance(header, InSession)
            largest = max((len(buffer) for buffer in buffers), default=0)
            if largest > most:
                raise TooLargeError(
                    f"a tensor of {largest} bytes is over the {most} that {self.endpoint} accepts; use a smaller batch"
                )
            frames = encode(header, buffers, checked=self._needs_checksums)
            pending.nbytes = sum(len(buffer) for buffer in buffers)
            if not self._send_adapter(pending):
                return False
        except Exception as error:
            self._shared.requests.ended(pending.request)
            pending.fail(error)
            return True
        return self._put(frames)

    def _send_adapter(self, pending: Pending) -> bool:
        """Send the version of a request's adapter, unless the session has it. Return False if not connected."""
        version, sent_versions = pending.adapter, self._shared.adapters
        pending.adapter_bytes = 0
        if version is None:
            return True
        if sent_versions.lacks(version, self.welcome.session):
            for header, buffers in version.pieces(self.welcome, pending.request):
                frames = encode(header, buffers, checked=self._needs_checksums)
                if not self._put(frames):
                    return False
                pending.adapter_bytes += sum(map(len, frames))
            self._shared.traffic.sent_adapter(pending.adapter_bytes)
            sent_versions.sent(version)
        pending.message = sent_versions.next_message()
        return True

    def _on_frames(self, frames: list[Frame]) -> Event | None:
        try:
            message = decode(frames, TO_CLIENT)
        except WireError as error:  # the answered request is unknown, so all are sent again
            return Lost(f"sent something that is not of the protocol ({error})")
        header = message.header
        if not self._is_meant_for_this(header):
            logger.debug("%s sent a %s of another session", self.endpoint, type(header).__name__)
            return None
        self.heard = True
        self._path.heard()
        if self._heartbeat is not None:
            self._heartbeat.heard()
        match header:
            case Error():
                return self._on_error(header)
            case Pong():
                return self._on_pong(header)
            case GoAway() if not self._goes_away:
                self._goes_away = True
                logger.warning(
                    "the trunk at %s is shutting down; steps that are open there may end within %.0f s",
                    self.endpoint,
                    header.drain_ms / 1000,
                )
            case Result() | Status() as answer:
                self._on_answer(answer, message)
        return None

    def _is_meant_for_this(self, header: Header) -> bool:
        """Return whether a message names this session, or answers a request sent outside a session.

        Every client numbers its own requests, so a late or misdirected message may have any request id.
        """
        if isinstance(header, Error) and header.session is None:  # no request id: the daemon could not read the message
            return header.request is None or self._shared.requests.names_no_session(header.request)
        if isinstance(header, Status):
            return self._shared.requests.names_no_session(header.request)
        return getattr(header, "session", None) == self.welcome.session and not isinstance(header, Welcome)

    def _on_answer(self, answer: Result | Status, message: Message) -> None:
        pending = self._shared.requests.ended(answer.request)
        if pending is not None:  # otherwise a late answer to a request that was given up
            self._shared.endpoints.answered()
            self._shared.traffic.answered(answer)
            pending.future.set_result(message)

    def _on_error(self, header: Error) -> Event | None:
        error, requests = error_of(header, self.endpoint), self._shared.requests
        if header.epoch != self.welcome.epoch and header.retry is not Retry.REHELLO:
            return None  # from an earlier process of the daemon
        if isinstance(error, ForbiddenError):
            return Unfit(error)  # its request is sent to the next endpoint, or fails with the others
        pending, now = requests.ended(header.request), time.monotonic()
        if isinstance(error, CorruptError) or header.retry is Retry.REHELLO:
            if pending is not None:
                requests.refused(pending, error)
            damaged = isinstance(error, CorruptError)  # the damaged message is unknown
            return Lost("a message was damaged on its way" if damaged else "the session is not known there any more")
        if pending is None:
            logger.debug("%s", error)  # about a request that was given up
        elif isinstance(error, DeadlineError):
            pending.fail(self.timeout())  # the daemon noticed first
        elif header.retry is Retry.REPLAY:
            if isinstance(error, UnknownAdapterError) and pending.adapter is not None:
                self._shared.adapters.unknown(pending.adapter, pending.message)
            requests.refused(pending, error)
        elif header.retry is Retry.SAME:
            requests.later(pending, now + header.retry_after_ms / 1000, now)
        elif header.retry is Retry.ELSEWHERE:
            requests.later(pending, now + DRAINING_RETRY_SECONDS, now)
            self._leaving = self._shared.endpoints.others
        else:
            pending.fail(error)
        return None
