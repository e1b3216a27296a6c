"""A trunk server on an event loop of its own, in a thread of this process."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from zsl.trunk.daemon.server import TrunkServer
from zsl.trunk.work import Compute

START_SECONDS = 600.0  # to load a model
STOP_SECONDS = 30.0


class ServerThread(ABC):
    """Serves within `with`. `endpoint`: its address; `loop`: its event loop."""

    server: TrunkServer

    def __init__(self, *, port: int = 0) -> None:
        self._port = port
        self._started: Future[str] = Future()
        self._thread = threading.Thread(target=self._run, name="trunk", daemon=True)

    @abstractmethod
    def _make(self) -> tuple[TrunkServer, Compute]:
        """The server, which is not bound yet, and its computation. On the thread."""

    @property
    def endpoint(self) -> str:
        return self._started.result(START_SECONDS)

    def reload_tenants(self) -> None:
        """As SIGHUP does. Raises what it would log."""

        async def reload() -> None:
            self.server.reload_tenants()

        asyncio.run_coroutine_threadsafe(reload(), self.loop).result(STOP_SECONDS)

    def stop(self) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.server.stop)
        self.join()

    def join(self) -> None:
        self._thread.join(STOP_SECONDS)
        assert not self._thread.is_alive()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self.endpoint
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.server, compute = self._make()
        self._started.set_result(self.server.bind("127.0.0.1", self._port))
        await self.server.run(compute)
