"""Message handlers of the daemon, one per message type: sessions, requests, pings and status.

    receive → tenant → decode → match → session → table of requests, or answer

Handlers open, resume and close sessions, and validate and queue requests; the batch runner runs them. They run on the
loop and never block. Imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zsl.errors import (
    CancelledByClientError,
    DrainingError,
    ForbiddenError,
    StaleEpochError,
    UnknownSessionError,
    WireError,
)
from zsl.trunk.access.tenants import Allowlist, Tenant
from zsl.trunk.malloc import TrimPolicy
from zsl.trunk.requests.answers import Answers
from zsl.trunk.requests.batch_runner import BatchRunner
from zsl.trunk.requests.handshake import status_for, welcome_to
from zsl.trunk.requests.intake import Intake
from zsl.trunk.requests.request_table import RequestState, RequestTable
from zsl.trunk.sessions.sessions import Session
from zsl.trunk.settings import check_wanted
from zsl.wire.frames import MAGIC, Frame, Message, decode, seal_again
from zsl.wire.messages import (
    TO_DAEMON,
    Adapter,
    Backward,
    Bye,
    Cancel,
    Forward,
    Hello,
    InSession,
    Limits,
    Ping,
    Pong,
    Release,
    StatusRequest,
    WeightNorms,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Sender:
    """The connection of a message, and its tenant if the daemon has keys."""

    peer: bytes
    tenant: Tenant | None


class Handlers:
    """Handles messages; with an `allowlist`, only those from its tenants."""

    def __init__(
        self,
        intake: Intake,
        requests: RequestTable,
        runner: BatchRunner,
        answers: Answers,
        trim_policy: TrimPolicy,
        allowlist: Allowlist | None,
        *,
        clock: Callable[[], float],
        is_draining: Callable[[], bool],
    ) -> None:
        self._intake = intake
        self._requests = requests
        self._sessions = requests.sessions
        self._runner = runner
        self._router = answers.router
        self._answers = answers
        self._trim_policy = trim_policy
        self._allowlist = allowlist
        self._clock = clock
        self._is_draining = is_draining
        self._forbidden: set[bytes] = set()  # connections that were sent a ForbiddenError

    @property
    def forbidden(self) -> int:
        """Number of connections that were sent a `ForbiddenError`."""
        return len(self._forbidden)

    def receive(self, peer: bytes, tenant_key: str, frames: list[Frame]) -> None:
        """Handle a message, and answer an invalid one with an error."""
        tenant = None if self._allowlist is None else self._allowlist.by_key(tenant_key)
        if self._allowlist is not None and tenant is None:
            self._refuse(peer)
            return
        try:
            message = decode(frames, TO_DAEMON)
        except WireError as error:
            if frames and bytes(frames[0][: len(MAGIC)]) == MAGIC:
                self._answers.send_error(peer, error, request=error.request, session=error.session)
            logger.warning("refused a message of %d frames: %s", len(frames), error)
            self._router.distrust(peer)
            return
        header = message.header
        try:
            self._handle(_Sender(peer, tenant), message)
        except WireError as error:
            session = header.session if isinstance(header, InSession) else None
            self._answers.send_error(peer, error, request=getattr(header, "request", None), session=session)

    def close_session(self, session: Session, why: str) -> None:
        """Close a session: drop its held steps, and abandon its requests. `why` is logged."""
        self._sessions.close(session.id)
        self._requests.close(session)
        self._intake.adapters.close(session)
        for peer in session.peers:
            self._router.release(peer)
        self._trim_policy.freed(self._clock())
        logger.info("session %s ended: %s", session.id.hex()[:8], why)

    def forget_gone_peers(self) -> None:
        """Forget refused connections that have closed."""
        self._forbidden = {peer for peer in self._forbidden if self._router.is_connected(peer)}

    def _refuse(self, peer: bytes) -> None:
        """Refuse a key that is no longer on the list: send one error, then disconnect."""
        if peer in self._forbidden:
            self._forbidden.discard(peer)
            self._router.cut(peer)
            return
        self._forbidden.add(peer)
        self._answers.send_error(peer, ForbiddenError(), request=None, session=None)

    def _handle(self, sender: _Sender, message: Message) -> None:
        """Dispatch a decoded message by its type. Raises `WireError`."""
        now, header, frames = self._clock(), message.header, message.buffers
        match header:
            case Hello():
                self._hello(sender, header, now)
            case Adapter():
                self._intake.adapters.receive(self._session(header, sender, now), header, frames, now)
            case WeightNorms():
                self._weight_norms(self._session(header, sender, now), header)
            case Forward() | Backward():
                session = self._session(header, sender, now)
                session.checks = message.checked
                self._work(session, header, frames, now)
            case Release():
                self._requests.release(self._session(header, sender, now), header.step)
            case Cancel():
                self._cancel(self._session(header, sender, now), header)
            case Ping():
                self._ping(sender, header, now)
            case Bye():
                self.close_session(self._session(header, sender, now), "closed by its client")
            case StatusRequest():
                self._status(sender, header)
            case _:
                raise TypeError(f"{header.TYPE.name} has no handler")

    def _hello(self, sender: _Sender, header: Hello, now: float) -> None:
        intake = self._intake
        session = self._sessions.of_peer(sender.peer, sender.tenant)
        if session is None or session.hello != header.request:  # else a duplicate delivery
            check_wanted(intake.info, header)
            session = self._resumed(sender, header, now) or self._opened(sender, header, now)
        limits = self._limits_of(sender.tenant)
        adapters = intake.adapters.limits_of(sender.tenant)
        digest, caches = self._router.digest(sender.peer), intake.cache_memory is not None
        welcome = welcome_to(
            header, session.id, self._answers.epoch, intake.info, intake.traits, adapters, limits, digest, caches=caches
        )
        self._router.hold(sender.peer)
        if not self._answers.send(sender.peer, welcome):
            self.close_session(session, "its client disconnected before it was open")

    def _limits_of(self, tenant: Tenant | None) -> Limits:
        """Return the limits of a session, lowered to those of its tenant."""
        limits = self._intake.limits
        if tenant is None:
            return limits
        most = min(limits.max_inflight_bytes, tenant.max_inflight_bytes)
        return limits.model_copy(update={"max_inflight_bytes": most})

    def _resumed(self, sender: _Sender, header: Hello, now: float) -> Session | None:
        if header.resume is None:
            return None
        try:
            session, old_peers = self._sessions.resume(
                header.resume, sender.peer, now, hello=header.request, tenant=sender.tenant
            )
        except UnknownSessionError:
            return None
        for peer in old_peers:
            self._router.cut(peer)  # answers unsent on it are repeated on the new one
        logger.info("session %s has a new connection", session.id.hex()[:8])
        return session

    def _opened(self, sender: _Sender, header: Hello, now: float) -> Session:
        if self._is_draining():
            raise DrainingError()
        earlier = self._sessions.of_peer(sender.peer, sender.tenant)
        if earlier is not None:
            self.close_session(earlier, "its client opened another")
        quiet = self._sessions.eviction_candidate(sender.tenant, now)
        if quiet is not None:
            self.close_session(quiet, "silent, and its place is needed for a new one")
        session = self._sessions.open(sender.peer, now, hello=header.request, tenant=sender.tenant)
        whose = "" if sender.tenant is None else f" for {sender.tenant.name}"
        logger.info("session %s opened%s (zsl %r, %s)", session.id.hex()[:8], whose, header.software, header.dtype)
        return session

    def _work(self, session: Session, header: Forward | Backward, frames: Sequence[Frame], now: float) -> None:
        answer = self._requests.repeated(session, header, frames)
        if answer is None:
            request = self._intake.request(session, header, frames, now, draining=self._is_draining())
            self._requests.add(request, now, unsent=self._router.unsent_bytes, all_unsent=self._router.all_unsent_bytes)
        elif answer:
            self._router.send(session.peer, seal_again(answer, checked=session.checks))

    def _weight_norms(self, session: Session, header: WeightNorms) -> None:
        norms = self._intake.adapters.weight_norms(session, header.path)
        self._answers.send_tensor(session, header.request, *norms)

    def _cancel(self, session: Session, header: Cancel) -> None:
        request = self._requests.get(session, header.request)
        if request is not None and request.state is RequestState.QUEUED:
            self._runner.end(request, CancelledByClientError())
        else:
            self._requests.release(session, header.request)

    def _ping(self, sender: _Sender, header: Ping, now: float) -> None:
        self._check_epoch(header)
        session = self._sessions.renew(header.session, now, tenant=sender.tenant)
        if sender.peer not in session.peers:
            if session.heartbeat is not None:
                self._router.release(session.heartbeat)
            session.heartbeat = sender.peer
            self._router.hold(sender.peer)
        pong = Pong(
            session=session.id,
            request=header.request,
            epoch=self._answers.epoch,
            progress_age_ms=round(self._runner.busy_seconds(now) * 1000),
            inflight_requests=self._requests.inflight(session),
        )
        self._answers.send(sender.peer, pong)

    def _status(self, sender: _Sender, header: StatusRequest) -> None:
        status = status_for(
            header,
            self._answers.epoch,
            self._intake.info,
            self._intake.traits,
            sessions=len(self._sessions),
            queued_requests=self._requests.queued,
            held_bytes=self._sessions.held_bytes,
            adapter_bytes=self._intake.adapters.nbytes,
            cache_bytes=self._intake.caches.nbytes,
        )
        self._answers.send(sender.peer, status)

    def _session(self, header: InSession, sender: _Sender, now: float) -> Session:
        self._check_epoch(header)
        return self._sessions.get(header.session, sender.peer, now, tenant=sender.tenant)

    def _check_epoch(self, header: InSession) -> None:
        if header.epoch != self._answers.epoch:
            raise StaleEpochError()
