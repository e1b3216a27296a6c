"""The trunk server: from a message on the ROUTER to the answer, on one asyncio loop and one compute thread.

    receive → decode → tenant → session → admission → scheduler → compute thread → answer

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

from zsl.errors import (
    CancelledByClientError,
    DeadlineError,
    DrainingError,
    ForbiddenError,
    RunFailed,
    StaleEpochError,
    UnknownSessionError,
    WireError,
)
from zsl.transport.curve import KeyPair
from zsl.transport.router import Router
from zsl.trunk.credit import Credit
from zsl.trunk.failpoints import Failpoint
from zsl.trunk.greetings import status_for, welcome_to
from zsl.trunk.intake import Intake
from zsl.trunk.memory import GiveBack, give_back_freed_memory, resident_bytes
from zsl.trunk.reply_cache import ReplyCache
from zsl.trunk.request_table import Request, RequestStats, RequestTable, State
from zsl.trunk.scheduler import Scheduler
from zsl.trunk.sessions import Session, Sessions
from zsl.trunk.settings import ServerSettings, TrunkInfo, TrunkTraits, check_wanted
from zsl.trunk.tenants import Allowlist, Tenant
from zsl.trunk.work import Alone, Batch, Compute, Keep, Outcome, Work
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
    InSession,
    Limits,
    Ping,
    Pong,
    Release,
    Result,
    StatusRequest,
)

logger = logging.getLogger(__name__)

HOUSEKEEPING_SECONDS = 0.2
LAST_PASS_SECONDS = 30.0  # for the pass that runs when the daemon is to end
# The answers to a session's credit of requests, and what is said beside them (pongs, errors, goaway).
CONTROL_MESSAGES = 64


@dataclass(frozen=True, slots=True)
class _Sender:
    """Who sent a message: its connection, and its tenant where there are keys."""

    peer: bytes
    tenant: Tenant | None


@dataclass(frozen=True, slots=True)
class ServerStats:
    """Numbers of open sessions and connections, bytes that are kept for backwards, and requests by state."""

    sessions: int
    connections: int
    held_bytes: int
    requests: RequestStats


class TrunkServer:
    """Serves one trunk. `clock` gives seconds, `new_id` 16 fresh bytes.

    With `keys` everything is encrypted, and only who is on the `allowlist` gets in.
    """

    def __init__(
        self,
        info: TrunkInfo,
        settings: ServerSettings | None = None,
        *,
        keys: KeyPair | None = None,
        allowlist: Allowlist | None = None,
        failpoint: Failpoint | None = None,
        clock: Callable[[], float] = time.monotonic,
        new_id: Callable[[], bytes] = lambda: secrets.token_bytes(16),
    ) -> None:
        self.info = info
        self._settings = settings or ServerSettings()
        self._allowlist = allowlist
        self._failpoint = failpoint
        self._clock = clock
        self._epoch = new_id()
        self._limits = self._settings.limits(info)
        self._sessions = Sessions(
            lease_seconds=self._settings.lease_seconds,
            max_sessions=self._settings.max_sessions,
            stash_memory_bytes=self._settings.stash_memory_bytes,
            new_id=new_id,
        )
        self._forbidden: set[bytes] = set()  # connections that were told so once
        self._router = Router(
            max_message_bytes=self._limits.max_message_bytes,
            send_hwm_messages=self._settings.max_inflight_requests + CONTROL_MESSAGES,
            max_connections=self._settings.max_connections,
            max_receiving_bytes=self._settings.max_total_inflight_bytes,
            keys=keys,
            allowed=None if allowlist is None else allowlist.allows,
            clock=clock,
        )
        # Set by `run`, before anything is received.
        self._worker: Worker[Request]
        self._intake: Intake
        self._requests: RequestTable
        self._traits: TrunkTraits
        self._give_back: GiveBack
        self._giving_back: asyncio.Future[bool] | None = None
        self._dispatch_later: asyncio.TimerHandle | None = None
        self._draining_until: float | None = None
        self._stuck = False  # a pass will never end
        self._stopped = asyncio.Event()

    @property
    def stats(self) -> ServerStats:
        return ServerStats(
            sessions=len(self._sessions),
            connections=self._router.connections,
            held_bytes=self._sessions.held_bytes,
            requests=self._requests.stats,
        )

    def bind(self, host: str, port: int) -> str:
        """Take the port, and return the real endpoint. Nothing is answered before `run`. Raises `StartupError`."""
        return self._router.bind(host, port)

    def close(self) -> None:
        """Give the port back without having run."""
        self._router.close()

    async def run(self, compute: Compute) -> None:
        """Serve until `stop`, or until a `drain` has ended. Raises `RunFailed` if the compute thread hangs."""
        self._traits = compute.traits
        self._intake = Intake(self.info, self._limits, self._traits)
        self._requests = RequestTable(
            self._sessions,
            Scheduler(
                max_batch_tokens=self._traits.batch_limits.max_batch_tokens,
                max_wait_seconds=self._settings.max_wait_seconds,
                costs=self._traits.costs,
            ),
            ReplyCache(self._settings.reply_memory_bytes),
            Credit(
                self._settings.max_inflight_requests,
                self._settings.max_inflight_bytes,
                self._settings.max_total_inflight_bytes,
            ),
        )
        self._worker = Worker(compute, self._finish_batch, clock=self._clock, failpoint=self._failpoint)
        self._give_back = GiveBack(resident_bytes())
        self._router.start(self._receive, self._dispatch)
        try:
            while not self._stopped.is_set():
                self._keep_house()
                await _wait_at_most(self._stopped, HOUSEKEEPING_SECONDS)
        finally:
            if self._dispatch_later is not None:
                self._dispatch_later.cancel()
            if not self._stuck and not await self._worker.stop(LAST_PASS_SECONDS):
                logger.warning("the pass that runs has not ended in %.0f s; going without it", LAST_PASS_SECONDS)
            self._router.close()
        if self._stuck:
            raise RunFailed(
                f"a pass has not ended in {self._settings.stuck_seconds:g} s; the device or its driver may hang. "
                "Start the daemon again: its clients wait for it, and lose nothing"
            )

    def stop(self) -> None:
        """End as soon as the pass that runs has ended. To be called on the loop."""
        self._stopped.set()

    def drain(self) -> None:
        """Take no new forward, let open steps end for up to `drain_seconds`, then stop. To be called on the loop."""
        if self._draining_until is not None:
            return
        self._draining_until = self._clock() + self._settings.drain_seconds
        drain_ms = round(self._settings.drain_seconds * 1000)
        for session in self._sessions:
            self._send(session.peer, GoAway(session=session.id, epoch=self._epoch, drain_ms=drain_ms))

    def reload_tenants(self) -> None:
        """Read the list of tenants again; who is not on it any more loses its sessions. To be called on the loop.

        Raises `ConfigError`; the list that was there stays then.
        """
        assert self._allowlist is not None
        self._allowlist.reload()
        for session in list(self._sessions):
            if session.tenant is not None and self._allowlist.by_key(session.tenant.public_key) is None:
                self._close_session(session.id, f"the key of {session.tenant.name} was taken off the list")

    # --- from the socket ---------------------------------------------------------------------------------------

    def _receive(self, peer: bytes, tenant_key: str, frames: list[Frame]) -> None:
        tenant = None if self._allowlist is None else self._allowlist.by_key(tenant_key)
        if self._allowlist is not None and tenant is None:
            self._refuse(peer)
            return
        try:
            message = decode(frames, TO_DAEMON)
        except WireError as error:
            if frames and bytes(frames[0][: len(MAGIC)]) == MAGIC:
                self._answer_error(peer, error.request, error, session=error.session)
            logger.warning("refused a message of %d frames: %s", len(frames), error)
            self._router.distrust(peer)
            return
        header = message.header
        try:
            self._handle(_Sender(peer, tenant), header, message.buffers)
        except WireError as error:
            named = header.session if isinstance(header, InSession) else None
            self._answer_error(peer, getattr(header, "request", None), error, session=named)

    def _handle(self, sender: _Sender, header: Header, frames: Sequence[Frame]) -> None:
        """Do what a message asks. Raises `WireError`."""
        now = self._clock()
        match header:
            case Hello():
                self._on_hello(sender, header, now)
            case Forward() | Backward():
                self._on_work(self._session(header, sender, now), header, frames, now)
            case Release():
                self._requests.release(self._session(header, sender, now), header.step)
            case Cancel():
                self._on_cancel(self._session(header, sender, now), header)
            case Ping():
                self._on_ping(sender, header, now)
            case Bye():
                self._close_session(self._session(header, sender, now).id, "closed by its client")
            case StatusRequest():
                self._on_status(sender, header)

    def _refuse(self, peer: bytes) -> None:
        """Nothing is taken from a key that has been taken off the list: it is told once, then cut off."""
        if peer in self._forbidden:
            self._forbidden.discard(peer)
            self._router.cut(peer)
            return
        self._forbidden.add(peer)
        self._answer_error(peer, None, ForbiddenError())

    def _on_hello(self, sender: _Sender, header: Hello, now: float) -> None:
        session = self._sessions.of_peer(sender.peer, sender.tenant)
        if session is None or session.hello != header.request:  # otherwise it was delivered twice
            check_wanted(self.info, header)
            session = self._resumed(sender, header, now) or self._opened(sender, header, now)
        welcome = welcome_to(header, session.id, self._epoch, self.info, self._traits, self._limits_of(sender))
        self._router.hold(sender.peer)
        if not self._send(sender.peer, welcome):
            self._close_session(session.id, "its client has gone before it was open")

    def _limits_of(self, sender: _Sender) -> Limits:
        """What this client may have in flight, by itself or as all of its tenant's."""
        if sender.tenant is None:
            return self._limits
        most = min(self._limits.max_inflight_bytes, sender.tenant.max_inflight_bytes)
        return self._limits.model_copy(update={"max_inflight_bytes": most})

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
            self._router.cut(peer)  # what waits there for its client is answered here
        logger.info("session %s has a new connection", session.id.hex()[:8])
        return session

    def _opened(self, sender: _Sender, header: Hello, now: float) -> Session:
        if self._draining_until is not None:
            raise DrainingError()
        earlier = self._sessions.of_peer(sender.peer, sender.tenant)
        if earlier is not None:
            self._close_session(earlier.id, "its client opened another")
        quiet = self._sessions.eviction_candidate(sender.tenant, now)
        if quiet is not None:
            self._close_session(quiet.id, "quiet, and another one needs its place")
        session = self._sessions.open(sender.peer, now, hello=header.request, tenant=sender.tenant)
        whose = "" if sender.tenant is None else f" for {sender.tenant.name}"
        logger.info("session %s opened%s (zsl %r, %s)", session.id.hex()[:8], whose, header.software, header.dtype)
        return session

    def _on_work(self, session: Session, header: Forward | Backward, frames: Sequence[Frame], now: float) -> None:
        answer = self._requests.repeated(session, header, frames)
        if answer is None:
            request = self._intake.request(session, header, frames, now, draining=self._draining_until is not None)
            self._requests.add(request, now, unsent=self._router.unsent_bytes, all_unsent=self._router.all_unsent_bytes)
        elif answer:
            self._router.send(session.peer, answer)

    def _on_cancel(self, session: Session, header: Cancel) -> None:
        request = self._requests.get(session, header.request)
        if request is not None and request.state is State.QUEUED:
            self._end(request, CancelledByClientError())
        else:
            self._requests.release(session, header.request)

    def _on_ping(self, sender: _Sender, header: Ping, now: float) -> None:
        self._check_epoch(header)
        session = self._sessions.renew(header.session, now, tenant=sender.tenant)
        if sender.peer not in (session.peer, session.pulse):
            if session.pulse is not None:
                self._router.release(session.pulse)
            session.pulse = sender.peer
            self._router.hold(sender.peer)
        pong = Pong(
            session=session.id,
            request=header.request,
            epoch=self._epoch,
            progress_age_ms=round(self._worker.busy_seconds(now) * 1000),
            inflight_requests=self._requests.inflight(session),
        )
        self._send(sender.peer, pong)

    def _on_status(self, sender: _Sender, header: StatusRequest) -> None:
        status = status_for(
            header,
            self._epoch,
            self.info,
            self._traits,
            sessions=len(self._sessions),
            queued_requests=self._requests.stats.queued,
            held_bytes=self._sessions.held_bytes,
        )
        self._send(sender.peer, status)

    def _session(self, header: InSession, sender: _Sender, now: float) -> Session:
        self._check_epoch(header)
        return self._sessions.get(header.session, sender.peer, now, tenant=sender.tenant)

    def _check_epoch(self, header: InSession) -> None:
        if header.epoch != self._epoch:
            raise StaleEpochError()

    # --- to the compute thread and back ------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """If the device is free, give it what is queued: after all that has arrived, so that it can share a pass."""
        if self._worker.busy_since is not None:
            return
        if self._dispatch_later is not None:
            self._dispatch_later.cancel()
            self._dispatch_later = None
        now = self._clock()
        self._end_expired(now)
        requests = self._requests.take_batch(now)
        if not requests:
            if self._requests.waits_until is not None:
                loop = asyncio.get_running_loop()
                self._dispatch_later = loop.call_later(self._requests.waits_until - now, self._dispatch)
            return
        lengths = [length for request in requests if request.keep for length in request.shape.lengths]
        room = bool(lengths) and self._sessions.make_room(self._traits.graph_memory.nbytes(lengths))
        self._worker.give(requests, Batch(tuple(self._work(request, room) for request in requests)))

    def _work(self, request: Request, room: bool) -> Work:
        stash = request.held.stash if request.held else None
        return Work(request.kind, request.buffers, request.shape, request.sharing, self._keep(request, room), stash)

    def _keep(self, request: Request, room: bool) -> Keep:
        """What to keep of a forward, if there is room for the graph of its pass. A backward in other company than its
        forward needs products, else a graph."""
        if not request.keep:
            return Keep.NOTHING
        if not room:
            return Keep.INPUT
        if request.sharing == Alone():
            return Keep.GRAPH
        return Keep.PRODUCTS if self._traits.deterministic else Keep.GRAPH_AND_PRODUCTS

    def _finish_batch(self, batch: Finished[Request]) -> None:
        self._give_back.freed(self._clock())
        self._requests.charge(batch.tickets, batch.ended - batch.started, self._clock())
        self._router.drain()  # what arrived meanwhile can share the next pass, which begins here
        for request, outcome in zip(batch.tickets, batch.outcomes, strict=True):
            self._end(request, outcome, merged=len(batch.tickets), started=batch.started, ended=batch.ended)

    def _end(
        self, request: Request, outcome: Outcome, *, merged: int = 1, started: float = 0.0, ended: float = 0.0
    ) -> None:
        """End a request and answer it, unless its session was closed meanwhile."""
        peer, session, request_id = request.session.peer, request.session.id, request.header.request
        if request.state is State.ABANDONED:
            self._requests.end(request, outcome)
        elif isinstance(outcome, WireError):
            self._requests.end(request, outcome)
            self._answer_error(peer, request_id, outcome, session=session)
        else:
            result = Result(
                session=session,
                request=request_id,
                epoch=self._epoch,
                merged=merged,
                queue_us=round((started - request.arrived) * 1e6),
                compute_us=round((ended - started) * 1e6),
                tensors=[descriptor for descriptor, _ in outcome.buffers.values()],
            )
            frames = encode(result, [buffer for _, buffer in outcome.buffers.values()])
            self._requests.end(request, outcome, frames)
            if not self._router.send(peer, frames):
                # Gone, or it does not read. Its session is there while its lease lasts, and it can ask again.
                self._router.cut(peer)

    def _end_expired(self, now: float) -> None:
        for request in self._requests.expired(now):
            self._end(request, DeadlineError())

    # --- housekeeping and answers ------------------------------------------------------------------------------

    def _keep_house(self) -> None:
        now = self._clock()
        self._end_expired(now)
        for session in self._sessions.expired(now):
            self._close_session(session.id, "nothing was heard of it for its lease")
            for peer in (session.peer, session.pulse):
                if peer is not None:
                    self._router.cut(peer)  # its host may be gone without a word, and the connections still be there
        for peer in self._router.slow_peers(now):
            for slow in [session for session in self._sessions if session.peer == peer]:
                self._close_session(slow.id, "its client does not read its answers")
            self._router.cut(peer)
        self._forbidden = {peer for peer in self._forbidden if self._router.is_connected(peer)}
        if self._worker.busy_seconds(now) > self._settings.stuck_seconds:
            self._stuck = True
            self.stop()
        self._give_memory_back(now)
        if self._draining_until is not None:
            open_steps = any(session.held or self._requests.inflight(session) for session in self._sessions)
            if not open_steps or now >= self._draining_until:
                self.stop()

    def _give_memory_back(self, now: float) -> None:
        """Give freed memory back to the system when it is time, on another thread than the loop's."""
        if self._giving_back is not None and not self._giving_back.done():
            return
        busy = self._worker.busy_since is not None or self._requests.stats.queued > 0
        held, resident = self._sessions.held_bytes, resident_bytes()
        if self._give_back.is_due(now, busy=busy, held_bytes=held, resident_bytes=resident):
            self._giving_back = asyncio.get_running_loop().run_in_executor(None, give_back_freed_memory)

    def _close_session(self, session_id: bytes, why: str) -> None:
        """Forget a session, what is held for it, and what of it is queued."""
        session = self._sessions.close(session_id)
        assert session is not None
        self._requests.close(session)
        for peer in (session.peer, session.pulse):
            if peer is not None:
                self._router.release(peer)
        self._give_back.freed(self._clock())
        logger.info("session %s ended: %s", session_id.hex()[:8], why)

    def _answer_error(
        self, peer: bytes, request: int | None, error: WireError, *, session: bytes | None = None
    ) -> None:
        """Answer a message that named this request and session."""
        message = Error(
            request=request,
            session=session,
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
