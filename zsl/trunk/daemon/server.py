"""Trunk server: start-up, main loop and shutdown, on one asyncio loop and one compute thread.

The loop owns the socket, the sessions and the requests; the thread owns the model. They communicate by a queue and
`call_soon_threadsafe` (`zsl.trunk.compute.worker`). Imports no torch.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from zsl.errors import RunFailed
from zsl.transport.router import Router
from zsl.trunk.access.options import Access
from zsl.trunk.failpoints import Failpoint
from zsl.trunk.malloc import TrimPolicy, give_back_freed_memory, resident_bytes
from zsl.trunk.requests.adapter_intake import AdapterIntake
from zsl.trunk.requests.answers import Answers
from zsl.trunk.requests.batch_runner import BatchRunner
from zsl.trunk.requests.credit import Credit
from zsl.trunk.requests.handlers import Handlers
from zsl.trunk.requests.intake import Intake
from zsl.trunk.requests.reply_cache import ReplyCache
from zsl.trunk.requests.request_table import RequestTable
from zsl.trunk.scheduling.scheduler import Scheduler
from zsl.trunk.sessions.adapter_store import AdapterStore
from zsl.trunk.sessions.cache_store import CacheStore
from zsl.trunk.sessions.sessions import Sessions
from zsl.trunk.settings import ServerSettings, TrunkInfo
from zsl.trunk.stash_memory import default_graph_memory
from zsl.trunk.work import Compute
from zsl.wire.messages import GoAway

logger = logging.getLogger(__name__)

HOUSEKEEPING_SECONDS = 0.2
LAST_PASS_SECONDS = 30.0  # wait at shutdown for the running pass
# Room in a send queue for PONG, ERROR and GOAWAY, beside the answers to a session's credit of requests.
CONTROL_MESSAGES = 64


@dataclass(slots=True)
class _Running:
    """Parts of a server that need its computation. `trimming`: the pending `malloc_trim`."""

    requests: RequestTable
    runner: BatchRunner
    handlers: Handlers
    trim_policy: TrimPolicy
    trimming: asyncio.Future[bool] | None = None


class TrunkServer:
    """Serves one trunk. `clock` returns seconds, `new_id` 16 random bytes.

    With `access`, traffic is encrypted, and only tenants on its list may connect. Its state, to look at on the loop:
    `router`, `sessions`, `adapters`, `caches` and `replies`.
    """

    def __init__(
        self,
        info: TrunkInfo,
        settings: ServerSettings | None = None,
        *,
        access: Access | None = None,
        failpoint: Failpoint | None = None,
        clock: Callable[[], float] = time.monotonic,
        new_id: Callable[[], bytes] = lambda: secrets.token_bytes(16),
    ) -> None:
        self.info = info
        self._settings = settings or ServerSettings()
        self._allowlist = None if access is None else access.allowlist
        self._failpoint = failpoint
        self._clock = clock
        self.router = Router(
            max_message_bytes=self._settings.limits(info).max_message_bytes,
            send_hwm_messages=self._settings.max_inflight_requests + CONTROL_MESSAGES,
            max_connections=self._settings.max_connections,
            max_receiving_bytes=self._settings.max_total_inflight_bytes,
            keys=None if access is None else access.keys,
            allowed=None if access is None else access.allowlist.allows,
            clock=clock,
        )
        self._answers = Answers(self.router, epoch=new_id())
        self.sessions = Sessions(
            lease_seconds=self._settings.lease_seconds,
            max_sessions=self._settings.max_sessions,
            stash_memory_bytes=self._settings.stash_memory_bytes,
            new_id=new_id,
        )
        self.adapters = AdapterStore(self._settings.adapter_memory_bytes)
        self.caches = CacheStore(self._settings.cache_memory_bytes)
        self.replies = ReplyCache(self._settings.reply_memory_bytes)
        self._running: _Running | None = None
        self._draining_until: float | None = None
        self._stuck = False  # a pass hangs
        self._stopped = asyncio.Event()

    @property
    def epoch(self) -> bytes:
        """The id of this run of the daemon, 16 bytes."""
        return self._answers.epoch

    def bind(self, host: str, port: int) -> str:
        """Bind the port, and return the endpoint. Answers nothing before `run`. Raises `StartupError`."""
        return self.router.bind(host, port)

    def close(self) -> None:
        """Release the port of a server that has not run."""
        self.router.close()

    async def run(self, compute: Compute) -> None:
        """Serve until `stop`, or the end of a `drain`. Raises `RunFailed` if the compute thread hangs."""
        running = self._running = self._start(compute)
        try:
            while not self._stopped.is_set():
                self._keep_house(running)
                await _wait_at_most(self._stopped, HOUSEKEEPING_SECONDS)
        finally:
            if not self._stuck and not await running.runner.stop(LAST_PASS_SECONDS):
                logger.warning("the running pass has not ended in %.0f s; stopping without it", LAST_PASS_SECONDS)
            self.router.close()
        if self._stuck:
            raise RunFailed(
                f"a pass has not ended in {self._settings.stuck_seconds:g} s; the device or its driver may hang. "
                "Start the daemon again: its clients reconnect and repeat their requests"
            )

    def stop(self) -> None:
        """Stop after the running pass. Call it on the loop."""
        self._stopped.set()

    def drain(self) -> None:
        """Refuse new forwards, let open steps end for up to `drain_seconds`, then stop. Call it on the loop."""
        if self._draining_until is not None:
            return
        self._draining_until = self._clock() + self._settings.drain_seconds
        drain_ms = round(self._settings.drain_seconds * 1000)
        for session in self.sessions:
            self._answers.send(session.peer, GoAway(session=session.id, epoch=self.epoch, drain_ms=drain_ms))

    def reload_tenants(self) -> None:
        """Reload the list of tenants, and close the sessions of removed ones. Call it on the loop.

        Raises `ConfigError`, and keeps the old list, if the new one is invalid.
        """
        assert self._allowlist is not None
        self._allowlist.reload()
        if self._running is None:
            return
        for session in list(self.sessions):
            tenant = session.tenant
            if tenant is not None and self._allowlist.by_key(tenant.public_key) is None:
                self._running.handlers.close_session(session, f"the key of {tenant.name} was taken off the list")

    def _start(self, compute: Compute) -> _Running:
        """Build the parts that serve this computation, and begin to receive."""
        settings, traits = self._settings, compute.traits
        if settings.saves_graphs:
            self.sessions.graph_memory_of = partial(default_graph_memory, traits.weight_bytes)
        granted = settings.granted_tokens(self.info, traits.pass_memory)
        limits = settings.limits(self.info).model_copy(update={"max_request_tokens": granted})
        scheduler = Scheduler(
            max_batch_tokens=min(traits.batch_limits.max_batch_tokens, granted),
            max_wait_seconds=settings.max_wait_seconds,
            decode_share=settings.decode_share,
            costs=traits.costs,
        )
        credit = Credit(settings.max_inflight_requests, settings.max_inflight_bytes, settings.max_total_inflight_bytes)
        requests = RequestTable(self.sessions, self.adapters, self.caches, scheduler, self.replies, credit)
        of_adapters = settings.adapter_limits(traits)
        adapters = AdapterIntake(self.adapters, traits.adaptable, traits.key_sizes, traits.weight_norms, of_adapters)
        cache_memory = traits.cache_memory if settings.cache_memory_bytes else None
        trim_policy = TrimPolicy(resident_bytes(), settings.stash_memory_bytes)
        runner = BatchRunner(
            compute,
            requests,
            self._answers,
            trim_policy,
            stash_memory_bytes=settings.stash_memory_bytes,
            clock=self._clock,
            failpoint=self._failpoint,
        )
        handlers = Handlers(
            Intake(self.info, limits, traits, adapters, self.caches, cache_memory),
            requests,
            runner,
            self._answers,
            trim_policy,
            self._allowlist,
            clock=self._clock,
            is_draining=lambda: self._draining_until is not None,
        )
        self.router.start(handlers.receive, runner.step)
        return _Running(requests, runner, handlers, trim_policy)

    def _keep_house(self, running: _Running) -> None:
        now = self._clock()
        running.runner.end_expired(now)
        self._close_dead_sessions(running.handlers, now)
        running.handlers.forget_gone_peers()
        if running.runner.busy_seconds(now) > self._settings.stuck_seconds:
            self._stuck = True
            self.stop()
        self._give_memory_back(running, now)
        if self._draining_until is not None:
            open_steps = any(session.held or running.requests.inflight(session) for session in self.sessions)
            if not open_steps or now >= self._draining_until:
                self.stop()

    def _close_dead_sessions(self, handlers: Handlers, now: float) -> None:
        """Close the sessions whose lease has ended, or whose client does not read its answers."""
        for session in self.sessions.expired(now):
            handlers.close_session(session, "no message during its lease")
            for peer in session.peers:
                self.router.cut(peer)  # its host may have died without closing its connections
        for peer in self.router.slow_peers(now):
            for slow in [session for session in self.sessions if session.peer == peer]:
                handlers.close_session(slow, "its client does not read its answers")
            self.router.cut(peer)

    def _give_memory_back(self, running: _Running, now: float) -> None:
        """Return freed memory to the system when due, in another thread."""
        if running.trimming is not None and not running.trimming.done():
            return
        busy = running.runner.is_busy or running.requests.queued > 0
        resident = resident_bytes() - self.caches.nbytes - self.adapters.nbytes  # these have budgets of their own
        held = self.sessions.held_bytes
        if running.trim_policy.is_due(now, busy=busy, held_bytes=held, resident_bytes=resident):
            running.trimming = asyncio.get_running_loop().run_in_executor(None, give_back_freed_memory)


async def _wait_at_most(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, for at most `seconds`."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        pass
