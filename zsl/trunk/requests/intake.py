"""Convert a FORWARD or BACKWARD message to a validated request, ready to queue.

Imports no sockets; time is an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zsl.errors import DrainingError, ForwardOnlyError, MalformedError
from zsl.trunk.costs import CacheMemory
from zsl.trunk.requests.adapter_intake import AdapterIntake
from zsl.trunk.requests.request_table import Request
from zsl.trunk.requests.reveal import asked_reveals, check_answer_size, check_gradients, taken_gradients
from zsl.trunk.requests.validate import cache_rows, check_backward, check_forward, sharing_behind_cache, sharing_of
from zsl.trunk.scheduling.jobs import KINDS, Job
from zsl.trunk.sessions.cache_store import CacheStore
from zsl.trunk.sessions.sessions import Session
from zsl.trunk.settings import TrunkInfo, TrunkTraits
from zsl.trunk.work import Alone, Buffers, CacheUse, Keep, Kind, Shape
from zsl.wire.frames import Frame
from zsl.wire.messages import Backward, Forward, Limits


@dataclass(frozen=True, slots=True)
class Intake:
    """Validates requests for one trunk, and converts them for the queue."""

    info: TrunkInfo
    limits: Limits
    traits: TrunkTraits
    adapters: AdapterIntake
    caches: CacheStore
    cache_memory: CacheMemory | None  # None: no keys and values are kept

    def request(
        self, session: Session, header: Forward | Backward, frames: Sequence[Frame], now: float, *, draining: bool
    ) -> Request:
        """Validate a message, and return its request. Raises `WireError`. `now` is in seconds."""
        buffers: Buffers = {d.role: (d, frame) for d, frame in zip(header.tensors, frames, strict=True)}
        hidden_size = self.info.model.hidden_size
        held, nbytes = None, sum(descriptor.nbytes for descriptor in header.tensors)
        adapter, cache = self.adapters.use(session, header, now), None
        prefix = next(iter(adapter.version.layout.prefix), None) if adapter else None
        match header:
            case Forward():
                if draining:
                    raise DrainingError()
                if header.keep and self.info.forward_only:
                    raise ForwardOnlyError()
                kind, keep = Kind.FORWARD if header.cache is None else Kind.DECODE, header.keep
                reveals = asked_reveals(header, self.info)
                shape = check_forward(buffers, hidden_size, self.limits, prefix, header.cache)
                cache = self._cache(session, header, shape, buffers)
                # More than the request's own bytes, which stand for those of an ordinary answer.
                nbytes += check_answer_size(reveals, buffers, shape, self.info, self.traits, self.limits)
            case Backward():
                if self.info.forward_only:
                    raise ForwardOnlyError()
                kind, keep = Kind.BACKWARD, False
                if "activations" not in buffers:
                    held = session.held.get(header.step)
                of_revealed = taken_gradients(buffers, self.info)
                shape = check_backward(buffers, held.shape if held else None, hidden_size, self.limits, prefix)
                reveals = check_gradients(of_revealed, shape, held.reveals if held else None, self.info, self.traits)
                buffers.update(of_revealed)
                if held and held.adapter != header.adapter:
                    raise MalformedError("a backward runs with the adapter of its forward")
        sharing = held.sharing if held else sharing_of(buffers, shape, self.traits)
        if cache is not None:
            sharing = sharing_behind_cache(shape, self.traits)
        if reveals or prefix or (adapter is not None and not self.traits.merges_adapters):
            sharing = Alone()
        job = Job(
            (session.id, header.request),
            tenant=session.owner,
            client=session.id,
            kind=kind,
            tokens=shape.total_tokens,
            merge_key=None if sharing == Alone() else sharing,
            cost_seconds=KINDS[kind].cost(self.traits.costs).seconds(shape.total_tokens),
            deadline=now + header.budget_ms / 1000,
            frees_graph=held is not None and held.stash.keep.value > Keep.INPUT.value,
        )
        return Request(
            session, header, kind, buffers, shape, sharing, keep, held, now, nbytes, job, adapter, reveals, cache
        )

    def _cache(self, session: Session, header: Forward, shape: Shape, buffers: Buffers) -> CacheUse | None:
        """Return the cache that a forward runs with. Raises `WireError`."""
        if header.cache is None:
            return None
        if self.cache_memory is None:
            raise MalformedError("this daemon keeps no keys and values: send a forward without a cache")
        if header.keep:
            raise MalformedError("a forward with a cache has no backward")
        return self.caches.use(
            session,
            header.cache,
            cache_rows(buffers, shape),
            request=header.request,
            rows=shape.rows,
            tokens=shape.tokens,
            memory=self.cache_memory,
        )
