"""Every limit that WELCOME grants, at its edge, with keys and without: just at it works, one over is a typed error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import msgpack
import numpy as np
import pytest

from support.echo import HIDDEN, NO_ADAPTER, EchoServer
from support.peer import Peer, forward
from support.square import SquareClient, some
from test_access import Keys
from zsl.errors import TooLargeError
from zsl.link.unanswered_requests import Pending
from zsl.trunk.settings import ServerSettings
from zsl.wire.frames import KIND, MAGIC, MAJOR, Frame, Message, seal
from zsl.wire.messages import (
    Backward,
    Error,
    Forward,
    Header,
    Hello,
    Limits,
    MessageType,
    Result,
    TensorDescriptor,
    Welcome,
)

ROW_TOKENS = 512
REQUEST_TOKENS = 64 * ROW_TOKENS
SETTINGS = ServerSettings(
    max_request_tokens=REQUEST_TOKENS, max_inflight_requests=4, max_inflight_bytes=7 * REQUEST_TOKENS * HIDDEN * 4
)


class Served(NamedTuple):
    server: EchoServer
    client: SquareClient
    limits: Limits
    peer: Callable[[], Peer]


@pytest.fixture(scope="module", params=["open", "keyed"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    keys = Keys(tmp_path_factory.mktemp("keys"))
    keys.write_list("alice")
    keyed = request.param == "keyed"
    access = keys.access if keyed else None
    named: dict[str, str | Path] = (
        {"server_key": keys.public("server"), "client_key": keys.secret("alice")} if keyed else {}
    )
    with EchoServer(settings=SETTINGS, row_tokens=ROW_TOKENS, access=access) as server:
        client = SquareClient(server.endpoint, request_timeout_seconds=15, **named)  # type: ignore[arg-type]
        with client:
            yield Served(
                server,
                client,
                client.connection.welcome.limits,
                lambda: Peer(server.endpoint, keys.of("alice") if keyed else None),
            )
            assert client.connection.traffic.replays == 0, "something was sent again"


def tensors_of(
    rows: int, tokens: int, *, complete: bool, dtype: str = "f32"
) -> tuple[list[TensorDescriptor], list[bytes]]:
    """Activations, and what else may come along: gradients, a mask and positions, each as large as can be."""
    nbytes = {"f32": 4, "bf16": 2}[dtype]
    shapes = {"activations": (dtype, (rows, tokens, HIDDEN), nbytes)}
    if complete:
        shapes["gradients"] = (dtype, (rows, tokens, HIDDEN), nbytes)
        shapes["attention_mask"] = shapes["position_ids"] = ("i64", (rows, tokens), 8)
    descriptors, buffers = [], []
    for role, (name, shape, size) in shapes.items():
        count = int(np.prod(shape))
        descriptors.append(TensorDescriptor(role=role, dtype=name, shape=shape, nbytes=count * size))  # type: ignore[arg-type]
        buffers.append(bytes(count * size))
    return descriptors, buffers


def submit(
    client: SquareClient, rows: int, tokens: int, *, complete: bool = False, dtype: str = "f32"
) -> Future[Message]:
    """A FORWARD, or a BACKWARD that is complete in itself."""
    request = client.connection.new_request_id()
    descriptors, buffers = tensors_of(rows, tokens, complete=complete, dtype=dtype)

    def build(welcome: Welcome, pending: Pending) -> tuple[Header, list[Frame]]:
        fields = client.fields(welcome, pending)
        if complete:
            return Backward(**fields, **NO_ADAPTER, step=request, tensors=descriptors), list(buffers)
        return Forward(**fields, adapter=None, keep=False, reveal=[], cache=None, tensors=descriptors), list(buffers)

    return client.connection.submit(request, build, nbytes=sum(map(len, buffers)))


@pytest.mark.parametrize("complete", [False, True], ids=["forward", "complete backward"])
def test_the_largest_request_arrives_and_one_row_more_is_refused_at_once(served: Served, complete: bool) -> None:
    rows, limits = REQUEST_TOKENS // ROW_TOKENS, served.limits
    assert limits.max_message_bytes == limits.max_request_tokens * HIDDEN * 4
    assert (limits.max_request_tokens, limits.max_row_tokens) == (REQUEST_TOKENS, ROW_TOKENS)
    answer = submit(served.client, rows, ROW_TOKENS, complete=complete).result(20)
    assert isinstance(answer.header, Result) and len(answer.buffers[0]) == limits.max_message_bytes
    for dtype in ("f32", "bf16"):  # of which the first is over the bytes too
        with pytest.raises(TooLargeError):
            submit(served.client, rows + 1, ROW_TOKENS, complete=complete, dtype=dtype).result(10)


def test_the_longest_row_is_taken_and_one_token_more_refused(served: Served) -> None:
    assert submit(served.client, 1, ROW_TOKENS).result(20)
    with pytest.raises(TooLargeError):
        submit(served.client, 2, ROW_TOKENS + 1).result(10)


def test_as_many_requests_and_bytes_as_are_granted_are_in_flight_and_one_more_waits(served: Served) -> None:
    requests = served.limits.max_inflight_requests
    rows = served.limits.max_inflight_bytes // requests // (ROW_TOKENS * HIDDEN * 4)
    rows = min(rows, REQUEST_TOKENS // ROW_TOKENS)
    futures = [submit(served.client, rows, ROW_TOKENS) for _ in range(2 * requests + 1)]
    assert all(isinstance(future.result(20).header, Result) for future in futures)


def test_who_sends_more_than_is_granted_is_told_so(served: Served) -> None:
    requests = served.limits.max_inflight_requests
    with served.peer() as peer:
        welcome = peer.hello()
        served.server.compute.gate.clear()
        try:
            for request in range(requests):
                peer.send(*forward(welcome, request))
            answer = peer.ask(*forward(welcome, requests))
            assert isinstance(answer, Error) and (answer.code, answer.request) == ("OVERLOADED", requests)
        finally:
            served.server.compute.gate.set()
        assert all(isinstance(peer.hear(), Result) for _ in range(requests))


def test_bytes_in_flight_are_taken_up_to_the_limit_and_told_one_over_it(served: Served) -> None:
    """Two BACKWARD with all that they may bring are six times the largest tensor, and a FORWARD is the seventh."""
    rows, largest = REQUEST_TOKENS // ROW_TOKENS, REQUEST_TOKENS * HIDDEN * 4
    assert served.limits.max_inflight_bytes == 7 * largest
    with served.peer() as peer:
        welcome = peer.hello()
        fields = {"session": welcome.session, "epoch": welcome.epoch, "attempt": 0, "budget_ms": 20_000}
        descriptors, buffers = tensors_of(rows, ROW_TOKENS, complete=True)
        assert sum(map(len, buffers)) == 3 * largest
        served.server.compute.gate.clear()
        try:
            for request in (1, 2):
                peer.send(Backward(**fields, **NO_ADAPTER, request=request, step=request, tensors=descriptors), buffers)  # type: ignore[arg-type]
            peer.send(*forward(welcome, 3, rows=rows, tokens=ROW_TOKENS))
            answer = peer.ask(*forward(welcome, 4, tokens=1))
            assert isinstance(answer, Error) and (answer.code, answer.request) == ("OVERLOADED", 4)
        finally:
            served.server.compute.gate.set()
        assert {getattr(peer.hear(), "request", None) for _ in range(3)} == {1, 2, 3}


def test_the_largest_header_is_read_and_one_byte_more_is_refused_by_name(served: Served) -> None:
    most = served.limits.max_header_bytes
    with served.peer() as peer:
        codes = []
        for nbytes in (most, most + 1):
            header = msgpack.packb({"request": 7, "software": "x" * (nbytes - 22)})
            assert len(header) == nbytes
            peer.send_frames(seal([KIND.pack(MAGIC, MAJOR, MessageType.STATUS, 0), header]))
            answer = peer.hear()
            assert isinstance(answer, Error)
            codes.append(answer.code)
        assert codes == ["MALFORMED", "TOO_LARGE"]
        assert peer.status()


def test_the_longest_name_is_taken_and_one_character_more_refused(served: Served) -> None:
    hello = Hello(request=1, software="x" * 200, dtype="f32", model=None, cut=None, resume=None)
    with served.peer() as peer:
        assert isinstance(peer.ask(hello), Welcome)
        peer.send(hello.model_construct(**{**hello.model_dump(), "request": 2, "software": "x" * 201}))
        answer = peer.hear()
        assert isinstance(answer, Error) and (answer.code, answer.request) == ("MALFORMED", 2)


def test_small_requests_go_on_beside_the_largest(served: Served) -> None:
    x = some(1)
    futures = [submit(served.client, REQUEST_TOKENS // ROW_TOKENS, ROW_TOKENS) for _ in range(2)]
    output, _ = served.client.forward(x)
    assert np.array_equal(output, x + 1)
    assert all(future.result(20) for future in futures)
