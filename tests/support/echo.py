"""A trunk server without a model, in this process: it answers activations with themselves plus one, gradients with
themselves. For tests of the wire, the server and the connection."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from zsl.errors import InternalError
from zsl.transport.peer_connection import State
from zsl.trunk.access.options import Access
from zsl.trunk.costs import UNKNOWN_COSTS, BatchLimits
from zsl.trunk.daemon.server import TrunkServer
from zsl.trunk.requests.request_table import RequestStats
from zsl.trunk.settings import ServerSettings, TrunkInfo, TrunkTraits
from zsl.trunk.work import Batch, Compute, Done, Keep, Kind, Outcome, Work
from zsl.wire.messages import Cut, FloatDtypeName, ModelIdentity, Quantization

from .server_thread import ServerThread

HIDDEN = 4
ROW_TOKENS = 64
IDENTITY = ModelIdentity(
    model_type="echo", layers=6, hidden_size=HIDDEN, config_digest="c" * 64, weights_digest="d" * 64
)
CUT = Cut(start=2, stop=4)
NO_ADAPTER: dict[str, Any] = {"adapter": None, "adapter_sum": None, "adapter_gradients": False}  # fields of a BACKWARD
TRAITS = TrunkTraits(
    parameters=0, merges=True, packs=True, deterministic=False, costs=UNKNOWN_COSTS, batch_limits=BatchLimits()
)
POISON = 666.0
WAIT_SECONDS = 30


@dataclass(frozen=True, slots=True)
class EchoStash:
    nbytes: int
    keep: Keep
    trunk: EchoCompute

    def demoted(self) -> EchoStash | None:
        return None if self.keep is Keep.INPUT else EchoStash(self.nbytes // 2, Keep.INPUT, self.trunk)

    def drop(self) -> None:
        self.trunk.dropped += 1


class EchoCompute:
    """Remembers the batches that it ran. `gate` holds them back while it is cleared. An activation of POISON fails.

    `used`: what the stash of each backward kept, and whether it ran layer by layer. `graph_bytes`: of a stash that
    keeps more than inputs; None: as many as the message."""

    def __init__(self, traits: TrunkTraits) -> None:
        self.batches: list[list[Kind]] = []
        self.dropped = 0  # stashes
        self.used: list[tuple[Keep, bool]] = []
        self.graph_bytes: int | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Semaphore(0)
        self.traits = traits

    def run(self, batch: Batch) -> list[Outcome]:
        self.begun.release()
        assert self.gate.wait(WAIT_SECONDS), "the test never opened the gate"
        self.batches.append([work.kind for work in batch.works])
        stashes = [work.stash for work in batch.works if work.stash is not None]
        self.used += [(stash.keep, batch.by_layers) for stash in stashes]
        return [self._one(work) for work in batch.works]

    def _one(self, work: Work) -> Outcome:
        role = "gradients" if work.kind is Kind.BACKWARD else "activations"
        descriptor, buffer = work.buffers[role]
        values = np.frombuffer(buffer, dtype=np.float32)
        if values.size and values[0] == POISON:
            return InternalError("poisoned")
        nbytes = len(buffer) if self.graph_bytes is None or work.keep is Keep.INPUT else self.graph_bytes
        stash = None if work.keep is Keep.NOTHING else EchoStash(nbytes, work.keep, self)
        answer = (values if work.kind is Kind.BACKWARD else values + 1).astype(np.float32)
        return Done({role: (descriptor, answer.data.cast("B"))}, stash)


class EchoServer(ServerThread):
    """Serves within `with`. `port`: of its address."""

    def __init__(
        self,
        *,
        port: int = 0,
        forward_only: bool = False,
        settings: ServerSettings | None = None,
        model: ModelIdentity = IDENTITY,
        cut: Cut = CUT,
        dtype: FloatDtypeName = "f32",
        quantization: Quantization | None = None,
        row_tokens: int = ROW_TOKENS,
        compute: Compute | None = None,
        access: Access | None = None,
        **traits: Any,
    ) -> None:
        super().__init__(port=port)
        self._access = access
        self.compute = EchoCompute(replace(TRAITS, **traits))
        self._runs = compute or self.compute
        self._info = TrunkInfo(model, cut, dtype, forward_only, row_tokens, quantization)
        self._settings = settings

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    @property
    def sessions(self) -> int:
        """Number of open sessions."""
        return len(self.server.sessions)

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return len(self.server.router.connections)

    @property
    def connections_of_peers(self) -> int:
        """Count the connections that have shaken hands and are there."""
        connections = list(self.server.router.connections.values())
        return sum(connection.state is State.OPEN for connection in connections)

    @property
    def held_bytes(self) -> int:
        return self.server.sessions.held_bytes

    @property
    def requests(self) -> RequestStats:
        return self._parts.requests.stats

    @property
    def forbidden(self) -> int:
        """Number of connections that were told that their key is not on the list."""
        return self._parts.handlers.forbidden

    @property
    def _parts(self) -> Any:
        """Those of a server that has begun to serve."""
        assert self.server._running is not None
        return self.server._running

    def close_session(self, session: bytes) -> None:
        """As at the end of its lease."""

        def close() -> None:
            found = next(one for one in self.server.sessions if one.id == session)
            self._parts.handlers.close_session(found, "on purpose")

        self.loop.call_soon_threadsafe(close)

    def drain(self) -> None:
        self.loop.call_soon_threadsafe(self.server.drain)

    def stop(self) -> None:
        self.compute.gate.set()
        super().stop()

    def _make(self) -> tuple[TrunkServer, Compute]:
        return TrunkServer(self._info, self._settings, access=self._access), self._runs
