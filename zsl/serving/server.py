"""Make the HTTP server: the application in uvicorn. Imports no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import uvicorn
from starlette.applications import Starlette

from zsl.serving.app import Api, Prepare
from zsl.serving.service import Service

SHUTDOWN_SECONDS = 30  # for answers that are under way
WAITING_FOR_EACH = 32  # requests that may wait for each that runs
# Of an idle connection. HTTP clients keep theirs for 5 s, as uvicorn does by default: a request that is sent when the
# server closes would fail with a reset.
KEEP_ALIVE_SECONDS = 75


def make_server(
    names: list[str],
    prepare: Prepare,
    *,
    api_key: str | None,
    parallel: int,
    on_ready: Callable[[], None],
) -> uvicorn.Server:
    """Return the server of the models. Its `run` returns after a signal, once answers under way have ended.

    They have `SHUTDOWN_SECONDS`; a second Ctrl-C ends at once.
    """
    service = Service(parallel, most_waiting=parallel * WAITING_FOR_EACH)

    @asynccontextmanager
    async def lifespan(application: Starlette) -> AsyncIterator[None]:
        on_ready()
        try:
            yield
        finally:
            service.close()

    config = uvicorn.Config(
        Api(names, prepare, service, api_key=api_key).application(lifespan),
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    return uvicorn.Server(config)
