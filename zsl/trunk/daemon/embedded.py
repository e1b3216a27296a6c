"""Embedded trunk: a trunk server in a thread of this process, on a loopback TCP port."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from dataclasses import asdict
from types import TracebackType
from typing import Self

from zsl.trunk.costs import BatchLimits
from zsl.trunk.daemon.load import TrunkPlan
from zsl.trunk.daemon.server import TrunkServer
from zsl.trunk.malloc import keep_freed_memory

START_SECONDS = 600.0
STOP_SECONDS = 30.0


class EmbeddedTrunk:
    """Loads and serves a trunk within `with`. `endpoint`: its address."""

    def __init__(self, plan: TrunkPlan, *, deterministic: bool = False) -> None:
        self._plan = plan
        self._deterministic = deterministic
        self._started: Future[tuple[str, asyncio.AbstractEventLoop, TrunkServer]] = Future()
        self._thread = threading.Thread(target=self._run, name="zsl-embedded-trunk", daemon=True)

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
        # One client: there are no requests to merge, so the batch sizes need no measuring.
        sizes = {} if self._deterministic else asdict(BatchLimits())
        compute = self._plan.load(**sizes, deterministic=self._deterministic)
        server = TrunkServer(self._plan.info)
        endpoint = server.bind("127.0.0.1", 0)
        self._started.set_result((endpoint, asyncio.get_running_loop(), server))
        await server.run(compute)
