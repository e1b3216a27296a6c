"""The server on a real socket, with an echo for a trunk: every request gets one answer, whatever the others do."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from support.echo import HIDDEN, IDENTITY, NO_ADAPTER, ROW_TOKENS, EchoServer
from support.faulty_link import FaultyLink
from support.peer import Peer, forward
from test_wire_frames import BAD_FRAMES
from zsl.trunk.costs import BatchLimits, CacheMemory, Costs, GraphMemory, PassCost
from zsl.trunk.settings import ServerSettings
from zsl.trunk.work import Keep, Kind
from zsl.wire.messages import (
    Backward,
    Bye,
    Cancel,
    Cut,
    Error,
    GoAway,
    Header,
    Hello,
    Ping,
    Pong,
    Release,
    Result,
    Status,
    StatusRequest,
    TensorDescriptor,
    UsedCache,
    WeightNorms,
    Welcome,
)


@pytest.fixture
def server() -> Iterator[EchoServer]:
    with EchoServer() as running:
        yield running


@pytest.fixture
def peer(server: EchoServer) -> Iterator[Peer]:
    with Peer(server.endpoint) as connected:
        yield connected


def code_of(header: Header) -> str:
    assert isinstance(header, Error), header
    return header.code


def backward(
    welcome: Welcome, request: int, step: int, *, tokens: int = 2, complete: bool = False
) -> tuple[Header, list[bytes]]:
    nbytes = tokens * HIDDEN * 4
    roles = ["activations", "gradients"] if complete else ["gradients"]
    header = Backward(
        session=welcome.session,
        epoch=welcome.epoch,
        request=request,
        attempt=0,
        budget_ms=20_000,
        **NO_ADAPTER,
        step=step,
        tensors=[
            TensorDescriptor(role=role, dtype="f32", shape=(1, tokens, HIDDEN), nbytes=nbytes)  # type: ignore[arg-type]
            for role in roles
        ],
    )
    return header, [bytes(nbytes)] * len(roles)


def test_welcome_states_model_cut_and_all_limits(peer: Peer) -> None:
    welcome = peer.hello(model=IDENTITY, cut=Cut(start=2, stop=4))
    assert welcome.model == IDENTITY
    assert str(welcome.cut) == "2:4"
    assert welcome.limits.max_row_tokens == ROW_TOKENS
    assert all(value > 0 for value in welcome.limits.model_dump().values())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "gpt2"}, "of type gpt2"),
        ({"layers": 12}, "of 12 layers"),
        ({"hidden_size": 8}, "hidden size 8"),
        (
            {"weights_digest": "1" * 64},
            "weights (digest dddddddddddd… at the daemon, 111111111111… at the client)",
        ),
        ({"config_digest": "1" * 64}, "configuration"),
    ],
)
def test_another_model_is_refused_with_what_differs(peer: Peer, changes: dict[str, object], word: str) -> None:
    answer = peer.ask(
        Hello(request=1, software="t", dtype="f32", model=IDENTITY.model_copy(update=changes), cut=None, resume=None)
    )
    assert code_of(answer) == "WRONG_MODEL"
    assert isinstance(answer, Error) and word in answer.text


def test_another_cut_is_refused(peer: Peer) -> None:
    answer = peer.ask(Hello(request=1, software="t", dtype="f32", model=None, cut=Cut(start=1, stop=4), resume=None))
    assert code_of(answer) == "WRONG_MODEL"
    assert isinstance(answer, Error) and "2:4" in answer.text and "1:4" in answer.text


def test_a_forward_and_its_backward_are_answered(peer: Peer) -> None:
    welcome = peer.hello()
    answer = peer.ask(*forward(welcome, 1, keep=True))
    assert isinstance(answer, Result) and answer.request == 1 and answer.merged == 1
    answer = peer.ask(*backward(welcome, 2, step=1))
    assert isinstance(answer, Result) and answer.tensors[0].role == "gradients"


@pytest.mark.parametrize(("memory", "code"), [(1 << 20, None), (0, "BAD_ADAPTER")])
def test_norms_of_weights_are_for_a_session_of_a_daemon_that_accepts_adapters(memory: int, code: str | None) -> None:
    described = TensorDescriptor(role="weight_norms", dtype="f32", shape=(3,), nbytes=12)
    traits = {"adaptable": {"2.up": (6, 3)}, "weight_norms": {"2.up": (described, bytes(12))}}
    settings = ServerSettings(adapter_memory_bytes=memory)
    with EchoServer(settings=settings, **traits) as server, Peer(server.endpoint) as peer:
        welcome = peer.hello()
        right = WeightNorms(session=welcome.session, epoch=welcome.epoch, request=1, path="2.up")
        answer = peer.ask(right)
        assert answer.tensors == [described] if isinstance(answer, Result) else code_of(answer) == code
        assert isinstance(answer, Result) is (code is None)
        assert code_of(peer.ask(right.model_copy(update={"path": "2.down"}))) == "BAD_ADAPTER"
        assert code_of(peer.ask(right.model_copy(update={"session": bytes(16)}))) == "UNKNOWN_SESSION"
        assert isinstance(peer.ask(*forward(welcome, 2)), Result)


def test_a_backward_consumes_what_was_held_and_a_complete_one_needs_nothing(peer: Peer) -> None:
    welcome = peer.hello()
    peer.ask(*forward(welcome, 1, keep=True))
    assert isinstance(peer.ask(*backward(welcome, 2, step=1)), Result)
    answer = peer.ask(*backward(welcome, 3, step=1))
    assert code_of(answer) == "UNKNOWN_STEP"
    assert isinstance(answer, Error) and answer.retry == "replay"
    assert isinstance(peer.ask(*backward(welcome, 4, step=1, complete=True)), Result)


def test_a_forward_without_keep_holds_nothing(peer: Peer) -> None:
    welcome = peer.hello()
    peer.ask(*forward(welcome, 1, keep=False))
    assert peer.status().held_bytes == 0
    assert code_of(peer.ask(*backward(welcome, 2, step=1))) == "UNKNOWN_STEP"


def test_release_and_bye_free_what_was_held(peer: Peer) -> None:
    welcome = peer.hello()
    peer.ask(*forward(welcome, 1, keep=True))
    assert peer.status().held_bytes > 0
    peer.send(Release(session=welcome.session, epoch=welcome.epoch, step=1))
    assert peer.status().held_bytes == 0
    peer.ask(*forward(welcome, 2, keep=True))
    peer.send(Bye(session=welcome.session, epoch=welcome.epoch))
    assert peer.status().sessions == 0
    assert peer.status().held_bytes == 0


def test_a_step_released_while_it_is_computed_is_not_held(server: EchoServer, peer: Peer) -> None:
    welcome = peer.hello()
    server.compute.gate.clear()
    peer.send(*forward(welcome, 1, keep=True))
    assert server.compute.begun.acquire(timeout=20)
    peer.send(Release(session=welcome.session, epoch=welcome.epoch, step=1))
    server.compute.gate.set()
    assert isinstance(peer.hear(), Result)
    assert peer.status().held_bytes == 0


def test_what_is_held_stays_within_the_memory_and_what_went_is_asked_for_again() -> None:
    settings = ServerSettings(stash_memory_bytes=1000)
    with EchoServer(settings=settings) as server, Peer(server.endpoint) as peer:
        welcome = peer.hello()
        for request in range(1, 101):
            peer.ask(*forward(welcome, request, tokens=8, keep=True))  # 128 bytes each
        assert 0 < peer.status().held_bytes <= 1000
        assert code_of(peer.ask(*backward(welcome, 101, step=1, tokens=8))) == "UNKNOWN_STEP"
        assert isinstance(peer.ask(*backward(welcome, 102, step=100, tokens=8)), Result)


def kept(server: EchoServer) -> list[Keep]:
    """Return what the held steps keep."""
    return [held.stash.keep for session in server.server.sessions for held in session.held.values()]


def test_what_queued_backwards_will_use_is_part_of_the_memory_until_they_have_run() -> None:
    settings, memory = ServerSettings(stash_memory_bytes=1000), GraphMemory(400.0, 0.0, 0.0)
    with EchoServer(settings=settings, graph_memory=memory) as server, Peer(server.endpoint) as one:
        with Peer(server.endpoint) as other:
            mine, theirs = one.hello(), other.hello()
            one.ask(*forward(mine, 1, tokens=40, keep=True))  # 640 bytes
            assert kept(server) == [Keep.GRAPH_AND_LINEAR_OUTPUTS]
            server.compute.gate.clear()
            one.send(*forward(mine, 2, tokens=40))
            assert server.compute.begun.acquire(timeout=20) and server.compute.begun.acquire(timeout=20)
            one.send(*backward(mine, 3, step=1, tokens=40))
            assert one.status().held_bytes == 0
            other.send(*forward(theirs, 1, keep=True))
            assert other.status().queued_requests == 2
            server.compute.gate.set()
            other.hear(), one.hear(), one.hear()
            assert server.compute.batches == [[Kind.FORWARD]] * 3 + [[Kind.BACKWARD]]
            assert kept(server) == [Keep.INPUT], "there was no room for a graph beside the backward's"
            other.ask(*forward(theirs, 2, keep=True))
            assert kept(server) == [Keep.INPUT, Keep.GRAPH_AND_LINEAR_OUTPUTS]


def test_by_default_graphs_stay_within_a_part_of_the_memory_and_backwards_that_free_one_go_first() -> None:
    settings, memory = ServerSettings(saves_graphs=True), GraphMemory(float(80 << 20), 0.0, 0.0)
    with EchoServer(settings=settings, graph_memory=memory, merges=False) as server:
        server.compute.graph_bytes = 80 << 20
        with Peer(server.endpoint) as one, Peer(server.endpoint) as two, Peer(server.endpoint) as three:
            welcomes = {peer: peer.hello() for peer in (one, two, three)}
            server.compute.gate.clear()
            one.send(*forward(welcomes[one], 1, keep=True))
            assert server.compute.begun.acquire(timeout=20)
            two.send(*forward(welcomes[two], 1, keep=True))
            assert two.status().queued_requests == 1
            server.compute.gate.set()
            one.hear(), two.hear()
            assert kept(server) == [Keep.GRAPH, Keep.INPUT], "no room beside the pass that has just ended"

            assert server.compute.begun.acquire(timeout=20)
            server.compute.gate.clear()
            three.send(*forward(welcomes[three], 1))
            assert server.compute.begun.acquire(timeout=20)
            two.send(*backward(welcomes[two], 2, step=1))
            assert two.status().queued_requests == 1
            one.send(*backward(welcomes[one], 2, step=1))  # which has used the device for longer
            assert one.status().queued_requests == 2
            server.compute.gate.set()
            one.hear(), two.hear(), three.hear()
            assert server.compute.used == [(Keep.GRAPH, False), (Keep.INPUT, False)]

            one.ask(*forward(welcomes[one], 3, keep=True))
            two.ask(*forward(welcomes[two], 3, keep=True))
            two.ask(*backward(welcomes[two], 4, step=3))
            assert server.compute.used[2:] == [(Keep.INPUT, True)], "no room for its graph"
            assert kept(server) == [Keep.GRAPH]


def test_a_lone_client_never_computes_a_forward_twice_whatever_it_keeps() -> None:
    memory = GraphMemory(float(80 << 20), 0.0, 0.0)
    for deterministic, keep in ((True, Keep.LINEAR_OUTPUTS), (False, Keep.GRAPH_AND_LINEAR_OUTPUTS)):
        settings = ServerSettings(saves_graphs=True)
        with EchoServer(settings=settings, graph_memory=memory, deterministic=deterministic) as server:
            server.compute.graph_bytes = 80 << 20
            with Peer(server.endpoint) as peer:
                welcome = peer.hello()
                for request in (1, 3):
                    peer.ask(*forward(welcome, request, keep=True))
                    peer.ask(*backward(welcome, request + 1, step=request))
            assert server.compute.used == [(keep, False)] * 2


def test_a_new_hello_ends_the_connections_earlier_session_and_its_queued_work(server: EchoServer, peer: Peer) -> None:
    server.compute.gate.clear()
    for opened in range(3):
        welcome = peer.hello()
        for request in range(1, 9):
            peer.send(*forward(welcome, request, tokens=request))
            if opened == 0 and request == 1:
                assert server.compute.begun.acquire(timeout=20)
    assert peer.status().sessions == 1
    assert peer.status().queued_requests == 8
    server.compute.gate.set()
    answers = [peer.hear() for _ in range(8)]
    assert all(isinstance(answer, Result) for answer in answers)
    assert sum(map(len, server.compute.batches)) == 9, "the one that had begun, and the eight of the open session"


def test_an_expired_lease_frees_what_was_held() -> None:
    with EchoServer(settings=ServerSettings(lease_seconds=0.3)) as server:
        with Peer(server.endpoint) as peer, Peer(server.endpoint) as observer:
            welcome = peer.hello()
            peer.ask(*forward(welcome, 1, keep=True))
            give_up = time.monotonic() + 20
            while observer.status().sessions and time.monotonic() < give_up:
                pass
            assert observer.status().held_bytes == 0
            assert code_of(observer.ask(*forward(welcome, 2))) == "UNKNOWN_SESSION"


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_bad_frames_disturb_nobody(server: EchoServer, peer: Peer, name: str) -> None:
    """Each is answered with an error, dropped if it is not of the protocol, or ends its connection if it is over the
    bounds of any message; both clients go on."""
    frames, _ = BAD_FRAMES[name]
    with Peer(server.endpoint) as healthy, Peer(server.endpoint) as another:
        welcome = healthy.hello()
        peer.send_frames(frames or [b""])
        answered = (another if len(frames) > 100 else peer).ask(StatusRequest(request=5))
        if isinstance(answered, Error):
            assert answered.code in ("MALFORMED", "TOO_LARGE", "PROTO_VERSION", "CORRUPT")
            answered = peer.hear()
        assert isinstance(answered, Status)
        assert isinstance(healthy.ask(*forward(welcome, 1)), Result)


def describe(role: str, shape: tuple[int, ...], dtype: str = "f32", itemsize: int = 4) -> TensorDescriptor:
    elements = 1
    for dim in shape:
        elements *= dim
    return TensorDescriptor(role=role, dtype=dtype, shape=shape, nbytes=elements * itemsize)  # type: ignore[arg-type]


GOOD_ACTIVATIONS = describe("activations", (1, 2, HIDDEN))
WRONG_TENSORS: dict[str, tuple[list[TensorDescriptor], bytes, str]] = {
    "hidden size": ([describe("activations", (1, 2, HIDDEN + 1))], b"\0", "BAD_SHAPE"),
    "two dims": ([describe("activations", (2, HIDDEN))], b"\0", "BAD_SHAPE"),
    "no rows": ([describe("activations", (0, 2, HIDDEN))], b"\0", "BAD_SHAPE"),
    "integers": ([describe("activations", (1, 2, HIDDEN), "i32")], b"\0", "BAD_DTYPE"),
    "too many positions": ([describe("activations", (1, ROW_TOKENS + 1, HIDDEN))], b"\0", "TOO_LARGE"),
    "too many tokens": ([describe("activations", (800, 60, HIDDEN), "bf16", 2)], b"\0", "TOO_LARGE"),
    "no activations": ([describe("attention_mask", (1, 2), "i64", 8)], b"\0", "MALFORMED"),
    "gradients in a forward": ([GOOD_ACTIVATIONS, describe("gradients", (1, 2, HIDDEN))], b"\0", "MALFORMED"),
    "mask of another shape": ([GOOD_ACTIVATIONS, describe("attention_mask", (1, 3), "i64", 8)], b"\0", "BAD_SHAPE"),
    "mask of floats": ([GOOD_ACTIVATIONS, describe("attention_mask", (1, 2))], b"\0", "BAD_DTYPE"),
    "mask of twos": ([GOOD_ACTIVATIONS, describe("attention_mask", (1, 2), "u8", 1)], b"\2", "BAD_SHAPE"),
    "negative positions": ([GOOD_ACTIVATIONS, describe("position_ids", (1, 2), "i8", 1)], b"\xff", "BAD_SHAPE"),
    "positions out of range": ([GOOD_ACTIVATIONS, describe("position_ids", (1, 2), "u8", 1)], b"\x40", "BAD_SHAPE"),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_tensors_that_this_trunk_does_not_take_are_refused_by_name(peer: Peer, name: str) -> None:
    descriptors, fill, code = WRONG_TENSORS[name]
    welcome = peer.hello()
    header, _ = forward(welcome, 1, tensors=descriptors)
    assert code_of(peer.ask(header, [fill * descriptor.nbytes for descriptor in descriptors])) == code
    assert isinstance(peer.ask(*forward(welcome, 2)), Result)


def test_gradients_of_another_shape_are_refused_and_the_step_is_still_held(peer: Peer) -> None:
    welcome = peer.hello()
    peer.ask(*forward(welcome, 1, keep=True))
    assert code_of(peer.ask(*backward(welcome, 2, step=1, tokens=3))) == "BAD_SHAPE"
    assert isinstance(peer.ask(*backward(welcome, 3, step=1)), Result)


def test_a_request_before_hello_or_of_another_life_is_refused(peer: Peer) -> None:
    welcome = peer.hello()
    unknown = welcome.model_copy(update={"session": b"?" * 16})
    assert code_of(peer.ask(*forward(unknown, 1))) == "UNKNOWN_SESSION"
    earlier = welcome.model_copy(update={"epoch": b"?" * 16})
    assert code_of(peer.ask(*forward(earlier, 2))) == "STALE_EPOCH"


def test_another_connections_session_is_refused(server: EchoServer, peer: Peer) -> None:
    welcome = peer.hello()
    with Peer(server.endpoint) as thief:
        assert code_of(thief.ask(*forward(welcome, 1))) == "UNKNOWN_SESSION"


def test_a_request_that_is_delivered_twice_is_computed_once_and_has_one_answer_each_time_it_is_asked(
    server: EchoServer, peer: Peer
) -> None:
    welcome = peer.hello()
    server.compute.gate.clear()
    peer.send(*forward(welcome, 1, keep=True))
    peer.send(*forward(welcome, 1, keep=True))
    assert peer.status().sessions == 1  # the daemon has read what was sent before
    server.compute.gate.set()
    assert isinstance(peer.hear(), Result)
    again = peer.ask(*forward(welcome, 1, keep=True, attempt=1))  # its answer may have been lost
    assert isinstance(again, Result) and again.request == 1
    first = peer.ask(*backward(welcome, 2, step=1))
    assert peer.ask(*backward(welcome, 2, step=1, complete=True)) == first
    peer.send(*forward(welcome, 1, keep=True))  # an echo, of a step that is over: nothing is held for it again
    assert peer.status().held_bytes == 0
    assert server.compute.batches == [[Kind.FORWARD], [Kind.BACKWARD]]


def test_an_answer_that_is_not_kept_any_more_is_computed_again() -> None:
    with EchoServer(settings=ServerSettings(reply_memory_bytes=0)) as server, Peer(server.endpoint) as peer:
        welcome = peer.hello()
        peer.ask(*forward(welcome, 1, keep=True))
        assert isinstance(peer.ask(*forward(welcome, 1, keep=True, attempt=1)), Result)
        peer.ask(*backward(welcome, 2, step=1))
        header, buffers = backward(welcome, 2, step=1)
        assert code_of(peer.ask(header.model_copy(update={"attempt": 1}), buffers)) == "UNKNOWN_STEP"


@pytest.mark.parametrize("answered", [False, True])
def test_a_request_id_that_comes_again_with_something_else_is_refused(
    server: EchoServer, peer: Peer, answered: bool
) -> None:
    welcome = peer.hello()
    if answered:
        peer.ask(*forward(welcome, 1))
        wrong = [forward(welcome, 1, tokens=3), forward(welcome, 1, keep=True), backward(welcome, 1, step=1)]
    else:
        server.compute.gate.clear()
        peer.send(*forward(welcome, 1))
        header, buffers = forward(welcome, 1)
        wrong = [forward(welcome, 1, tokens=3), (header, [b"\1" + bytes(buffers[0][1:])])]
    for frames in wrong:
        assert code_of(peer.ask(*frames)) == "MALFORMED"
    server.compute.gate.set()


def test_a_hello_that_is_delivered_twice_opens_one_session(server: EchoServer, peer: Peer) -> None:
    hello = Hello(request=1, software="t", dtype="f32", model=None, cut=None, resume=None)
    first, second = peer.ask(hello), peer.ask(hello)
    assert first == second
    assert peer.status().sessions == 1


def test_a_session_goes_on_over_a_new_connection_with_all_that_was_held_and_asked(server: EchoServer) -> None:
    with Peer(server.endpoint) as lost:
        welcome = lost.hello()
        lost.ask(*forward(welcome, 1, keep=True))
        server.compute.gate.clear()
        lost.send(*forward(welcome, 2))
        assert server.compute.begun.acquire(timeout=20) and server.compute.begun.acquire(timeout=20)
    with Peer(server.endpoint) as peer:
        resumed = peer.hello(resume=welcome.session)
        assert resumed.session == welcome.session
        peer.send(*forward(resumed, 2, attempt=1))
        assert peer.status().sessions == 1  # the daemon has read what was sent before
        server.compute.gate.set()
        answer = peer.hear()
        assert isinstance(answer, Result) and answer.request == 2
        assert isinstance(peer.ask(*backward(resumed, 3, step=1)), Result)
        assert server.compute.batches == [[Kind.FORWARD], [Kind.FORWARD], [Kind.BACKWARD]]
        assert peer.status().sessions == 1


def test_a_session_that_is_not_there_any_more_is_opened_anew(peer: Peer) -> None:
    assert peer.hello(resume=b"?" * 16).session != b"?" * 16


def test_a_session_can_be_resumed_while_the_daemon_drains_but_no_new_one_opened(server: EchoServer) -> None:
    with Peer(server.endpoint) as lost:
        welcome = lost.hello()
        lost.ask(*forward(welcome, 1, keep=True))
        server.drain()
        assert isinstance(lost.hear(), GoAway)
    with Peer(server.endpoint) as peer:
        hello = Hello(request=5, software="t", dtype="f32", model=None, cut=None, resume=None)
        assert code_of(peer.ask(hello)) == "DRAINING"
        resumed = peer.hello(resume=welcome.session)
        assert isinstance(peer.ask(*backward(resumed, 3, step=1)), Result)


def test_signs_of_life_may_come_on_a_connection_of_their_own(server: EchoServer, peer: Peer) -> None:
    welcome = peer.hello()
    with Peer(server.endpoint) as pulse:
        assert isinstance(pulse.ask(Ping(session=welcome.session, epoch=welcome.epoch, request=1)), Pong)
        unknown = Ping(session=b"?" * 16, epoch=welcome.epoch, request=2)
        assert code_of(pulse.ask(unknown)) == "UNKNOWN_SESSION"


def test_no_more_sessions_are_opened_than_the_daemon_takes() -> None:
    with EchoServer(settings=ServerSettings(max_sessions=2)) as server, ExitStack() as stack:
        peers = [stack.enter_context(Peer(server.endpoint)) for _ in range(3)]
        welcomes = [peer.hello() for peer in peers[:2]]
        hello = Hello(request=5, software="t", dtype="f32", model=None, cut=None, resume=None)
        assert code_of(peers[2].ask(hello)) == "QUOTA"
        peers[0].send(Bye(session=welcomes[0].session, epoch=welcomes[0].epoch))
        assert peers[0].status().sessions == 1
        assert isinstance(peers[2].ask(hello), Welcome)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_activations_that_are_not_finite_are_refused_with_their_place(peer: Peer, dtype: str, value: float) -> None:
    welcome = peer.hello()
    values = np.zeros((2, 3, HIDDEN), dtype=np.float32)
    values[1, 2, 3] = value
    if dtype == "bf16":
        buffer = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    else:
        buffer = values.astype(np.float32 if dtype == "f32" else np.float16).tobytes()
    tensors = [describe("activations", values.shape, dtype, 4 if dtype == "f32" else 2)]
    answer = peer.ask(forward(welcome, 1, tensors=tensors)[0], [buffer])
    assert code_of(answer) == "NONFINITE"
    assert isinstance(answer, Error) and "row 1, token 2" in answer.text
    largest = np.full((2, 3, HIDDEN), np.finfo(np.float16).max if dtype == "f16" else 3e38, dtype=np.float32)
    if dtype == "bf16":
        buffer = (largest.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    else:
        buffer = largest.astype(np.float32 if dtype == "f32" else np.float16).tobytes()
    assert isinstance(peer.ask(forward(welcome, 2, tensors=tensors)[0], [buffer]), Result)


def test_memory_that_was_freed_is_given_back_when_nothing_runs(
    peer: Peer, server: EchoServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back = threading.Event()
    threads: list[threading.Thread] = []

    def give_back() -> bool:
        threads.append(threading.current_thread())
        given_back.set()
        return True

    monkeypatch.setattr("zsl.trunk.malloc.IDLE_SECONDS", 0.01)
    monkeypatch.setattr("zsl.trunk.daemon.server.give_back_freed_memory", give_back)
    assert isinstance(peer.ask(*forward(peer.hello(), 1)), Result)
    assert given_back.wait(20)
    assert threads[0] is not server._thread


def test_a_forward_only_daemon_says_so_and_refuses_backward() -> None:
    with EchoServer(forward_only=True) as server, Peer(server.endpoint) as peer:
        welcome = peer.hello()
        assert welcome.forward_only
        assert isinstance(peer.ask(*forward(welcome, 1)), Result)
        assert code_of(peer.ask(*forward(welcome, 2, keep=True))) == "FORWARD_ONLY"
        assert code_of(peer.ask(*backward(welcome, 3, step=1, complete=True))) == "FORWARD_ONLY"


def test_small_requests_share_a_pass_whatever_their_length_and_a_lone_one_does_not_wait(
    server: EchoServer, peer: Peer
) -> None:
    welcome = peer.hello()
    server.compute.gate.clear()
    peer.send(*forward(welcome, 1))
    assert server.compute.begun.acquire(timeout=20)  # alone at once: nothing else was queued
    for request in (2, 3, 4):
        peer.send(*forward(welcome, request))
    peer.send(*forward(welcome, 5, tokens=3))
    assert isinstance(peer.ask(Ping(session=welcome.session, epoch=welcome.epoch, request=6)), Pong)
    server.compute.gate.set()
    answers = {
        answer.request: answer.merged for answer in (peer.hear() for _ in range(5)) if isinstance(answer, Result)
    }
    assert answers == {1: 1, 2: 4, 3: 4, 4: 4, 5: 4}
    assert server.compute.batches == [[Kind.FORWARD], [Kind.FORWARD] * 4]


def test_a_decode_step_behind_training_of_its_own_tenant_shares_the_pass_of_other_sessions_steps() -> None:
    traits = {"cache_memory": CacheMemory(((1, None),)), "merges_caches": True}
    with EchoServer(**traits) as server, ExitStack() as stack:
        one, *others = [stack.enter_context(Peer(server.endpoint)) for _ in range(3)]
        welcomes = {peer: peer.hello() for peer in (one, *others)}
        server.compute.gate.clear()
        one.send(*forward(welcomes[one], 1, keep=True))
        assert server.compute.begun.acquire(timeout=20)
        for request in (2, 3, 4):
            one.send(*forward(welcomes[one], request, keep=True))
        for peer, welcome in welcomes.items():
            cache = UsedCache(name=5, version=0, length=0)
            peer.send(*forward(welcome, 5, tokens=1, cache=cache))
            assert isinstance(peer.ask(Ping(session=welcome.session, epoch=welcome.epoch, request=6)), Pong)
        server.compute.gate.set()
        answers = [one.hear() for _ in range(5)] + [peer.hear() for peer in others]
        assert all(isinstance(answer, Result) for answer in answers)
        merged = [answer.merged for answer in answers if isinstance(answer, Result) and answer.request == 5]
        assert merged == [3, 3, 3]
        assert server.compute.batches == [[Kind.FORWARD], [Kind.DECODE] * 3, [Kind.FORWARD] * 3]


def test_a_request_that_waits_for_company_in_vain_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = PassCost(0.5, 1e-3)
    with EchoServer(costs=Costs(slow, slow, slow)) as server:
        with Peer(server.endpoint) as one, Peer(server.endpoint) as other:
            welcomes = {peer: peer.hello() for peer in (one, other)}
            # In turn: whoever asks could meet the other, who has just been answered and has always come back at once.
            for request in range(1, 11):
                for peer in (one, other):
                    answer = peer.ask(*forward(welcomes[peer], request))
                    assert isinstance(answer, Result) and answer.merged == 1


def test_where_the_family_does_not_pack_requests_of_one_length_share_a_pass() -> None:
    with EchoServer(packs=False) as server, Peer(server.endpoint) as peer:
        welcome = peer.hello()
        assert not welcome.packs
        server.compute.gate.clear()
        peer.send(*forward(welcome, 1))
        assert server.compute.begun.acquire(timeout=20)
        for request, tokens in ((2, 2), (3, 3), (4, 3)):
            peer.send(*forward(welcome, request, tokens=tokens))
        assert isinstance(peer.ask(Ping(session=welcome.session, epoch=welcome.epoch, request=6)), Pong)
        server.compute.gate.set()
        answers = {a.request: a.merged for a in (peer.hear() for _ in range(4)) if isinstance(a, Result)}
        assert answers == {1: 1, 2: 1, 3: 2, 4: 2}


def test_large_requests_run_alone() -> None:
    with (
        EchoServer(batch_limits=BatchLimits(max_batch_tokens=64, merge_below_tokens=4)) as server,
        Peer(server.endpoint) as peer,
    ):
        welcome = peer.hello()
        server.compute.gate.clear()
        for request in range(1, 4):
            peer.send(*forward(welcome, request, rows=3))
        assert server.compute.begun.acquire(timeout=20)
        server.compute.gate.set()
        assert [answer.merged for answer in (peer.hear() for _ in range(3)) if isinstance(answer, Result)] == [1, 1, 1]


def test_pings_are_answered_while_the_device_is_busy_and_tell_for_how_long(server: EchoServer, peer: Peer) -> None:
    welcome = peer.hello()
    server.compute.gate.clear()
    peer.send(*forward(welcome, 1))
    assert server.compute.begun.acquire(timeout=20)
    ages = []
    while len(ages) < 100 and not (ages and ages[-1] > 0):
        pong = peer.ask(Ping(session=welcome.session, epoch=welcome.epoch, request=2))
        assert isinstance(pong, Pong)
        ages.append(pong.progress_age_ms)
    assert ages[-1] > 0
    server.compute.gate.set()
    assert isinstance(peer.hear(), Result)


def test_a_request_whose_time_is_up_is_answered_and_not_computed(server: EchoServer, peer: Peer) -> None:
    welcome = peer.hello()
    server.compute.gate.clear()
    peer.send(*forward(welcome, 1))
    assert server.compute.begun.acquire(timeout=20)
    assert code_of(peer.ask(*forward(welcome, 2, budget_ms=1))) == "DEADLINE"
    server.compute.gate.set()
    assert isinstance(peer.hear(), Result)
    assert len(server.compute.batches) == 1


def test_a_cancelled_request_is_answered_and_not_computed(server: EchoServer, peer: Peer) -> None:
    welcome = peer.hello()
    server.compute.gate.clear()
    peer.send(*forward(welcome, 1))
    assert server.compute.begun.acquire(timeout=20)
    peer.send(*forward(welcome, 2))
    assert code_of(peer.ask(Cancel(session=welcome.session, epoch=welcome.epoch, request=2))) == "CANCELLED"
    server.compute.gate.set()
    assert isinstance(peer.hear(), Result)
    assert len(server.compute.batches) == 1


def test_requests_over_the_credit_are_refused_at_once() -> None:
    with EchoServer(settings=ServerSettings(max_inflight_requests=2)) as server, Peer(server.endpoint) as peer:
        welcome = peer.hello()
        server.compute.gate.clear()
        for request in (1, 2):
            peer.send(*forward(welcome, request))
        answer = peer.ask(*forward(welcome, 3))
        assert code_of(answer) == "OVERLOADED"
        assert isinstance(answer, Error) and answer.retry == "same" and answer.retry_after_ms > 0
        server.compute.gate.set()
        assert {type(peer.hear()), type(peer.hear())} == {Result}


def test_a_client_that_vanishes_while_its_request_is_computed_disturbs_nobody(server: EchoServer, peer: Peer) -> None:
    server.compute.gate.clear()
    with Peer(server.endpoint) as vanishing:
        vanishing.send(*forward(vanishing.hello(), 1, keep=True))
        assert server.compute.begun.acquire(timeout=20)
    server.compute.gate.set()
    assert isinstance(peer.ask(*forward(peer.hello(), 1)), Result)


def test_a_drain_says_goaway_refuses_forwards_and_lets_open_steps_end(server: EchoServer, peer: Peer) -> None:
    welcome = peer.hello()
    peer.ask(*forward(welcome, 1, keep=True))
    server.drain()
    assert isinstance(peer.hear(), GoAway)
    answer = peer.ask(*forward(welcome, 2))
    assert code_of(answer) == "DRAINING"
    assert isinstance(answer, Error) and answer.retry == "elsewhere"
    assert isinstance(peer.ask(*backward(welcome, 3, step=1)), Result)
    server.join()


def test_a_drain_does_not_wait_for_ever_for_a_backward_that_never_comes() -> None:
    with EchoServer(settings=ServerSettings(drain_seconds=0.1)) as server, Peer(server.endpoint) as peer:
        peer.ask(*forward(peer.hello(), 1, keep=True))
        server.drain()
        server.join()


def test_a_backward_after_its_step_was_released_asks_for_everything(peer: Peer) -> None:
    welcome = peer.hello()
    peer.ask(*forward(welcome, 1, keep=True))
    peer.send(Release(session=welcome.session, epoch=welcome.epoch, step=1))
    assert code_of(peer.ask(*backward(welcome, 2, step=1))) == "UNKNOWN_STEP"


def test_cancel_and_release_of_what_never_was_change_nothing(peer: Peer) -> None:
    welcome = peer.hello()
    peer.send(Cancel(session=welcome.session, epoch=welcome.epoch, request=77))
    peer.send(Release(session=welcome.session, epoch=welcome.epoch, step=77))
    assert isinstance(peer.ask(*forward(welcome, 1)), Result)


FOREIGN_BYTES = {
    "TLS": bytes.fromhex("16030100a5010000a10303") + bytes(160),
    "HTTP": b"POST / HTTP/1.1\r\nHost: trunk\r\nContent-Length: 9\r\n\r\n" + b"x" * 200,
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n" + bytes(200),
    "ZMTP 1.0": b"\x01\x00" + b"\x06\x00hello" * 40,
    "random": random.Random(0).randbytes(4096),
    "nothing": b"",
    "half a greeting": b"\xff" + bytes(8) + b"\x7f\x03",
}


@pytest.mark.parametrize("name", FOREIGN_BYTES)
def test_what_is_not_zeromq_disturbs_nobody(server: EchoServer, peer: Peer, name: str) -> None:
    welcome = peer.hello()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as stranger:
        stranger.sendall(FOREIGN_BYTES[name])
        for request in range(1, 6):
            assert isinstance(peer.ask(*forward(welcome, request)), Result)
    assert peer.status().sessions == 1


def test_a_sender_that_stalls_in_the_middle_of_a_message_disturbs_nobody(server: EchoServer, peer: Peer) -> None:
    welcome = peer.hello()
    with FaultyLink(server.port) as link, Peer(link.endpoint) as slow:
        theirs = slow.hello()
        link.throttle("up", 1.0)
        slow.send(*forward(theirs, 1, tokens=60))
        for request in range(1, 6):
            assert isinstance(peer.ask(*forward(welcome, request)), Result)
        link.heal()
        assert isinstance(slow.hear(), Result)


def test_the_connections_of_a_client_whose_host_vanished_end_with_its_lease() -> None:
    with EchoServer(settings=ServerSettings(lease_seconds=2)) as server, FaultyLink(server.port) as link:
        with Peer(link.endpoint) as vanishing, Peer(link.endpoint) as its_pulse, Peer(server.endpoint) as peer:
            welcome = vanishing.hello()
            its_pulse.ask(Ping(session=welcome.session, epoch=welcome.epoch, request=1))
            assert peer.status().sessions == 1
            link.blackhole("both")
            give_up = time.monotonic() + 20
            while server.connections > 1 and time.monotonic() < give_up:
                peer.status()
            assert (server.connections, peer.status().sessions) == (1, 0)


def test_a_resumed_session_leaves_its_old_connections(server: EchoServer) -> None:
    with Peer(server.endpoint) as old, Peer(server.endpoint) as old_pulse, Peer(server.endpoint) as new:
        welcome = old.hello()
        old_pulse.ask(Ping(session=welcome.session, epoch=welcome.epoch, request=1))
        assert new.hello(resume=welcome.session).session == welcome.session
        give_up = time.monotonic() + 20
        while server.connections_of_peers > 1 and time.monotonic() < give_up:
            pass
        assert server.connections_of_peers == 1


def test_a_backward_that_brings_everything_gives_up_what_was_kept_for_its_step(server: EchoServer, peer: Peer) -> None:
    welcome = peer.hello()
    peer.ask(*forward(welcome, 1, keep=True))
    assert isinstance(peer.ask(*backward(welcome, 2, step=1, complete=True)), Result)
    assert server.compute.dropped == 1 and peer.status().held_bytes == 0


@pytest.mark.parametrize("ended_by", ["cancel", "bye"])
def test_a_queued_backward_that_is_not_computed_gives_up_what_was_kept_for_it(
    server: EchoServer, peer: Peer, ended_by: str
) -> None:
    welcome = peer.hello()
    peer.ask(*forward(welcome, 1, keep=True))
    server.compute.begun.acquire()
    server.compute.gate.clear()
    with Peer(server.endpoint) as other:
        other.send(*forward(other.hello(), 1))
        assert server.compute.begun.acquire(timeout=20)
        peer.send(*backward(welcome, 2, step=1))
        if ended_by == "cancel":
            assert code_of(peer.ask(Cancel(session=welcome.session, epoch=welcome.epoch, request=2))) == "CANCELLED"
        else:
            peer.send(Bye(session=welcome.session, epoch=welcome.epoch))
            assert peer.status().sessions == 1
        assert server.compute.dropped == 1
        server.compute.gate.set()
        assert isinstance(other.hear(), Result)


def test_a_forward_whose_session_was_closed_meanwhile_is_not_kept(server: EchoServer, peer: Peer) -> None:
    welcome = peer.hello()
    server.compute.gate.clear()
    peer.send(*forward(welcome, 1, keep=True))
    assert server.compute.begun.acquire(timeout=20)
    peer.send(Bye(session=welcome.session, epoch=welcome.epoch))
    assert peer.status().sessions == 0
    server.compute.gate.set()
    assert isinstance(peer.ask(*forward(peer.hello(), 2)), Result)
    assert server.compute.dropped == 1
