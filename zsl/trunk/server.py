"""The trunk server: from a message on the ROUTER to the answer, on one asyncio loop and one compute thread.

    receive → decode → session → admission → scheduler → compute thread → answer

The loop owns the socket, the sessions and the scheduler; the thread owns the model. They meet in a queue and in
`call_soon_threadsafe`. No model work runs on the loop, so it answers pings while the device is busy. Knows no torch.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import zsl
from zsl.errors import (
    CancelledByClientError,
    DeadlineError,
    DrainingError,
    ForwardOnlyError,
    StaleEpochError,
    WireError,
)
from zsl.transport.router import Router
from zsl.trunk.admission import check_backward, check_forward, merge_key
from zsl.trunk.scheduler import Job, Scheduler
from zsl.trunk.sessions import Session, Sessions
from zsl.trunk.settings import ServerSettings, TrunkInfo, TrunkTraits, check_wanted
from zsl.trunk.work import Buffers, Compute, Done, Held, Keep, Kind, Outcome, Shape, Work
from zsl.trunk.worker import Finished, Worker
from zsl.wire.frames import MAGIC, Frame, decode, encode
from zsl.wire.messages import (
    MAX_TEXT_CHARS,
    TO_DAEMON,
    Backward,
    Bye,
    Cancel,
    Error,
    Forward,
    GoAway,
    Header,
    Hello,
    Ping,
    Pong,
    Release,
    Result,
    Status,
    StatusRequest,
    Welcome,
    WorkHeader,
)

logger = logging.getLogger(__name__)

HOUSEKEEPING_SECONDS = 0.2
MIN_RETRY_MS, MAX_RETRY_MS = 10, 5_000
# The answers to a session's credit of requests, and what is said beside them (pongs, errors, goaway).
CONTROL_MESSAGES = 64


@dataclass(frozen=True, slots=True)
class _Request:
    """An admitted request on its way: what to compute, and whom to answer."""

    session: Session
    request: int
    kind: Kind
    buffers: Buffers
    shape: Shape
    keep: bool
    held: Held | None
    arrived: float
    job: Job


_Key = tuple[bytes, int]


class TrunkServer:
    """Serves one trunk. `clock` gives seconds, `new_id` 16 fresh bytes."""

    def __init__(
        self,
        info: TrunkInfo,
        settings: ServerSettings | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        new_id: Callable[[], bytes] = lambda: secrets.token_bytes(16),
    ) -> None:
        self.info = info
        self._settings = settings or ServerSettings()
        self._clock = clock
        self._epoch = new_id()
        self._limits = self._settings.limits(info)
        self._sessions = Sessions(
            lease_seconds=self._settings.lease_seconds,
            max_inflight_requests=self._settings.max_inflight_requests,
            max_inflight_bytes=self._settings.max_inflight_bytes,
            max_total_inflight_bytes=self._settings.max_total_inflight_bytes,
            stash_memory_bytes=self._settings.stash_memory_bytes,
            new_id=new_id,
        )
        self._requests: dict[_Key, _Request] = {}
        self._router = Router(
            max_message_bytes=self._limits.max_message_bytes,
            send_hwm_messages=self._settings.max_inflight_requests + CONTROL_MESSAGES,
        )
        # Set by `run`, before anything is received.
        self._worker: Worker[_Request]
        self._scheduler: Scheduler
        self._traits: TrunkTraits
        self._dispatch_later: asyncio.TimerHandle | None = None
        self._draining_until: float | None = None
        self._stopped = asyncio.Event()
        self._handlers: dict[type[Header], Callable[[bytes, Header, Sequence[Frame]], None]] = {
            Hello: self._on_hello,
            Forward: self._on_work,
            Backward: self._on_work,
            Release: self._on_release,
            Cancel: self._on_cancel,
            Ping: self._on_ping,
            Bye: self._on_bye,
            StatusRequest: self._on_status,
        }

    def bind(self, host: str, port: int) -> str:
        """Take the port, and return the real endpoint. Nothing is answered before `run`. Raises `StartupError`."""
        return self._router.bind(host, port)

    def close(self) -> None:
        """Give the port back without having run."""
        self._router.close()

    async def run(self, compute: Compute) -> None:
        """Serve until `stop`, or until a `drain` has ended."""
        self._traits = compute.traits
        self._scheduler = Scheduler(
            max_batch_tokens=self._traits.batch_limits.max_batch_tokens,
            max_wait_seconds=self._settings.max_wait_seconds,
            costs=self._traits.costs,
        )
        self._worker = Worker(compute, self._finish_batch, clock=self._clock)
        self._router.start(self._receive, self._dispatch)
        try:
            while not self._stopped.is_set():
                self._keep_house()
                await _wait_at_most(self._stopped, HOUSEKEEPING_SECONDS)
        finally:
            if self._dispatch_later is not None:
                self._dispatch_later.cancel()
            await self._worker.stop()
            self._router.close()

    def stop(self) -> None:
        """End as soon as the pass that runs has ended. To be called on the loop."""
        self._stopped.set()

    def drain(self) -> None:
        """Take no new forward, let open steps end for up to `drain_seconds`, then stop. To be called on the loop."""
        if self._draining_until is not None:
            return
        self._draining_until = self._clock() + self._settings.drain_seconds
        goaway = GoAway(epoch=self._epoch, drain_ms=round(self._settings.drain_seconds * 1000))
        for session in self._sessions:
            self._send(session.peer, goaway)

    # --- from the socket ---------------------------------------------------------------------------------------

    def _receive(self, peer: bytes, frames: list[Frame]) -> None:
        try:
            message = decode(frames, TO_DAEMON)
        except WireError as error:
            if frames and bytes(frames[0][: len(MAGIC)]) == MAGIC:
                self._answer_error(peer, error.request, error)
            logger.warning("refused a message of %d frames: %s", len(frames), error)
            return
        header = message.header
        try:
            self._handlers[type(header)](peer, header, message.buffers)
        except WireError as error:
            self._answer_error(peer, getattr(header, "request", None), error)

    def _on_hello(self, peer: bytes, header: Header, _: Sequence[Frame]) -> None:
        assert isinstance(header, Hello)
        if self._draining_until is not None:
            raise DrainingError()
        check_wanted(self.info, header)
        for earlier in self._sessions.of_peer(peer):
            self._close_session(earlier.id, "its client opened another")
        session = self._sessions.open(peer, self._clock())
        logger.info("session %s opened (zsl %s, %s)", session.id.hex()[:8], header.software, header.dtype)
        welcome = Welcome(
            request=header.request,
            software=zsl.__version__,
            epoch=self._epoch,
            session=session.id,
            model=self.info.model,
            cut=self.info.cut,
            dtype=self.info.dtype,
            forward_only=self.info.forward_only,
            packs=self._traits.packs,
            deterministic=self._traits.deterministic,
            trunk_parameters=self._traits.parameters,
            limits=self._limits,
        )
        self._send(peer, welcome)

    def _on_work(self, peer: bytes, header: Header, frames: Sequence[Frame]) -> None:
        assert isinstance(header, WorkHeader)
        now = self._clock()
        session = self._session(header, peer, now)
        key = (session.id, header.request)
        if key in self._requests:
            return  # sent twice: the one answer will serve
        buffers: Buffers = {d.role: (d, frame) for d, frame in zip(header.tensors, frames, strict=True)}
        hidden_size = self.info.model.hidden_size
        held = None
        if isinstance(header, Forward):
            if self._draining_until is not None:
                raise DrainingError()
            if header.keep and self.info.forward_only:
                raise ForwardOnlyError()
            kind, keep = Kind.FORWARD, header.keep
            shape = check_forward(buffers, hidden_size, self._limits)
            cost = self._traits.costs.forward
        else:
            assert isinstance(header, Backward)
            if self.info.forward_only:
                raise ForwardOnlyError()
            kind, keep = Kind.BACKWARD, False
            complete = "activations" in buffers
            held = None if complete else session.held.get(header.step)
            shape = check_backward(buffers, held.shape if held else None, hidden_size, self._limits)
            cost = self._traits.costs.backward
        nbytes = sum(descriptor.nbytes for descriptor in header.tensors)
        self._sessions.admit(session, header.request, nbytes, retry_after_ms=self._retry_after_ms())
        if isinstance(header, Backward):
            self._sessions.take(session, header.step)
        job = Job(
            key,
            tenant=session.id,
            kind=kind,
            tokens=shape.total_tokens,
            merge_key=held.merge_key if held else self._merge_key(buffers, shape),
            cost_seconds=cost.seconds(shape.total_tokens),
            deadline=now + header.budget_ms / 1000,
        )
        self._requests[key] = _Request(session, header.request, kind, buffers, shape, keep, held, now, job)
        self._scheduler.add(job, now)

    def _merge_key(self, buffers: Buffers, shape: Shape) -> tuple[object, ...] | None:
        """With whom a request can share a pass; None if it is large enough to gain nothing."""
        traits = self._traits
        if not traits.merges or shape.total_tokens > traits.batch_limits.merge_below_tokens:
            return None
        return merge_key(buffers, shape, packs=traits.packs)

    def _retry_after_ms(self) -> int:
        """When a client that is over its credit may come again: when what is queued should be done."""
        return min(max(round(self._scheduler.backlog_seconds * 1000), MIN_RETRY_MS), MAX_RETRY_MS)

    def _on_release(self, peer: bytes, header: Header, _: Sequence[Frame]) -> None:
        assert isinstance(header, Release)
        self._sessions.release(self._session(header, peer, self._clock()), header.step)

    def _on_cancel(self, peer: bytes, header: Header, _: Sequence[Frame]) -> None:
        assert isinstance(header, Cancel)
        session = self._session(header, peer, self._clock())
        key = (session.id, header.request)
        if self._scheduler.discard(key):
            self._finish(self._requests[key], CancelledByClientError())
        else:
            self._sessions.release(session, header.request)

    def _on_ping(self, peer: bytes, header: Header, _: Sequence[Frame]) -> None:
        assert isinstance(header, Ping)
        now = self._clock()
        self._session(header, peer, now)
        busy_since = self._worker.busy_since
        age = 0.0 if busy_since is None else now - busy_since
        self._send(peer, Pong(request=header.request, epoch=self._epoch, progress_age_ms=round(age * 1000)))

    def _on_bye(self, peer: bytes, header: Header, _: Sequence[Frame]) -> None:
        assert isinstance(header, Bye)
        session = self._session(header, peer, self._clock())
        self._close_session(session.id, "closed by its client")

    def _on_status(self, peer: bytes, header: Header, _: Sequence[Frame]) -> None:
        assert isinstance(header, StatusRequest)
        status = Status(
            request=header.request,
            software=zsl.__version__,
            epoch=self._epoch,
            model=self.info.model,
            cut=self.info.cut,
            dtype=self.info.dtype,
            forward_only=self.info.forward_only,
            trunk_parameters=self._traits.parameters,
            sessions=len(self._sessions),
            queued_requests=len(self._scheduler),
            held_bytes=self._sessions.held_bytes,
        )
        self._send(peer, status)

    def _session(self, header: Header, peer: bytes, now: float) -> Session:
        if getattr(header, "epoch", None) != self._epoch:
            raise StaleEpochError()
        return self._sessions.get(getattr(header, "session", b""), peer, now)

    # --- to the compute thread and back ------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """If the device is free, give it what is queued: after all that has arrived, so that it can share a pass."""
        if self._worker.busy_since is not None:
            return
        if self._dispatch_later is not None:
            self._dispatch_later.cancel()
            self._dispatch_later = None
        now = self._clock()
        self._answer_expired(now)
        jobs = self._scheduler.take_batch(now)
        if not jobs:
            if self._scheduler.waits_until is not None:
                loop = asyncio.get_running_loop()
                self._dispatch_later = loop.call_later(self._scheduler.waits_until - now, self._dispatch)
            return
        requests = [self._requests[job.key] for job in jobs]  # type: ignore[index]
        self._worker.give(requests, [self._work(request) for request in requests])

    def _work(self, request: _Request) -> Work:
        stash = request.held.stash if request.held else None
        return Work(request.kind, request.buffers, request.shape, self._keep(request), stash)

    def _keep(self, request: _Request) -> Keep:
        """What to keep of a forward. A backward in other company than its forward needs products, else a graph."""
        if not request.keep:
            return Keep.NOTHING
        if not self._sessions.has_room:
            return Keep.INPUT
        if request.job.merge_key is None:
            return Keep.GRAPH
        return Keep.PRODUCTS if self._traits.deterministic else Keep.GRAPH_AND_PRODUCTS

    def _finish_batch(self, batch: Finished[_Request]) -> None:
        jobs = [request.job for request in batch.tickets]
        self._scheduler.charge(jobs, batch.ended - batch.started, self._clock())
        self._router.drain()  # what arrived meanwhile can share the next pass, which begins here
        for request, outcome in zip(batch.tickets, batch.outcomes, strict=True):
            self._finish(request, outcome, merged=len(batch.tickets), started=batch.started, ended=batch.ended)

    def _finish(
        self, request: _Request, outcome: Outcome, *, merged: int = 1, started: float = 0.0, ended: float = 0.0
    ) -> None:
        """Answer a request, and keep what its backward will need."""
        del self._requests[request.session.id, request.request]
        session = self._sessions.finish(request.session.id, request.request)
        if session is None:
            return  # closed meanwhile: nobody waits
        if isinstance(outcome, WireError):
            self._answer_error(session.peer, request.request, outcome)
            return
        assert isinstance(outcome, Done)
        if outcome.stash is not None:
            held = Held(outcome.stash, request.shape, request.job.merge_key)
            self._sessions.hold(session, request.request, held)
        descriptors = [descriptor for descriptor, _ in outcome.buffers.values()]
        result = Result(
            request=request.request,
            epoch=self._epoch,
            merged=merged,
            queue_us=round((started - request.arrived) * 1e6),
            compute_us=round((ended - started) * 1e6),
            tensors=descriptors,
        )
        if not self._send(session.peer, result, [buffer for _, buffer in outcome.buffers.values()]):
            self._close_session(session.id, "its client is gone or does not read")

    def _answer_expired(self, now: float) -> None:
        for job in self._scheduler.take_expired(now):
            self._finish(self._requests[job.key], DeadlineError())  # type: ignore[index]

    # --- housekeeping and answers ------------------------------------------------------------------------------

    def _keep_house(self) -> None:
        now = self._clock()
        self._answer_expired(now)
        for session in self._sessions.expired(now):
            self._close_session(session.id, "nothing was heard of it for its lease")
        if self._draining_until is not None:
            open_steps = any(session.held or session.inflight for session in self._sessions)
            if not open_steps or now >= self._draining_until:
                self.stop()

    def _close_session(self, session_id: bytes, why: str) -> None:
        """Forget a session, what is held for it, and what of it is queued."""
        session = self._sessions.close(session_id)
        for request in session.inflight if session else ():
            if self._scheduler.discard((session_id, request)):
                del self._requests[session_id, request]
        self._scheduler.forget_tenant(session_id)
        logger.info("session %s ended: %s", session_id.hex()[:8], why)

    def _answer_error(self, peer: bytes, request: int | None, error: WireError) -> None:
        message = Error(
            request=request,
            epoch=self._epoch,
            code=error.code,
            retry=error.retry,
            retry_after_ms=error.retry_after_ms,
            text=str(error)[:MAX_TEXT_CHARS],
        )
        self._send(peer, message)

    def _send(self, peer: bytes, header: Header, buffers: Sequence[Frame] = ()) -> bool:
        return self._router.send(peer, encode(header, buffers))


async def _wait_at_most(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event; a wait that is cut off loses nothing."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        pass
