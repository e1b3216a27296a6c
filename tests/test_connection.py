"""The client's connection: each request ends with its answer or a typed error, in bounded time, whatever happens."""

from __future__ import annotations

import asyncio
import gc
import inspect
import multiprocessing
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import zmq

from support.echo import HIDDEN, IDENTITY, POISON, EchoServer
from support.waiting import wait_until
from zsl import AsyncTrunkClient, RemoteTrunk, TrunkClient
from zsl.errors import (
    BadShapeError,
    CancelledByClientError,
    ChangedError,
    ClosedError,
    ConfigError,
    ConnectionLost,
    InternalError,
    ProtocolVersionError,
    RequestTimeout,
    TooLargeError,
    TrunkUnreachable,
    WrongModelError,
)
from zsl.link.cancellation import Cancellation
from zsl.link.opening import UNREADABLE_ANSWERS
from zsl.link.unanswered_requests import Pending
from zsl.trunk.settings import ServerSettings
from zsl.wire.frames import MAJOR, Frame
from zsl.wire.messages import Cut, Header, Welcome

SECONDS = 20.0

until = partial(wait_until, SECONDS)


@pytest.fixture
def server() -> Iterator[EchoServer]:
    with EchoServer() as running:
        yield running


@pytest.fixture
def client(server: EchoServer) -> Iterator[TrunkClient]:
    with TrunkClient(server.endpoint, connect_timeout_seconds=10, request_timeout_seconds=20) as connected:
        yield connected


def some(value: float = 0.0, tokens: int = 2) -> torch.Tensor:
    return torch.full((1, tokens, HIDDEN), float(value))


def test_forward_and_backward_bring_the_tensors_back(client: TrunkClient) -> None:
    step = client.forward(some(1.0), keep=True)
    assert torch.equal(step.output, some(2.0))
    assert torch.equal(client.backward(step, some(3.0)).tensor, some(3.0))


def test_many_threads_share_one_connection(client: TrunkClient) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            if not torch.equal(client.forward(some(number)).output, some(number + 1)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert not any(thread.is_alive() for thread in threads)


async def test_the_asyncio_face_overlaps_requests(server: EchoServer) -> None:
    async with AsyncTrunkClient(server.endpoint, model=IDENTITY) as client:
        assert await client.connect() == client.welcome
        steps = await asyncio.gather(*(client.forward(some(n), keep=True) for n in range(10)))
        assert all(torch.equal(step.output, some(n + 1)) for n, step in enumerate(steps))
        answer = await client.backward(steps[0], some(5.0))
        assert torch.equal(answer.tensor, some(5.0))
        assert (await client.status()).sessions == 1
        assert (client.traffic.answers, client.replays) == (11, 0)


async def test_the_asyncio_face_refuses_another_model_as_it_connects(server: EchoServer) -> None:
    other = IDENTITY.model_copy(update={"weights_digest": "0" * 64})
    with pytest.raises(WrongModelError, match="weights"):
        async with AsyncTrunkClient(server.endpoint, model=other):
            pass


def test_both_faces_have_the_same_methods_and_arguments() -> None:
    def face(client: type) -> dict[str, inspect.Signature | None]:
        names = {name: getattr(client, name) for name in vars(client) if not name.startswith("_")}
        return {name: inspect.signature(value) if callable(value) else None for name, value in names.items()}

    threads, coroutines = face(TrunkClient), face(AsyncTrunkClient)
    of_futures = {"submit_forward", "submit_backward", "finish_forward", "wait", "longest_wait_seconds"}
    assert threads.keys() - of_futures == coroutines.keys()  # a coroutine has tasks for that
    assert {name: threads[name] for name in coroutines} == coroutines
    assert inspect.signature(TrunkClient) == inspect.signature(AsyncTrunkClient)


def test_more_requests_than_the_daemon_grants_wait_their_turn() -> None:
    with EchoServer(settings=ServerSettings(max_inflight_requests=2)) as server, TrunkClient(server.endpoint) as client:
        futures = [client.submit_forward(some(n))[1] for n in range(20)]
        assert all(future.result(20) for future in futures)


@pytest.mark.parametrize(
    "text", ["", "host", "tcp://host", "http://host:1", "host:port", "host:0", "host:70000", "a/b:1"]
)
def test_a_wrong_endpoint_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        TrunkClient(text)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1, 0, 1e12, "10", None])
@pytest.mark.parametrize("name", ["connect_timeout_seconds", "request_timeout_seconds"])
def test_a_time_that_nobody_can_wait_for_is_refused_by_name(name: str, seconds: Any) -> None:
    for make in (TrunkClient, AsyncTrunkClient, RemoteTrunk):
        with pytest.raises(ConfigError, match=name):
            make("127.0.0.1:1", **{name: seconds})


def test_an_unreachable_daemon_is_named_in_time() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and it does not listen
        endpoint = f"127.0.0.1:{nobody.getsockname()[1]}"
        client = TrunkClient(endpoint, connect_timeout_seconds=1.5)
        with pytest.raises(TrunkUnreachable, match=rf"tcp://{endpoint}: nothing listens"):
            client.connect()
        with pytest.raises(TrunkUnreachable):
            client.forward(some())
        client.close()


def test_something_else_on_the_port_is_named_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(TrunkUnreachable, match="something listens"):
            with TrunkClient(endpoint, connect_timeout_seconds=1.5):
                pass


def test_an_unknown_host_is_named_in_time() -> None:
    with pytest.raises(TrunkUnreachable, match=r"no-such-host\.invalid:5555: .*\bname\b"):
        with TrunkClient("no-such-host.invalid:5555", connect_timeout_seconds=0.5):
            pass


def test_localhost_reaches_a_daemon_on_127_0_0_1(server: EchoServer) -> None:
    with TrunkClient(f"localhost:{server.port}") as client:
        assert client.welcome == client.connect()


def test_another_model_is_refused_before_anything_is_sent(server: EchoServer) -> None:
    other = IDENTITY.model_copy(update={"weights_digest": "0" * 64})
    with pytest.raises(WrongModelError, match="weights"), TrunkClient(server.endpoint, model=other):
        pass


def test_a_daemon_of_another_version_is_named_with_both_versions() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        port = router.bind_to_random_port("tcp://127.0.0.1")
        with ThreadPoolExecutor(1) as pool:
            connecting = pool.submit(TrunkClient(f"127.0.0.1:{port}", connect_timeout_seconds=20).connect)
            for _ in range(UNREADABLE_ANSWERS + 1):  # fewer could be damage on the line
                peer, preamble, *_ = router.recv_multipart()
                router.send_multipart([peer, preamble[:4] + b"\x07" + preamble[5:], b""])
            with pytest.raises(ProtocolVersionError, match=rf"\b{MAJOR}\b.*\b7\b"):
                connecting.result(20)


def test_a_refused_request_raises_its_own_error_and_the_next_one_works(client: TrunkClient) -> None:
    with pytest.raises(BadShapeError, match=rf"hidden size {HIDDEN + 1}.*\[trunk tcp://"):
        client.forward(torch.zeros(1, 2, HIDDEN + 1))
    assert torch.equal(client.forward(some()).output, some(1.0))


def test_a_failed_computation_fails_its_own_request_only(client: TrunkClient) -> None:
    with pytest.raises(InternalError, match="poisoned"):
        client.forward(some(POISON))
    assert torch.equal(client.forward(some()).output, some(1.0))


def test_a_message_over_the_daemons_limit_is_refused_before_it_is_sent(client: TrunkClient) -> None:
    with pytest.raises(TooLargeError, match="batch"):
        client.forward(torch.zeros(10_000, 10, HIDDEN))
    assert torch.equal(client.forward(some()).output, some(1.0))


def test_a_request_that_is_not_answered_in_time_raises_and_is_taken_back(server: EchoServer) -> None:
    with TrunkClient(server.endpoint, request_timeout_seconds=0.3) as client:
        server.compute.gate.clear()
        with pytest.raises(RequestTimeout, match=r"0\.3 s"):
            client.forward(some())
        with pytest.raises(RequestTimeout):
            client.forward(some())
        client._connection.request_timeout_seconds = 20  # of what is asked from now on
        server.compute.gate.set()
        assert client.status().queued_requests == 0
        assert torch.equal(client.forward(some()).output, some(1.0))


def test_a_request_whose_time_ends_at_the_daemon_is_the_same_error(
    server: EchoServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TrunkClient(server.endpoint, request_timeout_seconds=20) as client, ThreadPoolExecutor(1) as pool:
        server.compute.gate.clear()
        running = pool.submit(client.forward, some())
        assert server.compute.begun.acquire(timeout=20)
        monkeypatch.setattr(Pending, "budget_ms", lambda _: 1)
        with pytest.raises(RequestTimeout):
            client.forward(some())
        server.compute.gate.set()
        assert torch.equal(running.result(20).output, some(1.0))


def test_a_backward_goes_on_when_the_daemon_was_restarted_after_its_forward() -> None:
    """One automatic replay: the step's activations go along, so a daemon that holds nothing can answer."""
    with EchoServer() as first:
        port = first.port
        client = TrunkClient(first.endpoint, request_timeout_seconds=20)
        client.connect()
        step = client.forward(some(1.0), keep=True)
    with EchoServer(port=port) as second, client:
        assert torch.equal(client.backward(step, some(4.0)).tensor, some(4.0))
        assert client.status().epoch != b""
        assert [len(batch) for batch in second.compute.batches] == [1]


def test_a_daemon_that_does_not_come_back_ends_the_request_with_connection_lost(server: EchoServer) -> None:
    with TrunkClient(server.endpoint, connect_timeout_seconds=20, request_timeout_seconds=0.5) as client:
        server.stop()
        for _ in range(2):
            with pytest.raises(ConnectionLost, match="did not come back"):
                client.forward(some())


def test_a_daemon_that_comes_back_late_serves_the_same_client_again(server: EchoServer) -> None:
    """Longer than the connect timeout: that is for the first connection only."""
    with TrunkClient(server.endpoint, connect_timeout_seconds=1, request_timeout_seconds=1.5) as client:
        server.stop()
        with pytest.raises(ConnectionLost):
            client.forward(some())
        client._connection.request_timeout_seconds = 20  # of what is asked from now on
        with EchoServer(port=server.port):
            assert torch.equal(client.forward(some()).output, some(1.0))


def test_a_drained_daemon_and_its_successor_cost_a_step_nothing(server: EchoServer) -> None:
    with TrunkClient(server.endpoint, request_timeout_seconds=20) as client:
        step = client.forward(some(1.0), keep=True)
        server.drain()
        _, refused = client.submit_forward(some(2.0))
        assert torch.equal(client.backward(step, some(3.0)).tensor, some(3.0))
        server.join()
        with EchoServer(port=server.port):
            assert refused.result(20)


@pytest.mark.parametrize(
    "changes",
    [
        {"cut": Cut(start=1, stop=4)},
        {"dtype": "bf16"},
        {"model": IDENTITY.model_copy(update={"weights_digest": "0" * 64})},
    ],
    ids=["cut", "dtype", "model"],
)
def test_a_daemon_that_comes_back_with_another_trunk_is_refused(
    server: EchoServer, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    with TrunkClient(server.endpoint, request_timeout_seconds=20) as client:
        step = client.forward(some(1.0), keep=True)
        server.stop()
        with EchoServer(port=server.port, **changes):  # type: ignore[arg-type]
            for _ in range(2):
                with pytest.raises(WrongModelError, match=f"another {next(iter(changes))}\\b"):
                    client.backward(step, some(4.0))


def test_a_call_before_connect_is_a_clear_error(server: EchoServer) -> None:
    client = TrunkClient(server.endpoint)
    with pytest.raises(ClosedError, match=r"connect\(\)"):
        client.forward(some())
    with pytest.raises(ClosedError, match=r"connect\(\)"):
        assert client.welcome


def test_requests_that_are_queued_when_the_connection_goes_are_all_answered(server: EchoServer) -> None:
    with TrunkClient(server.endpoint, request_timeout_seconds=20) as client:
        server.stop()
        futures = [client.submit_forward(some(n))[1] for n in range(5)]
        with EchoServer(port=server.port):
            assert all(future.result(20) for future in futures)


def test_a_mask_or_activations_that_are_written_after_the_forward_do_not_change_the_backward(
    server: EchoServer, client: TrunkClient
) -> None:
    mask, activations = torch.ones(1, 2, dtype=torch.long), some(1.0)
    step = client.forward(activations, attention_mask=mask, keep=True)
    mask.zero_()
    assert torch.equal(step.inputs()["attention_mask"], torch.ones(1, 2, dtype=torch.long))  # type: ignore[arg-type]
    activations.zero_()
    with pytest.raises(ChangedError, match="activations"):
        client.backward(step, some())


def test_nothing_is_printed_when_a_step_outlives_the_interpreter(server: EchoServer) -> None:
    script = (
        "import torch, zsl\n"
        f"client = zsl.TrunkClient({server.endpoint!r}); client.connect()\n"
        f"step = client.forward(torch.zeros(1, 2, {HIDDEN}), keep=True)\n"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


def test_an_ended_lease_opens_a_new_session_by_itself() -> None:
    settings = ServerSettings(lease_seconds=0.2, ping_seconds=60)  # so that no ping renews it
    with EchoServer(settings=settings) as server, TrunkClient(server.endpoint) as client:
        step = client.forward(some(1.0), keep=True)
        with TrunkClient(server.endpoint) as observer:
            while observer.status().held_bytes:
                pass
        assert torch.equal(client.backward(step, some(4.0)).tensor, some(4.0))


def test_a_dropped_step_is_released_at_the_daemon(client: TrunkClient) -> None:
    step = client.forward(some(), keep=True)
    assert client.status().held_bytes > 0
    del step
    gc.collect()
    assert client.status().held_bytes == 0


def test_close_ends_waiting_calls_and_further_ones(server: EchoServer, client: TrunkClient) -> None:
    server.compute.gate.clear()
    _, future = client.submit_forward(some())
    assert server.compute.begun.acquire(timeout=20)
    client.close()
    with pytest.raises(ClosedError):
        future.result(5)
    with pytest.raises(ClosedError):
        client.forward(some())
    client.close()


@pytest.mark.parametrize("first", [None, "of another client", "of another thread"])
def test_a_cancelled_thread_waits_no_more_and_its_connection_serves_others(
    first: str | None, server: EchoServer, client: TrunkClient
) -> None:
    cancellation = Cancellation()

    def forward() -> None:
        with cancellation.of_requests():
            with pytest.raises(CancelledByClientError):
                client.forward(some())
            with pytest.raises(CancelledByClientError):
                client.forward(some())  # is not sent

    with TrunkClient(server.endpoint) as other, ThreadPoolExecutor(2) as pool:
        server.compute.gate.clear()
        before = [] if first is None else [pool.submit((other if "client" in first else client).forward, some())]
        assert not before or server.compute.begun.acquire(timeout=SECONDS)
        waiting = pool.submit(forward)
        if before:
            until(lambda: server.requests.queued == 1)
        else:
            assert server.compute.begun.acquire(timeout=SECONDS)
        cancellation.set()
        waiting.result(SECONDS)
        until(lambda: server.requests.queued == 0)
        server.compute.gate.set()
        assert [one.result(SECONDS).output.tolist() for one in before] == [some(1.0).tolist()] * len(before)
    assert torch.equal(client.forward(some(1.0)).output, some(2.0))
    assert sum(map(len, server.compute.batches)) == 2, "the one that ran before, and the last"


def test_a_request_that_is_cancelled_before_it_is_queued_is_not_sent(client: TrunkClient) -> None:
    connection = client._connection
    request = connection.new_request_id()

    def build(welcome: Welcome, pending: Pending) -> tuple[Header, Sequence[Frame]]:
        raise AssertionError("it is sent")

    connection.cancel(request)
    with pytest.raises(CancelledByClientError):
        connection.submit(request, build).result(SECONDS)
    assert torch.equal(client.forward(some()).output, some(1.0))


def test_a_thread_cancelled_while_the_daemon_is_away_waits_no_more(server: EchoServer) -> None:
    cancellation = Cancellation()
    with TrunkClient(server.endpoint) as client, ThreadPoolExecutor(1) as pool:
        server.stop()

        def forward() -> None:
            with cancellation.of_requests(), pytest.raises(CancelledByClientError):
                client.forward(some())

        waiting = pool.submit(forward)
        until(lambda: client._connection.link is not None and client._connection.link.busy)
        cancellation.set()
        waiting.result(SECONDS)


def test_nothing_is_left_of_a_closed_client(server: EchoServer) -> None:
    with TrunkClient(server.endpoint):
        pass
    threads = threading.active_count()
    for _ in range(5):
        with TrunkClient(server.endpoint) as client:
            client.forward(some())
    assert threading.active_count() <= threads


def _use_after_fork(client: TrunkClient, answers: multiprocessing.Queue[str]) -> None:
    try:
        client.forward(some())
    except ClosedError as error:
        answers.put(str(error))
    else:
        answers.put("it worked")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_use_after_a_fork_is_a_clear_error(client: TrunkClient) -> None:
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.Queue[str] = context.Queue()
    child = context.Process(target=_use_after_fork, args=(client, answers))
    child.start()
    assert "after a fork" in answers.get(timeout=30)
    child.join(30)
    assert torch.equal(client.forward(some()).output, some(1.0))


def _connect_after_fork(trunk: RemoteTrunk, answers: multiprocessing.Queue[str]) -> None:
    try:
        answers.put(repr(trunk.client))
    except ClosedError as error:
        answers.put(str(error))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_the_parent_connects_is_a_clear_error_in_the_child() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute, ThreadPoolExecutor(1) as pool:
        trunk = RemoteTrunk(f"127.0.0.1:{mute.getsockname()[1]}", connect_timeout_seconds=1)
        connecting = pool.submit(trunk.connect)
        mute.accept()[0].close()  # it holds its lock by now
        context = multiprocessing.get_context("fork")
        answers: multiprocessing.Queue[str] = context.Queue()
        child = context.Process(target=_connect_after_fork, args=(trunk, answers))
        child.start()
        try:
            assert "after a fork" in answers.get(timeout=10)
        finally:
            child.kill()
            child.join(30)
        with pytest.raises(TrunkUnreachable):
            connecting.result(30)
