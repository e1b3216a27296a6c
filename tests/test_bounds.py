"""Structures that a peer fills are bounded. docs/security.md lists them, with the test of each."""

from __future__ import annotations

import gc
import socket
import threading
import tracemalloc
from concurrent.futures import Future
from contextlib import ExitStack
from itertools import pairwise

import pytest
import torch
import zmq
from zmq.utils import z85

from support.echo import HIDDEN, WAIT_SECONDS, EchoServer
from support.hostile_scene import HOST, status
from support.raw_zmtp import DEALER, RawKeys, RawPeer, long_frame
from support.square import SquareTrunk
from test_leaks import comes_to, on_loop
from zsl import TrunkClient
from zsl.transport.curve_keys import KeyPair
from zsl.transport.mechanisms import Null
from zsl.transport.peer_connection import Connection, MessageLimits, State
from zsl.trunk.access.options import Access
from zsl.trunk.costs import Costs, PassCost
from zsl.trunk.daemon.server import CONTROL_MESSAGES
from zsl.trunk.malloc import give_back_freed_memory, resident_bytes
from zsl.trunk.requests.reply_cache import REMEMBERED_PER_SESSION, ReplyCache
from zsl.trunk.scheduling.jobs import Job
from zsl.trunk.scheduling.scheduler import Scheduler
from zsl.trunk.settings import ServerSettings
from zsl.trunk.work import Batch, Kind, Outcome
from zsl.wire.messages import Forward, TensorDescriptor

ROWS, TOKENS = 512, 64  # 512 KiB: the largest request
CANCELLED = 80


def asked(session: bytes, request: int) -> Forward:
    masks = [
        TensorDescriptor(role=role, dtype="i64", shape=(1, 2), nbytes=16)  # type: ignore[arg-type]
        for role in ("attention_mask", "position_ids")
    ]
    activations = TensorDescriptor(role="activations", dtype="f32", shape=(1, 2, 4), nbytes=32)
    fields = {"epoch": session, "attempt": 0, "budget_ms": 1, "adapter": None}
    fields |= {"keep": True, "reveal": [], "cache": None}
    tensors = [activations, *masks]
    return Forward.model_validate({"session": session, "request": request, "tensors": tensors, **fields})


@pytest.mark.parametrize("taken", [False, True])
def test_answers_and_the_requests_that_are_remembered_take_no_more_than_their_memory(taken: bool) -> None:
    """`taken`: the clients have taken the answers, so that only the requests are left."""
    most = 1 << 19
    replies, header = ReplyCache(most), asked(bytes(16), 0)
    tracemalloc.start()
    try:
        for number in range(2000):
            session = (number // 100).to_bytes(16)
            header = header.model_copy(update={"session": session, "request": number})
            replies.put(session, header, [bytes(16), bytes(150), bytes(32)])
            if taken:
                replies.give_up(session, number)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 1.1 * most
    finally:
        tracemalloc.stop()
    assert most / 2 < replies.nbytes <= most
    assert replies.get(session, asked(session, number)), "the newest are remembered"
    for number in range(20):
        replies.close(number.to_bytes(16))
    assert (replies.nbytes, replies._replies, replies._kept, replies._of_session) == (0, {}, {}, {})


def test_so_many_requests_of_a_session_are_remembered() -> None:
    replies, session = ReplyCache(1 << 30), bytes(16)
    for number in range(REMEMBERED_PER_SESSION + 10):
        replies.put(session, asked(session, number), [])
    assert len(replies._replies) == len(replies._of_session[session]) == REMEMBERED_PER_SESSION


def test_who_is_expected_has_one_entry_whatever_it_comes_with() -> None:
    cost = PassCost(0.1, 0.001)
    scheduler = Scheduler(max_batch_tokens=1, costs=Costs(cost, cost, cost))
    clients = 10
    for number in range(500):
        client = number % clients
        job = Job(number, client, Kind.FORWARD, 1, ("shape", number), cost_seconds=0.1, deadline=1e9)
        scheduler.add(job, float(number))
        scheduler.charge(scheduler.take_batch(number + 0.5), 0.1, number + 0.5)
    anticipation = scheduler._anticipation
    assert len(anticipation._clients) == clients
    assert sum(map(len, anticipation._expected.values())) <= clients >= len(anticipation._expected)
    for client in range(clients):
        scheduler.forget_tenant(client)
    tenants = [of_class.jobs._tenants for of_class in scheduler._classes.values()]
    assert (anticipation._clients, anticipation._expected, *tenants) == ({}, {}, {}, {})


def test_answers_that_nobody_reads_are_so_many() -> None:
    with EchoServer() as server, RawPeer(HOST, server.port, receive_buffer=4096) as peer:
        peer.handshake()
        asks = b"".join(peer.wrapped(body, flags) for body, flags in zip(status(), (1, 0), strict=True))
        peer.send(asks * 20_000, wait_seconds=1.0)
        (connection,) = on_loop(server, lambda: list(server.server.router.connections.values()))
        most = ServerSettings().max_inflight_requests + CONTROL_MESSAGES
        comes_to(most, lambda: connection.unsent.messages)
        assert connection.unsent.nbytes < most * 1024


class Busy:
    """An executor whose threads never come to it."""

    def submit(self, *_: object) -> Future[object]:
        return Future()


def test_a_large_frame_counts_while_another_thread_decrypts_it() -> None:
    nbytes, scratch = 100_000, memoryview(bytearray(1 << 16))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        connection = Connection(
            b"peer",
            ours,
            "there",
            Null(),
            MessageLimits(4, nbytes, nbytes),
            max_unsent_messages=1,
            receive=lambda *_: None,
            changed=lambda _: None,
            executor=Busy(),  # type: ignore[arg-type]
            call_soon=lambda *_: None,
            clock=lambda: 0.0,
        )
        connection.state = State.OPEN
        theirs.sendall(long_frame(bytes(nbytes)))
        for _ in range(3):
            connection.read(scratch)
        assert (connection.receiving_bytes, connection.wants_memory, connection.wants_to_read) == (nbytes, True, False)


class NobodyAnyMore:
    """A list that lets a key in, and has it no more when it speaks."""

    def allows(self, public_key: str) -> bool:
        return True

    def by_key(self, public_key: str) -> None:
        return None


def test_who_was_told_that_its_key_is_off_the_list_is_remembered_while_it_is_there() -> None:
    keys = KeyPair(*zmq.curve_keypair())
    with EchoServer(access=Access(keys, NobodyAnyMore())) as server, ExitStack() as stack:  # type: ignore[arg-type]
        for _ in range(20):
            peer = stack.enter_context(RawPeer(HOST, server.port))
            peer.handshake(DEALER, RawKeys.of_nobody(z85.decode(keys.public)))
            peer.send_message(status())
            peer.receive_message()
        assert server.forbidden == 20
        stack.close()
        comes_to(0, lambda: server.forbidden)


class GatedSquare(SquareTrunk):
    """Keeps activations in memory of their own, and computes while its gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()

    def run(self, batch: Batch) -> list[Outcome]:
        assert self.gate.wait(WAIT_SECONDS)
        return super().run(batch)


def test_a_storm_of_cancelled_backwards_leaves_nothing_held_and_no_memory() -> None:
    """At the daemon and at the client, which are this process: backwards that had been sent, and that had not."""
    trunk = GatedSquare()
    step_bytes = ROWS * TOKENS * HIDDEN * 4
    with EchoServer(compute=trunk, deterministic=True) as server, TrunkClient(server.endpoint) as client:
        client.connect()

        def under_way() -> int:
            requests = server.requests
            return requests.queued + requests.running

        def storm(cancelled: int) -> int:
            """The memory that is left after it, without the answers that are kept in case they are asked for again."""
            steps = [client.forward(torch.zeros(ROWS, TOKENS, HIDDEN), keep=True) for _ in range(cancelled)]
            assert server.held_bytes == cancelled * step_bytes
            trunk.gate.clear()
            _, first = client.submit_forward(torch.zeros(1, 1, HIDDEN))
            backwards = [client.submit_backward(step, torch.ones(ROWS, TOKENS, HIDDEN)) for step in steps]
            unsent = sum([backward.cancel() for backward in backwards])
            assert unsent >= cancelled - ServerSettings().max_inflight_requests
            trunk.gate.set()
            client.wait(first)
            del steps, backwards
            gc.collect()
            comes_to((0, 0), lambda: (server.held_bytes, under_way()))
            give_back_freed_memory()
            return resident_bytes() - server.server.replies.nbytes

        # Other tests' threads may allocate during one storm: what a storm leaves, each one leaves.
        left = [storm(CANCELLED) for _ in range(4)]
        assert min(after - before for before, after in pairwise(left)) < CANCELLED * step_bytes / 4
