"""A trunk for a checkpoint, served from a thread of this process: quick to start, real in everything else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from types import TracebackType
from typing import Self

import torch

from zsl.split.cut import parse_cut
from zsl.trunk.costs import BatchLimits
from zsl.trunk.daemon.load import TrunkPlan, plan_trunk
from zsl.trunk.daemon.server import TrunkServer
from zsl.trunk.malloc import keep_freed_memory
from zsl.wire.messages import Quantization, Reveal

from .models import CUT

START_SECONDS = 600.0
STOP_SECONDS = 30.0


class TrunkThread:
    """Loads and serves a trunk within `with`. `endpoint`: its address."""

    def __init__(self, plan: TrunkPlan, *, deterministic: bool = False) -> None:
        self._plan = plan
        self._deterministic = deterministic
        self._started: Future[tuple[str, asyncio.AbstractEventLoop, TrunkServer]] = Future()
        self._thread = threading.Thread(target=self._run, name="trunk", daemon=True)

    @property
    def endpoint(self) -> str:
        return self._started.result(0)[0]

    def __enter__(self) -> Self:
        keep_freed_memory()
        self._thread.start()
        self._started.result(START_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _, loop, server = self._started.result(0)
        loop.call_soon_threadsafe(server.stop)
        self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _serve(self) -> None:
        sizes = {} if self._deterministic else asdict(BatchLimits())
        compute = self._plan.load(**sizes, deterministic=self._deterministic)
        server = TrunkServer(self._plan.info)
        endpoint = server.bind("127.0.0.1", 0)
        self._started.set_result((endpoint, asyncio.get_running_loop(), server))
        await server.run(compute)


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
