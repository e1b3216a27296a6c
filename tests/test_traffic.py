"""Traffic that a client counts equals the bytes on its connection."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
import torch

from support.echo import HIDDEN, EchoServer
from support.faulty_link import FaultyLink
from support.relay import Relay
from zsl import TrunkClient
from zsl.link.traffic import Traffic, TrafficCounter
from zsl.wire.messages import Result, TensorDescriptor

ROWS, TOKENS = 8, 64
TENSOR_BYTES = ROWS * TOKENS * HIDDEN * 4


def some() -> torch.Tensor:
    return torch.zeros(ROWS, TOKENS, HIDDEN)


def test_the_bytes_are_those_that_a_relay_between_saw() -> None:
    with EchoServer() as server, Relay(server.endpoint) as relay, TrunkClient(relay.endpoint) as client:
        for _ in range(3):
            step = client.forward(some(), keep=True)
            client.backward(step, some())
            client.forward(some())
        client.status()  # one connection keeps its order: what was sent before has been seen
        traffic = client.traffic
        # The heartbeat has a connection of its own, which carries less.
        assert traffic.bytes_up == max(relay.bytes_up.values())
        assert traffic.bytes_down == max(relay.bytes_down.values())
    assert traffic.bytes_up > 9 * TENSOR_BYTES and traffic.bytes_down > 9 * TENSOR_BYTES
    assert (traffic.answers, traffic.replays) == (9, 0)


def test_the_daemons_seconds_are_the_sums_of_its_answers() -> None:
    with EchoServer() as server, TrunkClient(server.endpoint) as client:
        before = client.traffic
        answers = []
        for _ in range(5):
            step = client.forward(some(), keep=True)
            answers += [step.answer, client.backward(step, some())]
        since = client.traffic - before
    assert since.answers == len(answers) == 10
    for name in ("queue_seconds", "compute_seconds"):
        assert getattr(since, name) == pytest.approx(sum(getattr(answer, name) for answer in answers), abs=1e-9)
    assert since.compute_seconds > 0


def test_a_request_that_is_sent_again_counts_again_and_is_answered_once() -> None:
    with EchoServer() as server, FaultyLink(server.port) as link:
        with TrunkClient(link.endpoint, connect_timeout_seconds=20, request_timeout_seconds=20) as client:
            before = client.traffic
            server.compute.gate.clear()
            step, future = client.submit_forward(some())
            assert server.compute.begun.acquire(timeout=20)
            link.reset()
            link.wait_for("reset")
            server.compute.gate.set()
            client.finish_forward(step, client.wait(future))
            since = client.traffic - before
    assert since.replays == client.replays == 1
    assert since.answers == 1
    assert 2 * TENSOR_BYTES < since.bytes_up < 3 * TENSOR_BYTES
    # The session has its new connection before the request comes again there: an answer that is ready in between goes
    # there at once, and once more to the request.
    assert TENSOR_BYTES < since.bytes_down < 3 * TENSOR_BYTES


def test_a_client_that_is_not_connected_has_sent_nothing_and_one_that_is_closed_keeps_its_count() -> None:
    with EchoServer() as server:
        client = TrunkClient(server.endpoint)
        assert client.traffic == Traffic()
        client.connect()
        client.forward(some())
        counted = client.traffic
        client.close()
        assert client.traffic.bytes_up > counted.bytes_up > TENSOR_BYTES  # it has said that it goes
        assert client.traffic.answers == 1


def test_no_count_ever_falls_while_others_send() -> None:
    seen: list[Traffic] = []
    with EchoServer() as server, TrunkClient(server.endpoint) as client:
        threads = [threading.Thread(target=lambda: [client.forward(some()) for _ in range(25)]) for _ in range(3)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            seen.append(client.traffic)
            threads[0].join(0.001)
        assert client.traffic.answers == 75
    for earlier, later in pairwise(seen):
        assert all(value >= 0 for value in vars_of(later - earlier))


def vars_of(traffic: Traffic) -> list[float]:
    return [getattr(traffic, name) for name in Traffic.__slots__]


def test_what_is_no_result_is_no_answer() -> None:
    counter = TrafficCounter()
    counter.answered(TensorDescriptor(role="activations", dtype="f32", shape=(1, 1, 1), nbytes=4))  # type: ignore[arg-type]
    assert counter.so_far(replays=0) == Traffic()
    counter.answered(
        Result(
            session=bytes(16),
            request=1,
            epoch=bytes(16),
            merged=1,
            queue_us=1_500_000,
            compute_us=250_000,
            tensors=[TensorDescriptor(role="activations", dtype="f32", shape=(1, 1, 1), nbytes=4)],
        )
    )
    assert counter.so_far(replays=2) == Traffic(answers=1, replays=2, queue_seconds=1.5, compute_seconds=0.25)
