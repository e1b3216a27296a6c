"""Whatever leaves the client's tables by cancel, error or deadline is given up at the daemon too."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest
import torch

from support.echo import HIDDEN, POISON, EchoServer
from support.faulty_link import FaultyLink
from zsl import TrunkClient
from zsl.errors import BadShapeError, InternalError, RequestTimeout
from zsl.link.open_session import Open
from zsl.trunk.settings import ServerSettings

# One request at a time, so that others wait at the client, where they can be cancelled.
SETTINGS = ServerSettings(max_inflight_requests=1, ping_seconds=0.1)


@pytest.fixture(scope="module")
def server() -> Iterator[EchoServer]:
    with EchoServer(settings=SETTINGS) as running:
        yield running


@pytest.fixture
def client(server: EchoServer) -> Iterator[TrunkClient]:
    with TrunkClient(server.endpoint, request_timeout_seconds=20) as connected:
        yield connected
        server.compute.gate.set()


def some(value: float = 0.0, hidden: int = HIDDEN) -> torch.Tensor:
    return torch.full((1, 2, hidden), value)


def nothing_is_held(server: EchoServer) -> bool:
    """Return whether the daemon comes to hold nothing, in bounded time."""
    pause = threading.Event()
    for _ in range(500):
        gc.collect()  # exceptions and their frames are cycles
        if server.held_bytes == 0 and server.requests.released == 0:
            return True
        pause.wait(0.01)
    return False


def test_backwards_that_were_cancelled(server: EchoServer, client: TrunkClient) -> None:
    steps = [client.forward(some(), keep=True) for _ in range(5)]
    assert server.held_bytes > 0
    server.compute.gate.clear()
    _, first = client.submit_forward(some())
    backwards = [client.submit_backward(step, some()) for step in steps]
    assert all(backward.cancel() for backward in backwards)
    server.compute.gate.set()
    client.wait(first)
    del steps, backwards
    assert nothing_is_held(server)


def test_a_backward_that_was_cancelled_and_is_asked_again(server: EchoServer, client: TrunkClient) -> None:
    step = client.forward(some(), keep=True)
    server.compute.gate.clear()
    _, first = client.submit_forward(some())
    assert client.submit_backward(step, some(1.0)).cancel()
    server.compute.gate.set()
    client.wait(first)
    assert torch.equal(client.backward(step, some(2.0)).tensor, some(2.0))
    assert nothing_is_held(server)


@pytest.mark.parametrize("wrong", ["another shape", "fails there"])
def test_a_backward_that_was_refused_or_failed(server: EchoServer, client: TrunkClient, wrong: str) -> None:
    step = client.forward(some(), keep=True)
    gradients = some(hidden=HIDDEN + 1) if wrong == "another shape" else some(POISON)
    with pytest.raises((BadShapeError, InternalError)) as refused:
        client.backward(step, gradients)
    del step, refused
    assert nothing_is_held(server)


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("where", ["runs", "waits at the client"])
def test_requests_whose_time_was_up(server: EchoServer, kind: str, where: str) -> None:
    with TrunkClient(server.endpoint, request_timeout_seconds=20) as client:
        steps = [client.forward(some(), keep=True) for _ in range(2)]
        client._connection.request_timeout_seconds = 0.2
        server.compute.gate.clear()
        for step in steps if where == "waits at the client" else steps[:1]:
            if kind == "forward":
                answer = client.submit_forward(some(), keep=True)[1]
            else:
                answer = client.submit_backward(step, some())
        with pytest.raises(RequestTimeout) as late:
            client.wait(answer)
        server.compute.gate.set()
        del steps, step, answer, late
        assert nothing_is_held(server)


def test_a_forward_that_nobody_waits_for_any_more(server: EchoServer, client: TrunkClient) -> None:
    server.compute.gate.clear()
    step, answer = client.submit_forward(some(), keep=True)
    _, waits = client.submit_forward(some(), keep=True)
    assert waits.cancel()
    with pytest.raises(CancelledError):
        client.wait(waits)
    del step, answer, _
    server.compute.gate.set()
    assert nothing_is_held(server)


def test_a_step_that_is_dropped_while_its_connection_is_away() -> None:
    with EchoServer(settings=SETTINGS) as server, FaultyLink(server.port) as line, TrunkClient(line.endpoint) as client:
        steps = [client.forward(some(), keep=True) for _ in range(2)]
        # What is sent up is swallowed, and the connection ends: a RELEASE that was sent may not have arrived.
        line.blackhole("up")
        del steps[0]
        line.refuse()
        line.cut()
        link = client._connection.link
        assert link is not None
        pause = threading.Event()
        for _ in range(500):
            if not isinstance(link.state, Open):
                break
            pause.wait(0.01)
        assert not isinstance(link.state, Open)
        del steps[0]
        assert server.held_bytes > 0
        line.heal()
        assert nothing_is_held(server)
