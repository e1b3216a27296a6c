"""A trunk for a checkpoint, served from a thread of this process: quick to start, real in everything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import TracebackType
from typing import Self

import torch

from zsl.split.cut import parse_cut
from zsl.trunk.access.options import Access
from zsl.trunk.costs import BatchLimits
from zsl.trunk.daemon.load import TrunkPlan, plan_trunk
from zsl.trunk.daemon.server import TrunkServer
from zsl.trunk.malloc import keep_freed_memory
from zsl.trunk.work import Compute
from zsl.wire.messages import Quantization, Reveal

from .models import CUT
from .server_thread import ServerThread


class TrunkThread(ServerThread):
    """Loads and serves a trunk within `with`."""

    def __init__(self, plan: TrunkPlan, *, deterministic: bool = False, access: Access | None = None) -> None:
        super().__init__()
        self._plan = plan
        self._deterministic = deterministic
        self._access = access

    def __enter__(self) -> Self:
        keep_freed_memory()
        return super().__enter__()

    def _make(self) -> tuple[TrunkServer, Compute]:
        sizes = {} if self._deterministic else asdict(BatchLimits())
        compute = self._plan.load(**sizes, deterministic=self._deterministic)
        return TrunkServer(self._plan.info, access=self._access), compute


class InsteadOfAProcess:
    """In place of `EmbeddedTrunk` in tests that call a command: no process, and nothing loaded before it is asked for.

    A thread that loads while the test's own loads would change what both find in the libraries.
    """

    server_key = client_key = None

    def __init__(self, model: str, cut: str | None, dtype: str, *, deterministic: bool = False) -> None:
        self._given = model, cut, dtype, deterministic
        self._running: TrunkThread | None = None

    @property
    def endpoint(self) -> str:
        if self._running is None:
            model, cut, dtype, deterministic = self._given
            parsed = None if cut is None else parse_cut(cut)
            plan = plan_trunk(model, parsed, getattr(torch, dtype), "cpu", forward_only=False)
            self._running = TrunkThread(plan, deterministic=deterministic).__enter__()
        return self._running.endpoint

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running is not None:
            self._running.__exit__(kind, error, trace)


@contextmanager
def served(
    reference: str,
    *,
    cut: str = CUT,
    forward_only: bool = False,
    quantize: Quantization | None = None,
    reveals: tuple[Reveal, ...] = (),
) -> Iterator[str]:
    """The endpoint of a trunk that serves `reference`."""
    how = {"forward_only": forward_only, "quantize": quantize, "reveals": reveals}
    plan = plan_trunk(reference, parse_cut(cut), torch.float32, "cpu", **how)  # type: ignore[arg-type]
    with TrunkThread(plan) as trunk:
        yield trunk.endpoint
