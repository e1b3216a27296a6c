"""Temporary server on the daemon's port while its model loads: answers LOADING, retry later.

Runs in its own thread, because loading uses the main thread, where signals arrive. Imports no torch.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from zsl.errors import LoadingError, StaleEpochError, WireError
from zsl.transport.router import Router
from zsl.trunk.access.options import Access
from zsl.wire.frames import MAX_HEADER_BYTES, Frame, decode, encode
from zsl.wire.messages import TO_DAEMON, Error, InSession

logger = logging.getLogger(__name__)

RETRY_MS = 500
MAX_CONNECTIONS = 4096
SEND_HWM_MESSAGES = 64


class Loading:
    """Binds `host` and `port` from `with` to `close`, and answers every message with a LOADING error.

    `with` raises `StartupError` if the port cannot be bound. `endpoint` has the bound port.
    """

    def __init__(self, host: str, port: int, access: Access | None) -> None:
        self._host = host
        self._port = port
        self._access = access
        self._epoch = secrets.token_bytes(16)
        self._began = time.monotonic()
        self._started: Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=self._run, name="zsl-loading", daemon=True)

    @property
    def endpoint(self) -> str:
        return self._started.result()[0]

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    @property
    def is_open(self) -> bool:
        """True while this server holds the port, before the trunk is served."""
        return self._thread.is_alive()

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the port. Idempotent."""
        if self._thread.is_alive():
            _, loop, closing = self._started.result()
            loop.call_soon_threadsafe(closing.set)
            self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._answer())
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _answer(self) -> None:
        closing = asyncio.Event()
        self._router = Router(
            max_message_bytes=MAX_HEADER_BYTES,
            send_hwm_messages=SEND_HWM_MESSAGES,
            max_connections=MAX_CONNECTIONS,
            keys=None if self._access is None else self._access.keys,
            allowed=None if self._access is None else self._access.allowlist.allows,
        )
        endpoint = self._router.bind(self._host, self._port)
        self._router.start(self._receive, lambda: None)
        self._started.set_result((endpoint, asyncio.get_running_loop(), closing))
        try:
            await closing.wait()
        finally:
            self._router.close()

    def _receive(self, peer: bytes, tenant_key: str, frames: list[Frame]) -> None:
        try:
            header = decode(frames, TO_DAEMON).header
        except WireError as unreadable:
            logger.debug("refused a message of %d frames: %s", len(frames), unreadable)
            return
        error: WireError
        if isinstance(header, InSession):
            error = StaleEpochError()  # from an earlier daemon on this port
        else:
            seconds = time.monotonic() - self._began
            error = LoadingError(
                f"the daemon is still loading its model ({seconds:.0f} s so far): wait until it says that it is ready",
                retry_after_ms=RETRY_MS,
            )
        answer = Error(
            request=getattr(header, "request", None),
            session=header.session if isinstance(header, InSession) else None,
            epoch=self._epoch,
            code=error.code,
            retry=error.retry,
            retry_after_ms=error.retry_after_ms,
            text=str(error),
        )
        self._router.send(peer, encode(answer))
