"""HTTP application of `zsl serve`: the paths of OpenAI's API, as a Starlette application. Imports no torch."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from zsl.errors import ZslError
from zsl.generation.pieces import Generated, Piece
from zsl.serving.answers import Answer, model_card, now
from zsl.serving.api_errors import ApiError, as_api_error, invalid_request
from zsl.serving.request_schemas import ChatRequest, CompletionRequest, Request
from zsl.serving.service import Generation, Job, Service

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 8 << 20
# Of a server without a key: a page in a browser could reach it under a name of its own that leads to loopback.
LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
Prepare = Callable[[Request], tuple[Job, Answer]]


class Api:
    """Handlers of the paths. `prepare` makes the job of a request, in a thread, as it may take long."""

    def __init__(self, names: Iterable[str], prepare: Prepare, service: Service, *, api_key: str | None) -> None:
        self._cards = {name: model_card(name, now()) for name in names}
        self._prepare = prepare
        self._service = service
        self._api_key = api_key

    def application(self, lifespan: Callable[[Starlette], AbstractAsyncContextManager[None]]) -> Starlette:
        """Return the application."""
        return Starlette(
            routes=[
                Route("/v1/models", self._admitted(self.list_models)),
                Route("/v1/models/{name:path}", self._admitted(self.show_model)),
                Route("/v1/chat/completions", self._admitted(self.chat), methods=["POST"]),
                Route("/v1/completions", self._admitted(self.complete), methods=["POST"]),
            ],
            exception_handlers={ApiError: _refuse, HTTPException: _refuse_path, Exception: _refuse},
            lifespan=lifespan,
        )

    async def list_models(self, request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": list(self._cards.values())})

    async def show_model(self, request: HttpRequest) -> Response:
        name = request.path_params["name"]
        if name not in self._cards:
            raise ApiError(404, f"the model {name!r} does not exist", param="model", code="model_not_found")
        return JSONResponse(self._cards[name])

    async def chat(self, request: HttpRequest) -> Response:
        return await self._answer(request, ChatRequest)

    async def complete(self, request: HttpRequest) -> Response:
        return await self._answer(request, CompletionRequest)

    def _admitted(self, handler: Callable[[HttpRequest], Awaitable[Response]]) -> Callable[..., Any]:
        async def admitted(request: HttpRequest) -> Response:
            self._check_key(request.headers)
            return await handler(request)

        return admitted

    def _check_key(self, headers: Mapping[str, str]) -> None:
        if self._api_key is None:
            host = headers.get("host", "")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name.lower() not in LOOPBACK_NAMES:
                raise ApiError(403, f"this server has no key, and is not known as {name!r}", code="unknown_host")
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._api_key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _answer(self, http: HttpRequest, schema: type[Request]) -> Response:
        body = await _body(http)
        generation = None

        def prepared() -> tuple[Request, Job, Answer]:
            request = _parsed(schema, body)
            return request, *self._prepare(request)

        try:
            request, job, answer = await asyncio.to_thread(prepared)
            generation = self._service.start(job)
            if request.stream:
                first = await _unless_hung_up(http, generation.next())  # an error before it still has a status code
                return _EventStream(_events(answer, first, generation), generation)
            pieces, made = await _unless_hung_up(http, _all(generation))
            return JSONResponse(answer.whole(pieces, made))
        except BaseException as error:
            if generation is not None:
                generation.cancel()
            if isinstance(error, Exception):
                raise _converted(error) from error
            raise


class _EventStream(StreamingResponse):
    """Server-sent events. The generation ends with the connection."""

    def __init__(self, events: AsyncIterator[bytes], generation: Generation) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()


async def _events(answer: Answer, first: Piece | Generated, generation: Generation) -> AsyncIterator[bytes]:
    try:
        for chunk in answer.first_chunks():
            yield _event(chunk)
        result = first
        while isinstance(result, Piece):
            if (said := answer.chunk(result)) is not None:
                yield _event(said)
            result = await generation.next()
        for chunk in answer.last_chunks(result):
            yield _event(chunk)
    except Exception as error:
        yield _event(_converted(error).body())
    else:
        yield b"data: [DONE]\n\n"


def _event(chunk: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


async def _all(generation: Generation) -> tuple[list[Piece], Generated]:
    pieces = []
    while isinstance(result := await generation.next(), Piece):
        pieces.append(result)
    return pieces, result


async def _unless_hung_up(http: HttpRequest, wanted: Coroutine[Any, Any, Any]) -> Any:
    """Await `wanted`, unless the client closes its connection first."""
    task = asyncio.ensure_future(wanted)
    hangup = asyncio.ensure_future(_hangup(http))
    try:
        await asyncio.wait({task, hangup}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _gone()
        return task.result()
    finally:
        task.cancel()
        hangup.cancel()


def _gone() -> ApiError:
    return ApiError(499, "the client has closed the connection")  # nobody reads it


async def _hangup(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _body(http: HttpRequest) -> bytes:
    """Read the body. Raises `ApiError` for one that is too large, or is not said to be JSON."""
    # A page of any site can make a browser send other types without asking first.
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the content type has to be application/json")
    body = bytearray()
    try:
        async for chunk in http.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise ApiError(413, f"the request has more than {MAX_BODY_BYTES:,} bytes")
    except ClientDisconnect:
        raise _gone() from None
    return bytes(body)


def _parsed(schema: type[Request], body: bytes) -> Request:
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        raise invalid_request(error) from None


def _converted(error: Exception) -> ApiError:
    """Return the answer to a failed request, and log an error that is not the client's."""
    answer = as_api_error(error)
    if answer is not error and answer.status >= 500:
        logger.error("%s", error, exc_info=None if isinstance(error, ZslError) else error)
    return answer


async def _refuse(http: HttpRequest, error: Exception) -> Response:
    answer = _converted(error)
    return JSONResponse(answer.body(), answer.status)


async def _refuse_path(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}", code="unknown_url")
    return JSONResponse(refusal.body(), error.status_code, headers=error.headers)
