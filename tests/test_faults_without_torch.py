"""A step ends with the gradient of the fault-free run, or with a typed error inside its deadline: on real sockets, with
a trunk that squares. What the faults are, and what is to become of them, is in docs/reliability.md."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from support.echo import IDENTITY, EchoServer
from support.faulty_link import FaultyLink
from support.faulty_messages import FaultyMessages
from support.peer import Peer, forward
from support.square import SquareClient, SquareDaemon, SquareServer, gradient, some, squared
from zsl.errors import ConnectionLost, OverloadedError, RequestTimeout, TrunkUnreachable, WrongModelError, ZslError
from zsl.link.unanswered_requests import SHORTEST_RETRY_SECONDS
from zsl.trunk.settings import ServerSettings
from zsl.wire.messages import Cut, MessageType

# So that what takes pings to notice is noticed within a second.
QUICK = ServerSettings(ping_seconds=0.1)
LARGE_TOKENS = 60  # 960 bytes


@pytest.fixture
def server() -> Iterator[SquareServer]:
    with SquareServer(settings=QUICK) as running:
        yield running


@pytest.fixture
def link(server: SquareServer) -> Iterator[FaultyMessages]:
    with FaultyMessages(server.port) as between:
        yield between


def steps_are_right(client: SquareClient, count: int = 5, *, tokens: int = LARGE_TOKENS) -> bool:
    return all(client.is_right(some(seed, tokens), some(seed + 100, tokens)) for seed in range(count))


TCP_FAULTS: dict[str, Callable[[FaultyLink], None]] = {
    "delay": lambda link: link.delay("both", 0.02, jitter_seconds=0.02),
    "throttle": lambda link: link.throttle("both", 20_000),
    "slice": lambda link: link.slice("both", 1),
    "cut up": lambda link: link.cut("up", after_bytes=2_000),
    "cut down": lambda link: link.cut("down", after_bytes=2_000),
    "reset up": lambda link: link.reset("up", after_bytes=1_500),
    "reset down": lambda link: link.reset("down", after_bytes=1_500),
    "half_close up": lambda link: link.half_close("up", after_bytes=1_000),
    "half_close down": lambda link: link.half_close("down", after_bytes=1_000),
    "flip_bits up": lambda link: link.flip_bits("up", after_bytes=1_500),
    "flip_bits down": lambda link: link.flip_bits("down", after_bytes=1_500),
}


@pytest.mark.parametrize("fault", TCP_FAULTS)
def test_steps_over_a_bad_line_are_right(link: FaultyMessages, fault: str) -> None:
    with SquareClient(link.endpoint) as client:
        TCP_FAULTS[fault](link)
        assert steps_are_right(client)
        link.wait_for(fault.partition(" ")[0])


@pytest.mark.parametrize("way", ["up", "down", "both"])
@pytest.mark.parametrize("fault", ["blackhole", "hold"])
def test_a_network_that_is_parted_for_a_while_costs_time_only(
    link: FaultyMessages, fault: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zsl.link.opening.ATTEMPT_SECONDS", 1.0)
    with SquareClient(link.endpoint) as client, ThreadPoolExecutor(1) as pool:
        assert steps_are_right(client, 1)
        getattr(link, fault)(way)
        running = pool.submit(steps_are_right, client, 3)
        link.wait_for(fault)
        accepted = link.accepted
        wait_until(lambda: link.accepted > accepted, "the silence was not noticed")
        link.heal()
        assert running.result(20)


def test_flipped_bits_without_end_are_a_typed_error_and_no_wrong_number(
    link: FaultyMessages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zsl.link.opening.ATTEMPT_SECONDS", 0.4)
    with SquareClient(link.endpoint, request_timeout_seconds=1) as client:
        link.flip_bits("both", every_chunks=3)
        for seed in range(4):
            try:
                assert client.is_right(some(seed, LARGE_TOKENS), some(seed + 1, LARGE_TOKENS))
            except (ConnectionLost, RequestTimeout):
                pass
        assert link.happened["flip_bits"] > 5
        link.heal()
        client.wait_for_answers(20)
        assert steps_are_right(client)


@pytest.mark.parametrize("only", [MessageType.HELLO, MessageType.FORWARD, MessageType.BACKWARD, None])
def test_messages_that_arrive_twice_at_the_daemon_change_nothing(
    link: FaultyMessages, only: MessageType | None
) -> None:
    link.duplicate("up", only=only)
    with SquareClient(link.endpoint) as client:
        assert steps_are_right(client)
    link.wait_for("duplicate")


def test_answers_that_arrive_twice_change_nothing(link: FaultyMessages) -> None:
    link.duplicate("down")
    with SquareClient(link.endpoint) as client:
        assert steps_are_right(client)
    link.wait_for("duplicate", 10)


@pytest.mark.parametrize(
    ("way", "only"),
    [
        ("up", MessageType.HELLO),
        ("up", MessageType.FORWARD),
        ("up", MessageType.BACKWARD),
        ("down", MessageType.WELCOME),
        ("down", MessageType.RESULT),
    ],
)
def test_a_message_that_is_lost_is_noticed_and_asked_again(link: FaultyMessages, way: str, only: MessageType) -> None:
    link.drop(way, only=only)  # type: ignore[arg-type]
    with SquareClient(link.endpoint, connect_timeout_seconds=10) as client:
        assert steps_are_right(client, 2)
    link.wait_for("drop")


def test_answers_that_overtake_each_other_reach_those_who_asked(link: FaultyMessages) -> None:
    with SquareClient(link.endpoint) as client, ThreadPoolExecutor(4) as pool:
        link.swap("down", count=20, only=MessageType.RESULT)
        inputs = [(some(seed), some(seed + 100)) for seed in range(40)]
        assert all(pool.map(lambda pair: client.is_right(*pair), inputs))
        link.wait_for("swap")


def test_messages_of_an_earlier_life_that_come_late_change_nothing() -> None:
    with SquareServer(settings=QUICK) as first, FaultyMessages(first.port) as link:
        with SquareClient(link.endpoint) as client:
            assert steps_are_right(client, 2)
            first.stop()
            with SquareServer(settings=QUICK) as second:
                link.retarget(second.port)
                assert steps_are_right(client, 1)
                for message in link.recorded("up"):
                    link.inject("up", message)
                for message in link.recorded("down"):
                    link.inject("down", message)
                assert steps_are_right(client)


@pytest.mark.parametrize("place", ["before-forward", "after-forward", "before-backward", "after-backward"])
def test_a_daemon_that_is_killed_anywhere_in_a_step_costs_no_gradient(tmp_path: Path, place: str) -> None:
    """The second visit, so that one whole step lies before."""
    fails = {"ZSL_FAILPOINT": f"{place}:kill:2"}
    with (
        SquareDaemon(log=tmp_path / "log", environment=fails) as first,
        FaultyLink(first.port) as link,
        SquareClient(link.endpoint) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        running = pool.submit(steps_are_right, client, 3)
        assert first.wait() == -signal.SIGKILL
        with SquareDaemon(log=tmp_path / "log") as second:
            link.retarget(second.port)
            assert running.result(30)


def test_a_daemon_that_is_stopped_is_noticed_and_goes_on_where_it_was(tmp_path: Path) -> None:
    with SquareDaemon(log=tmp_path / "log", ping_seconds=0.1) as daemon, SquareClient(daemon.endpoint) as client:
        assert steps_are_right(client, 1)
        daemon.signal(signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(steps_are_right, client, 3)
            wait_until(lambda: not client.is_open, "the silence was not noticed")
            daemon.signal(signal.SIGCONT)
            assert running.result(20)


def test_a_daemon_that_stays_stopped_is_a_typed_error_in_time(tmp_path: Path) -> None:
    with SquareDaemon(log=tmp_path / "log", ping_seconds=0.1) as daemon:
        with SquareClient(daemon.endpoint, request_timeout_seconds=1) as client:
            daemon.signal(signal.SIGSTOP)
            with pytest.raises((ConnectionLost, RequestTimeout)):
                client.forward(some(0))
            daemon.signal(signal.SIGCONT)
            client.wait_for_answers(20)
            assert steps_are_right(client, 1)


def test_a_compute_thread_that_hangs_is_a_typed_error_that_says_so(tmp_path: Path) -> None:
    hangs = {"ZSL_FAILPOINT": "before-backward:hang"}
    with SquareDaemon(log=tmp_path / "log", environment=hangs, ping_seconds=0.1, drain_seconds=0.1) as daemon:
        with SquareClient(daemon.endpoint, request_timeout_seconds=2) as client:
            with pytest.raises(RequestTimeout, match="at one pass"):
                client.step(some(0), some(1))
            daemon.kill()


def test_a_daemon_whose_compute_thread_hangs_for_too_long_ends_so_that_another_can_take_over(tmp_path: Path) -> None:
    hangs = {"ZSL_FAILPOINT": "before-backward:hang"}
    with (
        SquareDaemon(log=tmp_path / "log", environment=hangs, stuck_seconds=0.3) as first,
        FaultyLink(first.port) as link,
        SquareClient(link.endpoint) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        running = pool.submit(steps_are_right, client, 3)
        assert first.wait() == 1
        with SquareDaemon(log=tmp_path / "log") as second:
            link.retarget(second.port)
            assert running.result(30)
    assert "may hang" in (tmp_path / "log").read_text()


def test_of_several_endpoints_the_next_is_taken_when_one_is_gone(tmp_path: Path) -> None:
    with ExitStack() as stack:
        daemons = [stack.enter_context(SquareDaemon(log=tmp_path / f"{n}.log")) for n in range(2)]
        client = stack.enter_context(SquareClient(",".join(daemon.endpoint for daemon in daemons)))
        x, gradients = some(1), some(2)
        output, step = client.forward(x)
        daemons[0].kill()
        assert np.array_equal(client.backward(step, x, gradients), gradient(x, gradients))
        assert np.array_equal(output, squared(x))
        assert steps_are_right(client)


def test_of_several_endpoints_one_with_other_weights_is_left_out() -> None:
    other = IDENTITY.model_copy(update={"weights_digest": "0" * 64})
    with EchoServer(model=other) as wrong, SquareServer(settings=QUICK) as first, SquareServer(settings=QUICK) as last:
        with SquareClient(f"{wrong.endpoint},{first.endpoint},{last.endpoint}") as client:
            assert steps_are_right(client, 1)
            first.stop()
            assert steps_are_right(client, 2)
        with pytest.raises(WrongModelError, match="weights"):
            SquareClient(wrong.endpoint).connect()
        with EchoServer(cut=Cut(start=1, stop=4)) as also_wrong, pytest.raises(WrongModelError):
            SquareClient(f"{wrong.endpoint},{also_wrong.endpoint}").connect()


def test_a_trunk_that_takes_over_with_other_weights_is_never_used() -> None:
    other = IDENTITY.model_copy(update={"weights_digest": "0" * 64})
    with SquareServer(settings=QUICK) as first:
        with SquareClient(first.endpoint, request_timeout_seconds=10) as client:
            assert steps_are_right(client, 1)
            first.stop()
            with EchoServer(port=first.port, model=other), pytest.raises(WrongModelError):
                client.forward(some(0))


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_flipped_bit_anywhere_in_a_handshake_or_hello_ends_no_training(
    link: FaultyMessages, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zsl.link.opening.ATTEMPT_SECONDS", 0.5)
    with SquareClient(link.endpoint) as client:
        for byte in range(64, 240, 11):  # behind the greeting, which is libzmq's own business
            link.cut()
            link.flip_bits(way, after_bytes=byte)  # type: ignore[arg-type]
            assert steps_are_right(client, 1)
        link.wait_for("flip_bits", 5)


def test_with_no_daemon_at_any_endpoint_each_is_named_in_time() -> None:
    with FaultyLink(1) as one, FaultyLink(1) as other:
        one.refuse()
        other.refuse()
        client = SquareClient(f"{one.endpoint},{other.endpoint}", connect_timeout_seconds=0.5)
        with pytest.raises(TrunkUnreachable) as caught:
            client.connect()
        assert one.endpoint in str(caught.value) and other.endpoint in str(caught.value)


def test_of_several_endpoints_one_that_drains_is_left_without_losing_a_step() -> None:
    with SquareServer(settings=QUICK) as first, SquareServer(settings=QUICK) as second:
        with SquareClient(f"{first.endpoint},{second.endpoint}") as client:
            x, gradients = some(1), some(2)
            _, step = client.forward(x)
            first.drain()
            assert np.array_equal(client.backward(step, x, gradients), gradient(x, gradients))
            assert steps_are_right(client)
            first.join()


def test_a_daemon_that_is_told_to_end_while_a_pass_hangs_ends(tmp_path: Path) -> None:
    hangs = {"ZSL_FAILPOINT": "before-backward:hang", "ZSL_TEST_LAST_PASS_SECONDS": "0.2"}
    with SquareDaemon(log=tmp_path / "log", environment=hangs, drain_seconds=0.1) as daemon:
        with SquareClient(daemon.endpoint, request_timeout_seconds=20) as client, ThreadPoolExecutor(1) as pool:
            x, gradients = some(0), some(1)
            _, step = client.forward(x)
            hung = pool.submit(client.backward, step, x, gradients)
            with Peer(daemon.endpoint) as watcher:
                wait_until(lambda: watcher.status().held_bytes == 0, "the backward did not begin")
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0
            client.connection.close()
            with pytest.raises(ZslError):
                hung.result(20)
    assert "has not ended in" in (tmp_path / "log").read_text()


def test_a_client_that_reads_no_answers_is_dropped_and_the_others_do_not_notice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("zsl.transport.send_queue.SLOW_SECONDS", 0.5)
    monkeypatch.setattr("zsl.transport.send_queue.MIN_BYTES_PER_SECOND", 1e9)
    large = ServerSettings(max_request_tokens=1 << 20)
    with SquareServer(settings=large, row_tokens=1 << 20) as server, FaultyLink(server.port) as link:
        with SquareClient(server.endpoint) as healthy, Peer(link.endpoint) as slow:
            welcome = slow.hello()
            link.hold("down")
            for request in range(8):
                slow.send(*forward(welcome, request, tokens=200_000))  # 3.2 MB each, more than the kernel takes
            wait_until(lambda: server.sessions == 1, "the one that does not read was not dropped")
            assert steps_are_right(healthy)
            wait_until(lambda: link.happened["hold"] > 0, "nothing was held back")


def test_a_daemon_that_says_come_again_at_once_does_not_keep_its_client_spinning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = 0

    def refuse(*_: object, **__: object) -> None:
        nonlocal asked
        asked += 1
        raise OverloadedError(retry_after_ms=0)

    monkeypatch.setattr("zsl.trunk.requests.credit.Credit.check", refuse)
    with SquareServer() as server, SquareClient(server.endpoint, request_timeout_seconds=0.3) as client:
        with pytest.raises(RequestTimeout):
            client.forward(some(1))
    assert 1 < asked <= 0.3 / SHORTEST_RETRY_SECONDS + 1


def test_what_a_client_that_vanished_left_is_freed_at_the_end_of_its_lease() -> None:
    with SquareServer(settings=ServerSettings(ping_seconds=0.1, lease_seconds=2)) as server:
        with FaultyLink(server.port) as link, SquareClient(link.endpoint) as client:
            client.forward(some(0))
            assert server.held_bytes > 0
            link.blackhole("both")
            wait_until(lambda: server.held_bytes == 0, "the lease did not end")
            assert server.sessions == 0


def test_many_clients_with_broken_lines_get_right_numbers(server: SquareServer) -> None:
    """Each has a line of its own that breaks again and again, at places that chance decides."""
    with ExitStack() as stack:
        links = [stack.enter_context(FaultyLink(server.port, seed=seed)) for seed in range(6)]
        clients = [stack.enter_context(SquareClient(link.endpoint, request_timeout_seconds=60)) for link in links]
        over = threading.Event()

        def break_lines() -> None:
            random = np.random.default_rng(0)
            while not over.wait(0.15):
                link = links[random.integers(len(links))]
                if link.to_come:
                    continue  # faults that pile up while little is sent would let no handshake through
                breaks = (link.cut, link.reset)[random.integers(2)]
                breaks(("up", "down", "both")[random.integers(3)], after_bytes=1 + int(random.integers(3_000)))

        breaker = threading.Thread(target=break_lines)
        breaker.start()
        try:
            with ThreadPoolExecutor(len(clients)) as pool:
                while sum(link.happened["cut"] + link.happened["reset"] for link in links) <= 5:
                    assert all(pool.map(lambda client: steps_are_right(client, 15), clients))
        finally:
            over.set()
            breaker.join(20)


def wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    """Polls, for a bounded time."""
    ended = threading.Event()
    for _ in range(2000):
        if condition():
            return
        ended.wait(0.01)
    raise AssertionError(otherwise)
