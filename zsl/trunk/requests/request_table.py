"""The table of requests: one entry each, from its admission to its end.

    add → QUEUED → take_batch → RUNNING → end → ANSWERED

A request is cancelled, or its deadline passes, while it is QUEUED: it ends without having run. A pass that runs is not
stopped. A request whose session closes is ABANDONED: nobody is answered, and what it computes is dropped. One whose
step the client releases is answered, and nothing is kept of it.

The scheduler orders and batches the queued ones, and the reply cache keeps answers: both are reached through this table
only. Pure: no sockets, the clock is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import cast

from zsl.errors import CancelledByClientError, MalformedError, WireError
from zsl.trunk.requests.credit import Credit, InFlight
from zsl.trunk.requests.reply_cache import ReplyCache, asked_by
from zsl.trunk.scheduling.scheduler import Job, Scheduler
from zsl.trunk.sessions.sessions import Session, Sessions
from zsl.trunk.work import Buffers, Held, Kind, Outcome, Shape, Sharing
from zsl.wire.frames import Frame
from zsl.wire.messages import Backward, Forward

MIN_RETRY_MS, MAX_RETRY_MS = 10, 5_000


class RequestState(Enum):
    """The states of a request. The last two are ends."""

    QUEUED = "queued"
    RUNNING = "running"
    ANSWERED = "answered"
    ABANDONED = "abandoned"


@dataclass(slots=True, eq=False)
class Request:
    """A checked request: its computation, whom to answer, and its state. `released`: its step is not wanted."""

    session: Session
    header: Forward | Backward
    kind: Kind
    buffers: Buffers
    shape: Shape
    sharing: Sharing
    keep: bool
    held: Held | None
    arrived: float
    nbytes: int
    job: Job
    state: RequestState = RequestState.QUEUED
    released: bool = False

    @property
    def taken_bytes(self) -> int:
        """The memory of what was held for it, and is counted for no session any more."""
        return 0 if self.held is None else self.held.stash.nbytes

    def is_asked_by(self, header: Forward | Backward, frames: Sequence[Frame]) -> bool:
        """Compare with a message of its id. (A backward may bring its activations along, or not.)"""
        arrived = {d.role: frame for d, frame in zip(header.tensors, frames, strict=True)}
        return asked_by(self.header) == asked_by(header) and all(
            self.buffers[role][1] == frame for role, frame in arrived.items() if role in self.buffers
        )


@dataclass(frozen=True, slots=True)
class RequestStats:
    """Numbers of requests, by state. `released` are some of the queued and running, `replies` answers that are kept."""

    queued: int = 0
    running: int = 0
    released: int = 0
    replies: int = 0


class RequestTable:
    """All requests of open sessions.

    `taken_bytes`: of what was held and the backwards in the table will use. `waits_until`: the time to ask again if no
    request comes before, after `take_batch` gave none though one is queued.
    """

    def __init__(self, sessions: Sessions, scheduler: Scheduler, replies: ReplyCache, credit: Credit) -> None:
        self._sessions = sessions
        self._scheduler = scheduler
        self._replies = replies
        self._credit = credit
        self._open: dict[bytes, dict[int, Request]] = {}  # queued and running, by session
        self._bytes = 0
        self.taken_bytes = 0

    def __repr__(self) -> str:
        counted = ", ".join(f"{number} {state}" for state, number in asdict(self.stats).items())
        return f"<RequestTable: {counted}>"

    @property
    def stats(self) -> RequestStats:
        """Count the requests by state."""
        requests = [request for of_session in self._open.values() for request in of_session.values()]
        return RequestStats(
            queued=self.queued,
            running=sum(request.state is RequestState.RUNNING for request in requests),
            released=sum(request.released for request in requests),
            replies=len(self._replies),
        )

    @property
    def queued(self) -> int:
        """Count the queued requests, without looking at each."""
        return len(self._scheduler)

    @property
    def waits_until(self) -> float | None:
        return self._scheduler.waits_until

    def get(self, session: Session, request: int) -> Request | None:
        """Find a queued or running request."""
        return self._open.get(session.id, {}).get(request)

    def inflight(self, session: Session) -> int:
        """Count the requests of a session that have no answer yet."""
        return len(self._open.get(session.id, ()))

    def repeated(self, session: Session, header: Forward | Backward, frames: Sequence[Frame]) -> Sequence[Frame] | None:
        """Find the frames to send for a request that was delivered again; None if it is new, or to be computed again.

        No frames if it has no answer yet: the one answer will serve, on the connection that is open then. Raises
        `MalformedError` if its id was used for another request.
        """
        request = self.get(session, header.request)
        if request is not None:
            if not request.is_asked_by(header, frames):
                raise MalformedError("this request id is in use for another request")
            return ()
        reply = self._replies.get(session.id, header)
        if reply is None:
            return None
        if reply.frames is not None:
            return reply.frames
        # Who asks again has not got the answer; if it is not kept any more, the first attempt can only be an echo.
        return () if header.attempt == 0 else None

    def add(
        self, request: Request, now: float, *, unsent: Callable[[bytes], int] = lambda _: 0, all_unsent: int = 0
    ) -> None:
        """Queue a request. Raises `OverloadedError` over the credit of its session, its tenant, or all.

        `unsent` tells the bytes of answers that a connection has not read, `all_unsent` those of all. They count as if
        they were in flight.
        """
        session, header = request.session, request.header
        inflight = InFlight(
            requests=self.inflight(session),
            session_bytes=self._bytes_of(session, unsent),
            tenant_bytes=sum(self._bytes_of(one, unsent) for one in self._sessions.of_tenant(session.tenant)),
            all_bytes=self._bytes + all_unsent,
        )
        self._credit.check(request.nbytes, inflight, session.tenant, retry_after_ms=self._retry_after_ms())
        if isinstance(header, Backward):  # with it, its step is over
            if request.held is None:
                self._sessions.release(session, header.step)
            else:
                self._sessions.take(session, header.step)
            self._replies.give_up(session.id, header.step)
        self._open.setdefault(session.id, {})[header.request] = request
        self._bytes += request.nbytes
        self.taken_bytes += request.taken_bytes
        self._scheduler.add(request.job, now, weight=1.0 if session.tenant is None else session.tenant.weight)

    def take_batch(self, now: float) -> list[Request]:
        """Begin the requests of the next pass, all of one kind. Empty if nothing is queued, or while it waits."""
        batch = [self._request_of(job) for job in self._scheduler.take_batch(now)]
        for request in batch:
            request.state = RequestState.RUNNING
        return batch

    def charge(self, batch: Sequence[Request], seconds: float, now: float) -> None:
        """Charge the tenants of a batch for the time that it took."""
        self._scheduler.charge([request.job for request in batch], seconds, now)

    def expired(self, now: float) -> list[Request]:
        """Find the queued requests whose deadline has passed. They are to be ended."""
        return [self._request_of(job) for job in self._scheduler.take_expired(now)]

    def end(self, request: Request, outcome: Outcome, answer: Sequence[Frame] = ()) -> None:
        """End a request: with what it computed, or with the error that came before. `answer`: what is sent for it."""
        if request.state is RequestState.QUEUED:
            self._scheduler.discard(request.job.key)
        self.taken_bytes -= request.taken_bytes
        if isinstance(outcome, WireError):
            if request.held is not None:
                request.held.stash.drop()
        elif outcome.stash is not None:
            if request.released or request.state is RequestState.ABANDONED:
                outcome.stash.drop()
            else:
                held = Held(outcome.stash, request.shape, request.sharing)
                self._sessions.hold(request.session, request.header.request, held)
        if request.state is RequestState.ABANDONED:
            self._scheduler.forget_client(request.session.id)
            return
        request.state = RequestState.ANSWERED
        self._remove(request)
        if not isinstance(outcome, WireError):
            self._replies.put(request.session.id, request.header, answer)

    def release(self, session: Session, step: int) -> None:
        """Keep nothing of a step, which may be queued or running: its client will ask no backward for it."""
        self._sessions.release(session, step)
        request = self.get(session, step)
        if request is not None:
            request.released = True
        self._replies.give_up(session.id, step)

    def close(self, session: Session) -> None:
        """Abandon the requests of a session that is closed."""
        for request in list(self._open.get(session.id, {}).values()):
            self._remove(request)
            was_queued = self._scheduler.discard(request.job.key)
            request.state = RequestState.ABANDONED
            if was_queued:
                self.end(request, CancelledByClientError())
        self._replies.close(session.id)
        self._scheduler.forget_client(session.id)
        if session.tenant is None:  # a tenant with a key must not lose what it has used by coming anew
            self._scheduler.forget_tenant(session.id)

    def _remove(self, request: Request) -> None:
        of_session = self._open[request.session.id]
        del of_session[request.header.request]
        if not of_session:
            del self._open[request.session.id]
        self._bytes -= request.nbytes

    def _request_of(self, job: Job) -> Request:
        session, request = cast(tuple[bytes, int], job.key)
        return self._open[session][request]

    def _bytes_of(self, session: Session, unsent: Callable[[bytes], int]) -> int:
        return sum(request.nbytes for request in self._open.get(session.id, {}).values()) + unsent(session.peer)

    def _retry_after_ms(self) -> int:
        """Bound the time until what is queued should be done, when a client over its credit may come again."""
        return min(max(round(self._scheduler.backlog_seconds * 1000), MIN_RETRY_MS), MAX_RETRY_MS)
