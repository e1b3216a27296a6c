"""The daemon's ROUTER: it receives all, follows its connections, cuts the right ones, and knows who does not read."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import pytest
import zmq

from zsl.errors import StartupError
from zsl.transport.connections import Connections
from zsl.transport.router import OTHER_FILES, Router
from zsl.transport.unsent import MIN_READ_BYTES_PER_SECOND, SLOW_READER_SECONDS
from zsl.wire.frames import Frame

WAIT_SECONDS = 20.0
SMALL_BUFFER = 1 << 16
LARGE = bytes(8 << 20)  # more than the kernel's buffers take, when a peer does not read
LARGE_SECONDS = SLOW_READER_SECONDS + len(LARGE) / MIN_READ_BYTES_PER_SECOND
# ZMTP 3.0 with the mechanism NULL: greeting, then READY as a DEALER.
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until something is so."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        await asyncio.sleep(0.002)


@dataclass
class Room:
    """A router that keeps what it receives: peer, tenant, the frames as bytes."""

    router: Router
    endpoint: str
    messages: list[tuple[bytes, str, list[bytes]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.router.start(self._receive, lambda: None)

    def _receive(self, peer: bytes, tenant: str, frames: list[Frame]) -> None:
        self.messages.append((peer, tenant, [bytes(frame) for frame in frames]))

    @property
    def texts(self) -> list[bytes]:
        return [frames[0] for _, _, frames in self.messages]

    async def heard(self, text: bytes) -> bytes:
        """Wait for a message, and return its peer."""
        await until(lambda: text in self.texts)
        return self.messages[self.texts.index(text)][0]


def new_router(**changes: object) -> Router:
    arguments: dict[str, object] = {"max_message_bytes": 64 << 20, "send_hwm_messages": 64, "max_connections": 1000}
    return Router(**{**arguments, **changes})  # type: ignore[arg-type]


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
async def open_room(cleanup: ExitStack) -> Callable[..., Room]:
    """`open_room(max_connections=3)` is a bound router, on the test's loop."""

    def opened(**changes: object) -> Room:
        router = new_router(**changes)
        cleanup.callback(router.close)
        return Room(router, router.bind("127.0.0.1", 0))

    return opened


@pytest.fixture
def dealer(cleanup: ExitStack) -> Callable[..., zmq.Socket[bytes]]:
    """`dealer(endpoint)` is a connected DEALER; options by name."""
    context = cleanup.enter_context(zmq.Context())

    def connected(endpoint: str, **options: object) -> zmq.Socket[bytes]:
        opened = context.socket(zmq.DEALER)
        cleanup.callback(opened.close, 0)
        for name, value in options.items():
            setattr(opened, name, value)
        opened.connect(endpoint)
        return opened

    return connected


def address_of(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host, int(port)


def tcp(cleanup: ExitStack, endpoint: str, sent: bytes = b"") -> socket.socket:
    """A bare TCP connection."""
    connection = socket.create_connection(address_of(endpoint), WAIT_SECONDS)
    cleanup.callback(connection.close)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    connection.sendall(sent)
    return connection


def say_as_zeromq(connection: socket.socket, text: bytes) -> None:
    """Shake hands by hand, and send one message; what comes then is read only if someone does."""
    connection.sendall(GREETING + READY)
    exactly(connection, len(GREETING))
    _, nbytes = exactly(connection, 2)
    exactly(connection, nbytes)  # the router's READY; before it, it takes no message
    connection.sendall(b"\x00" + bytes([len(text)]) + text)


def exactly(connection: socket.socket, nbytes: int) -> bytes:
    received = b""
    while len(received) < nbytes:
        received += connection.recv(nbytes - len(received))
    return received


def was_cut(connection: socket.socket) -> bool:
    """Whether the other end has ended it; what it said before is read and dropped."""
    connection.setblocking(False)
    try:
        while connection.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


# --- receiving and sending -------------------------------------------------------------------------------------------


async def test_a_burst_arrives_whole_and_in_order(
    open_room: Callable[..., Room], dealer: Callable[..., zmq.Socket[bytes]]
) -> None:
    room = open_room()
    client = dealer(room.endpoint)
    for number in range(1000):
        client.send_multipart([b"%d" % number, b"x"])
    await until(lambda: len(room.messages) == 1000)
    assert [int(text) for text in room.texts] == list(range(1000))
    assert {tenant for _, tenant, _ in room.messages} == {""}


async def test_a_receiver_that_raises_does_not_stop_the_others(
    open_room: Callable[..., Room], dealer: Callable[..., zmq.Socket[bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    room = open_room()
    kept = room.router._receive

    def receive(peer: bytes, tenant: str, frames: list[Frame]) -> None:
        if bytes(frames[0]) == b"bad":
            raise ValueError("on purpose")
        kept(peer, tenant, frames)

    room.router._receive = receive
    client = dealer(room.endpoint)
    for text in (b"bad", b"good"):
        client.send(text)
    assert room.router.send(await room.heard(b"good"), [b"answer"])
    await until(lambda: client.poll(0))
    assert client.recv() == b"answer"
    assert "on purpose" in caplog.text


async def test_send_says_that_a_peer_is_unknown_or_gone(
    open_room: Callable[..., Room], dealer: Callable[..., zmq.Socket[bytes]]
) -> None:
    room = open_room()
    client = dealer(room.endpoint)
    client.send(b"here")
    peer = await room.heard(b"here")
    assert room.router.send(peer, [b"x"])
    assert not room.router.send(b"nobody", [b"x"])
    client.close(0)
    await until(lambda: not room.router.send(peer, [b"x"]))
    await until(lambda: room.router.connections == 0)


def test_it_binds_without_a_loop_and_tells_a_port_in_use() -> None:
    with closing(new_router()) as first:
        endpoint = first.bind("127.0.0.1", 0)
        _, port = address_of(endpoint)
        with pytest.raises(StartupError, match=f"127.0.0.1:{port}: the port is in use"):
            new_router().bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_that_this_machine_does_not_have_is_told_by_the_option_that_names_it(host: str) -> None:
    with pytest.raises(StartupError, match=f"{host}:0: this machine has no such address; .*--host"):
        new_router().bind(host, 0)


async def test_bytes_that_are_no_zeromq_stop_nobody(
    cleanup: ExitStack, open_room: Callable[..., Room], dealer: Callable[..., zmq.Socket[bytes]]
) -> None:
    room = open_room()
    for sent in (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        bytes(range(256)) * 64,
        b"\x16\x03\x01\x02\x00\x01",
        GREETING[:20],
    ):
        tcp(cleanup, room.endpoint, sent)
    # As in ZMTP 1.0, this is a whole message of one frame; it arrives, and whoever receives it has to check it.
    tcp(cleanup, room.endpoint, b"\x01\x00\x06\x00ZMTP1")
    await room.heard(b"ZMTP1")
    dealer(room.endpoint).send(b"hello")
    await room.heard(b"hello")


# --- connections -----------------------------------------------------------------------------------------------------


async def test_it_counts_connections_that_say_nothing_too(cleanup: ExitStack, open_room: Callable[..., Room]) -> None:
    room = open_room()
    connections = [tcp(cleanup, room.endpoint) for _ in range(3)]
    await until(lambda: room.router.connections == 3)
    for connection in connections:
        connection.close()
    await until(lambda: room.router.connections == 0)


async def test_over_the_most_connections_the_newest_is_cut_and_the_others_are_served(
    cleanup: ExitStack,
    open_room: Callable[..., Room],
    dealer: Callable[..., zmq.Socket[bytes]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "zsl.transport")
    room = open_room(max_connections=3)
    first = dealer(room.endpoint)
    first.send(b"first")
    await room.heard(b"first")
    silent = [tcp(cleanup, room.endpoint) for _ in range(2)]
    await until(lambda: room.router.connections == 3)
    for _ in range(5):
        newest = tcp(cleanup, room.endpoint)
        await until(lambda: was_cut(newest))  # noqa: B023 (awaited here)
    await until(lambda: room.router.connections == 3)
    assert not any(was_cut(connection) for connection in silent)
    first.send(b"still there")
    await room.heard(b"still there")
    assert len([record for record in caplog.records if "turned away" in record.message]) == 1

    silent[0].close()
    dealer(room.endpoint).send(b"in the free place")
    await room.heard(b"in the free place")
    newest = tcp(cleanup, room.endpoint)
    await until(lambda: was_cut(newest))


async def test_there_are_no_more_connections_than_open_files_allow(
    cleanup: ExitStack, open_room: Callable[..., Room], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(resource, "getrlimit", lambda _: (OTHER_FILES + 2, 4096))
        room = open_room()
    for _ in range(2):
        tcp(cleanup, room.endpoint)
    await until(lambda: room.router.connections == 2)
    newest = tcp(cleanup, room.endpoint)
    await until(lambda: was_cut(newest))


async def test_two_hundred_silent_connections_stop_no_client(
    cleanup: ExitStack, open_room: Callable[..., Room], dealer: Callable[..., zmq.Socket[bytes]]
) -> None:
    room = open_room()
    for _ in range(200):
        tcp(cleanup, room.endpoint)
    dealer(room.endpoint).send(b"hello")
    await room.heard(b"hello")
    assert room.router.connections == 201


async def test_cut_ends_the_connection_of_that_peer_only(
    open_room: Callable[..., Room], dealer: Callable[..., zmq.Socket[bytes]]
) -> None:
    room = open_room()
    unlucky, other = dealer(room.endpoint), dealer(room.endpoint)
    unlucky.send(b"unlucky")
    other.send(b"other")
    peer, other_peer = await room.heard(b"unlucky"), await room.heard(b"other")
    room.router.cut(b"nobody")
    room.router.cut(peer)
    await until(lambda: not room.router.send(peer, [b"x"]))
    assert room.router.send(other_peer, [b"still here"])
    await until(lambda: other.poll(0))
    unlucky.send(b"again")  # ZeroMQ has connected again by itself
    assert await room.heard(b"again") != peer
    room.router.cut(peer)  # of old; it is nobody now
    other.send(b"no harm")
    unlucky.send(b"done")
    assert await room.heard(b"no harm") == other_peer
    assert await room.heard(b"done") == await room.heard(b"again")


async def test_a_late_message_gives_its_peer_no_hold_on_the_connection_that_followed(cleanup: ExitStack) -> None:
    context = cleanup.enter_context(zmq.Context())
    router = context.socket(zmq.ROUTER)
    cleanup.callback(router.close, 0)
    gone: list[bytes] = []
    connections = Connections(context, router, max_connections=10, gone=gone.append)
    cleanup.callback(connections.close)
    endpoint = f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}"
    connections.start()

    def received() -> tuple[bytes, int]:
        assert router.poll(WAIT_SECONDS * 1000)
        peer, frame = router.recv_multipart(copy=False)
        return peer.bytes, frame.get(zmq.MessageOption.SRCFD)

    successor = socket.socket()  # made before the descriptor gets free, so that only the router can take it
    successor.settimeout(WAIT_SECONDS)
    cleanup.callback(successor.close)
    ended = tcp(cleanup, endpoint)
    say_as_zeromq(ended, b"a")
    late, descriptor = received()
    ended.shutdown(socket.SHUT_RDWR)
    await until(lambda: not is_open(descriptor))
    successor.connect(address_of(endpoint))
    say_as_zeromq(successor, b"b")
    peer, again = received()
    assert again == descriptor, "the system gave it another; this test needs the same"

    connections.heard(late, descriptor)  # only now does the loop come to it
    connections.cut(late)
    assert connections.knows(late) is False
    connections.heard_all()
    connections.heard(peer, descriptor)
    assert connections.knows(peer)
    assert not was_cut(successor)
    connections.cut(peer)
    await until(lambda: was_cut(successor))
    await until(lambda: gone == [peer])


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


# --- peers that do not read ------------------------------------------------------------------------------------------


async def found_slow(router: Router, peer: bytes, now: list[float]) -> None:
    """Let time pass until a peer is slow: what the kernel still takes off counts for it."""

    def passed() -> bool:
        now[0] += LARGE_SECONDS + 1
        return router.slow_peers(now[0]) == [peer]

    await until(passed)


class Buffer(bytearray):
    """Tells by a weak reference whether it is still held."""


async def test_a_peer_that_does_not_read_is_found_and_others_are_served_meanwhile(
    cleanup: ExitStack, open_room: Callable[..., Room], dealer: Callable[..., zmq.Socket[bytes]]
) -> None:
    now = [0.0]
    room = open_room(clock=lambda: now[0])
    say_as_zeromq(tcp(cleanup, room.endpoint), b"slow")
    slow_peer = await room.heard(b"slow")
    other = dealer(room.endpoint)
    other.send(b"other")
    other_peer = await room.heard(b"other")
    held = Buffer(LARGE)
    freed = weakref.ref(held)
    for _ in range(3):
        assert room.router.send(slow_peer, [b"head", LARGE, memoryview(held)])
    del held
    assert room.router.unsent_bytes(slow_peer) > 4 * len(LARGE)
    for _ in range(3):
        assert room.router.send(other_peer, [b"head", LARGE])
        await until(lambda: other.poll(0))
        assert len(other.recv_multipart()[1]) == len(LARGE)
    await until(lambda: room.router.unsent_bytes(other_peer) == 0)
    assert room.router.slow_peers(LARGE_SECONDS - 1) == []
    await found_slow(room.router, slow_peer, now)

    room.router.cut(slow_peer)
    await until(lambda: room.router.unsent_bytes(slow_peer) == 0)
    await until(lambda: freed() is None)
    assert room.router.slow_peers(now[0] + 2 * LARGE_SECONDS) == []
    assert not room.router.send(slow_peer, [b"head", LARGE])


async def test_a_peer_that_reads_a_little_is_not_slow(cleanup: ExitStack, open_room: Callable[..., Room]) -> None:
    now = [0.0]
    room = open_room(clock=lambda: now[0])
    connection = tcp(cleanup, room.endpoint)
    say_as_zeromq(connection, b"hello")
    peer = await room.heard(b"hello")
    for _ in range(3):
        room.router.send(peer, [b"head", LARGE])
    await found_slow(room.router, peer, now)
    before = room.router.unsent_bytes(peer)
    read = 0
    while read < len(LARGE):
        read += len(connection.recv(1 << 20))
    await until(lambda: room.router.unsent_bytes(peer) < before)
    assert room.router.slow_peers(now[0]) == []
    await found_slow(room.router, peer, now)
    connection.close()  # otherwise the router's end would wait for it to read
    await until(lambda: room.router.connections == 0)


async def test_what_is_read_is_no_longer_held(
    open_room: Callable[..., Room], dealer: Callable[..., zmq.Socket[bytes]]
) -> None:
    room = open_room()
    client = dealer(room.endpoint)
    client.send(b"hello")
    peer = await room.heard(b"hello")
    for _ in range(20):
        assert room.router.send(peer, [b"small", LARGE[: 1 << 20], b"small"])
    for _ in range(20):
        await until(lambda: client.poll(0))
        client.recv_multipart()
    await until(lambda: room.router.unsent_bytes(peer) == 0)


# --- the process -----------------------------------------------------------------------------------------------------


def test_raise_file_limit_takes_what_the_system_gives() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
    script = (
        "import resource\n"
        "from zsl.transport.router import raise_file_limit\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard}))\n"
        "raise_file_limit()\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert finished.stdout.strip() == str(hard)
