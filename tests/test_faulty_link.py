"""The faulty link does what its names say: shown with plain sockets, and with plain ZeroMQ for whole messages."""

from __future__ import annotations

import gc
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import zmq

from support.faulty_link import FaultyLink
from support.faulty_messages import COMMAND, MORE, FaultyMessages, ZmtpReader, encode_frame, encode_message

WAIT_SECONDS = 20
BYTES = bytes(range(256)) * 4


class Ends:
    """A target that listens, the link to it, and sockets on both sides."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.listener.settimeout(WAIT_SECONDS)
        self.link = stack.enter_context(FaultyLink(self.listener.getsockname()[1]))

    def connect(self) -> socket.socket:
        return self._stack.enter_context(socket.create_connection(("127.0.0.1", self.link.port), WAIT_SECONDS))

    def join(self) -> tuple[socket.socket, socket.socket]:
        """The client's end and the target's end of a new connection."""
        near = self.connect()
        far = self._stack.enter_context(self.listener.accept()[0])
        far.settimeout(WAIT_SECONDS)
        return near, far


@pytest.fixture
def ends() -> Iterator[Ends]:
    with ExitStack() as stack:
        yield Ends(stack)


@pytest.fixture
def link(ends: Ends) -> FaultyLink:
    return ends.link


def read(end: socket.socket, count: int) -> bytes:
    """So many bytes, fewer only if the other end closed."""
    found = b""
    while len(found) < count and (more := end.recv(count - len(found))):
        found += more
    return found


def has_nothing(end: socket.socket) -> bool:
    return not select.select([end], [], [], 0)[0]


def differing_bits(one: bytes, other: bytes) -> list[int]:
    """The index of each byte that differs, once for each bit."""
    assert len(one) == len(other)
    return [i for i, (a, b) in enumerate(zip(one, other, strict=True)) for _ in range((a ^ b).bit_count())]


def test_without_a_fault_bytes_pass_both_ways_and_are_counted(ends: Ends, link: FaultyLink) -> None:
    near, far = ends.join()
    near.sendall(BYTES)
    assert read(far, len(BYTES)) == BYTES
    far.sendall(BYTES[:10])
    assert read(near, 10) == BYTES[:10]
    assert link.passed_bytes == {"up": len(BYTES), "down": 10}
    assert (link.accepted, dict(link.happened)) == (1, {})


def test_the_end_of_one_way_passes_and_the_other_way_stays_open(ends: Ends) -> None:
    near, far = ends.join()
    near.shutdown(socket.SHUT_WR)
    assert read(far, 1) == b""
    far.sendall(b"answer")
    assert read(near, 6) == b"answer"


def test_a_reset_passes(ends: Ends) -> None:
    near, far = ends.join()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    near.close()
    with pytest.raises(ConnectionResetError):
        far.recv(1)


def test_delayed_bytes_arrive_late_and_in_their_order(ends: Ends, link: FaultyLink) -> None:
    near, far = ends.join()
    link.delay("up", 0.05, jitter_seconds=0.02)
    begin = time.monotonic()
    for index in range(20):
        near.sendall(bytes([index]))
    assert read(far, 20) == bytes(range(20))
    assert time.monotonic() - begin > 0.05
    assert link.happened["delay"] >= 1
    far.sendall(b"answer")
    assert read(near, 6) == b"answer"
    late = link.happened["delay"]
    link.heal()
    near.sendall(b"x")
    assert read(far, 1) == b"x"
    assert link.happened["delay"] == late


def test_throttled_bytes_take_their_time(ends: Ends, link: FaultyLink) -> None:
    near, far = ends.join()
    link.throttle("down", 10_000)
    begin = time.monotonic()
    far.sendall(BYTES)
    assert read(near, len(BYTES)) == BYTES
    assert time.monotonic() - begin > 0.05
    assert link.happened["throttle"] > 1


def test_slices_arrive_one_by_one(ends: Ends, link: FaultyLink) -> None:
    near, far = ends.join()
    link.slice("up", 1)
    near.sendall(BYTES[:20])
    assert read(far, 20) == BYTES[:20]
    assert link.happened["slice"] == 19


@pytest.mark.parametrize("fault", ["cut", "reset"])
def test_all_connections_end_at_once(ends: Ends, link: FaultyLink, fault: str) -> None:
    connections = [ends.join(), ends.join()]
    for near, far in connections:
        near.sendall(b"x")
        assert read(far, 1) == b"x"
    getattr(link, fault)()
    for end in [end for connection in connections for end in connection]:
        if fault == "cut":
            assert end.recv(1) == b""
        else:
            with pytest.raises(ConnectionResetError):
                end.recv(1)
    assert link.happened[fault] == 2
    near, far = ends.join()
    near.sendall(b"again")
    assert read(far, 5) == b"again"


@pytest.mark.parametrize("fault", ["cut", "reset"])
def test_a_connection_ends_in_the_middle_of_what_is_sent(ends: Ends, link: FaultyLink, fault: str) -> None:
    (near, far), (other_near, other_far) = ends.join(), ends.join()
    near.sendall(BYTES[:100])
    assert read(far, 100) == BYTES[:100]
    getattr(link, fault)("up", after_bytes=5)
    near.sendall(BYTES[100:200])
    assert read(far, 5) == BYTES[100:105]
    if fault == "cut":
        assert far.recv(1) == b""
    else:
        with pytest.raises(ConnectionResetError):
            far.recv(1)
    other_near.sendall(b"unharmed")
    assert read(other_far, 8) == b"unharmed"
    assert link.happened[fault] == 1


def test_a_half_closed_way_ends_for_the_receiver_only(ends: Ends, link: FaultyLink) -> None:
    near, far = ends.join()
    link.half_close("up", after_bytes=5)
    near.sendall(BYTES[:10])
    assert read(far, 10) == BYTES[:5]
    near.sendall(BYTES)  # no error: nobody tells the sender
    far.sendall(b"answer")
    assert read(near, 6) == b"answer"
    assert link.happened["half_close"] == 1
    link.half_close("down")
    assert near.recv(1) == b""


def test_a_black_hole_swallows_bytes_and_the_sender_s_end(ends: Ends, link: FaultyLink) -> None:
    near, far = ends.join()
    link.blackhole("up")
    near.sendall(b"lost")
    link.wait_for("blackhole")
    assert has_nothing(far)
    far.sendall(b"answer")
    assert read(near, 6) == b"answer"
    link.heal()
    near.sendall(b"found")
    assert read(far, 5) == b"found"
    link.blackhole("both")
    near.close()
    link.wait_for("blackhole", 2)
    assert has_nothing(far)
    later, _ = ends.join()
    later.sendall(b"lost")
    link.wait_for("blackhole", 3)


def test_what_is_held_arrives_when_the_link_is_healed(ends: Ends, link: FaultyLink) -> None:
    near, far = ends.join()
    link.hold("both")
    near.sendall(b"ques")
    far.sendall(b"answer")
    link.wait_for("hold", 2)
    near.sendall(b"tion")
    near.shutdown(socket.SHUT_WR)
    assert has_nothing(far) and has_nothing(near)
    link.heal()
    assert read(far, 9) == b"question"
    assert read(near, 6) == b"answer"


def test_refused_connections_are_reset_and_do_not_reach_the_target(ends: Ends, link: FaultyLink) -> None:
    old_near, old_far = ends.join()
    link.refuse()
    with pytest.raises(ConnectionResetError):
        ends.connect().recv(1)
    assert link.happened["refuse"] == 1
    old_near.sendall(b"x")
    assert read(old_far, 1) == b"x"
    link.heal()
    near, far = ends.join()  # the next connection that the target sees
    near.sendall(b"y")
    assert read(far, 1) == b"y"


def test_one_bit_flips_in_the_byte_that_was_asked_for(ends: Ends, link: FaultyLink) -> None:
    near, far = ends.join()
    near.sendall(BYTES[:7])
    assert read(far, 7) == BYTES[:7]
    link.flip_bits("up", after_bytes=500)
    near.sendall(BYTES)
    assert differing_bits(read(far, len(BYTES)), BYTES) == [500]
    near.sendall(BYTES)
    assert read(far, len(BYTES)) == BYTES
    assert link.happened["flip_bits"] == 1


def test_one_bit_flips_in_every_third_chunk(ends: Ends, link: FaultyLink) -> None:
    near, far = ends.join()
    link.flip_bits("up", every_chunks=3)
    damaged = []
    for _ in range(9):
        near.sendall(BYTES)
        damaged.append(len(differing_bits(read(far, len(BYTES)), BYTES)))
    assert sum(damaged) == link.happened["flip_bits"] >= 3


def test_the_same_seed_flips_the_same_bits() -> None:
    def damaged(seed: int) -> bytes:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            with FaultyLink(listener.getsockname()[1], seed=seed) as link:
                link.flip_bits("up", every_chunks=1)
                with socket.create_connection(("127.0.0.1", link.port), WAIT_SECONDS) as near:
                    far, _ = listener.accept()
                    with far:
                        near.sendall(b"\0")
                        return read(far, 1)

    bits = [damaged(seed) for seed in range(8)]
    assert bits == [damaged(seed) for seed in range(8)]
    assert len(set(bits)) > 1


def test_new_connections_go_to_another_target_when_the_link_is_told_so(ends: Ends, link: FaultyLink) -> None:
    near, far = ends.join()
    with socket.create_server(("127.0.0.1", 0)) as successor:
        successor.settimeout(WAIT_SECONDS)
        link.retarget(successor.getsockname()[1])
        later = ends.connect()
        with successor.accept()[0] as reached:
            later.sendall(b"x")
            assert read(reached, 1) == b"x"
    near.sendall(b"y")
    assert read(far, 1) == b"y"
    with pytest.raises(ConnectionResetError):  # nobody listens there any more
        ends.connect().recv(1)


def test_nothing_is_left_of_a_link_that_ends_with_open_connections() -> None:
    threads = threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with FaultyLink(listener.getsockname()[1]) as link:
            near = socket.create_connection(("127.0.0.1", link.port), WAIT_SECONDS)
            far, _ = listener.accept()
            link.hold("both")
            near.sendall(b"x")
            link.wait_for("hold")
        with near, far:
            assert near.recv(1) == far.recv(1) == b""
    assert threading.active_count() <= threads


class Peers:
    """A ROUTER, the link to it, and DEALERs that speak through it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._context = stack.enter_context(zmq.Context())
        self.router = self._socket(zmq.ROUTER)
        self.link = stack.enter_context(FaultyMessages(self.router.bind_to_random_port("tcp://127.0.0.1")))

    def dealer(self) -> zmq.Socket[bytes]:
        """A new one, on a connection of its own that is open."""
        dealer = self._socket(zmq.DEALER)
        dealer.connect(self.link.endpoint)
        dealer.send(b"hello")
        self.router.send_multipart(self.router.recv_multipart())
        assert dealer.recv() == b"hello"
        return dealer

    def heard(self, count: int) -> list[list[bytes]]:
        """Receive the ROUTER's next messages, without their routing ids."""
        return [self.router.recv_multipart()[1:] for _ in range(count)]

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        opened = self._stack.enter_context(self._context.socket(kind))
        opened.linger = 0
        opened.rcvtimeo = WAIT_SECONDS * 1000
        return opened


@pytest.fixture
def peers() -> Iterator[Peers]:
    with ExitStack() as stack:
        yield Peers(stack)


def say(dealer: zmq.Socket[bytes], *words: bytes) -> None:
    for word in words:
        dealer.send_multipart([word, b"", BYTES])


def words(messages: list[list[bytes]]) -> list[bytes]:
    assert all(rest == [b"", BYTES] for _, *rest in messages)
    return [word for word, *_ in messages]


def test_whole_messages_pass_unchanged_and_are_recorded(peers: Peers) -> None:
    dealer = peers.dealer()
    peers.link.slice("both", 100)
    messages = [[b"one"], [b"", b"", b""], [bytes(255), bytes(256), BYTES * 500]]
    for message in messages:
        dealer.send_multipart(message)
        name, *heard = peers.router.recv_multipart()
        assert heard == message
        peers.router.send_multipart([name, *message])
        assert dealer.recv_multipart() == message
    assert peers.link.recorded("up") == peers.link.recorded("down") == [[b"hello"], *messages]


def test_every_third_message_arrives_twice(peers: Peers) -> None:
    dealer = peers.dealer()
    peers.link.duplicate("up", every=3)
    say(dealer, b"1", b"2", b"3", b"4", b"5", b"6")
    assert words(peers.heard(8)) == [b"1", b"2", b"3", b"3", b"4", b"5", b"6", b"6"]
    assert peers.link.happened["duplicate"] == 2


def test_a_dropped_message_does_not_arrive_and_can_be_said_later(peers: Peers) -> None:
    dealer = peers.dealer()
    peers.link.drop("up", count=2)
    say(dealer, b"1", b"2", b"3")
    assert words(peers.heard(1)) == [b"3"]
    assert peers.link.happened["drop"] == 2
    _, first, *_ = peers.link.recorded("up")
    peers.link.inject("up", first)
    assert words(peers.heard(1)) == [b"1"]


def test_a_message_changes_places_with_the_next_one(peers: Peers) -> None:
    dealer = peers.dealer()
    peers.link.swap("up", count=1)
    say(dealer, b"1", b"2", b"3")
    assert words(peers.heard(3)) == [b"2", b"1", b"3"]
    assert peers.link.happened["swap"] == 1


def test_the_other_way_has_its_own_faults(peers: Peers) -> None:
    dealer = peers.dealer()
    peers.link.drop("down", count=1)
    say(dealer, b"1", b"2")
    for _ in range(2):
        peers.router.send_multipart(peers.router.recv_multipart())
    assert words([dealer.recv_multipart()]) == [b"2"]


def test_a_fault_can_be_of_one_type_of_messages(peers: Peers) -> None:
    dealer = peers.dealer()
    peers.link.drop("up", count=1, only=5)
    for message_type in (3, 5, 5):
        dealer.send_multipart([b"ZSLT\x02" + bytes([message_type, 0, 0]), b"header"])
    assert [preamble[5] for preamble, _ in peers.heard(2)] == [3, 5]
    assert peers.link.happened["drop"] == 1


def test_healing_ends_the_faults_of_messages(peers: Peers) -> None:
    dealer = peers.dealer()
    peers.link.duplicate("both")
    peers.link.heal()
    say(dealer, b"1", b"2")
    assert words(peers.heard(2)) == [b"1", b"2"]


def test_a_message_of_an_earlier_connection_can_be_said_on_the_present_one(peers: Peers) -> None:
    dealer = peers.dealer()
    say(dealer, b"before")
    earlier, *before = peers.router.recv_multipart()
    assert words([before]) == [b"before"]
    peers.link.cut()
    dealer.close(0)  # else it would connect again by itself
    say(peers.dealer(), b"after")
    present, *after = peers.router.recv_multipart()
    assert words([after]) == [b"after"]
    peers.link.inject("up", before)
    name, *again = peers.router.recv_multipart()
    assert words([again]) == [b"before"]
    assert name == present != earlier


def test_bytes_can_go_wrong_inside_a_message(peers: Peers) -> None:
    dealer = peers.dealer()
    peers.link.flip_bits("up", after_bytes=500)
    say(dealer, b"1")
    ((word, empty, damaged),) = peers.heard(1)
    assert (word, empty) == (b"1", b"")
    assert len(differing_bits(damaged, BYTES)) == 1


def test_messages_are_told_apart_however_their_bytes_come() -> None:
    """A heartbeat may come between the frames of a message."""
    greeting = (bytes(12) + b"NULL").ljust(64, b"\0")
    ping = encode_frame(COMMAND, b"\4PING\0\0")
    message = [b"first", b"", BYTES]
    sent = greeting + encode_frame(MORE, b"first") + ping + encode_message(message[1:]) + encode_message([b"x"])
    for size in (1, 7, len(sent)):
        reader = ZmtpReader()
        parts = [part for at in range(0, len(sent), size) for part in reader.feed(sent[at : at + size])]
        assert [part for part in parts if isinstance(part, list)] == [message, [b"x"]]
        assert b"".join(part for part in parts if isinstance(part, bytes)) == greeting + ping


def test_encrypted_messages_are_refused() -> None:
    with pytest.raises(AssertionError, match="encrypted"):
        list(ZmtpReader().feed((bytes(12) + b"CURVE").ljust(64, b"\0")))


def test_connections_that_come_while_the_link_ends_are_closed() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server, pytest.MonkeyPatch.context() as patch:
        left: list[object] = []
        patch.setattr(sys, "unraisablehook", left.append)
        for _ in range(50):
            with FaultyLink(server.getsockname()[1]) as link:
                late = [socket.create_connection(("127.0.0.1", link.port)) for _ in range(5)]
            for one in late:
                one.close()
        gc.collect()
    assert left == [], "what nobody closed is told when it is freed"
