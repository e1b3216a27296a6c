"""The daemon's ROUTER: it receives all, bounds what a peer can make it hold, cuts the right connections, and knows who
does not read."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field

import pytest
import zmq

from zsl.errors import StartupError
from zsl.transport.curve_keys import KeyPair
from zsl.transport.listening import OTHER_FILES
from zsl.transport.peer_connection import HANDSHAKE_SECONDS
from zsl.transport.router import STRANGER_MESSAGE_BYTES, STRANGER_SECONDS, Router
from zsl.transport.send_queue import MIN_BYTES_PER_SECOND, SLOW_SECONDS, THREAD_BYTES
from zsl.wire.frames import HEAD_FRAMES, Frame
from zsl.wire.messages import MAX_TENSORS

WAIT_SECONDS = 20.0
SMALL_BUFFER = 1 << 16
MOST_FRAMES = 4 * (HEAD_FRAMES + MAX_TENSORS)
LARGE = bytes(8 << 20)  # more than the kernel's buffers take, when a peer does not read
LARGE_SECONDS = SLOW_SECONDS + len(LARGE) / MIN_BYTES_PER_SECOND
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
    """A router that keeps what it receives: peer, tenant, the frames as bytes. Calls `before(text)` first."""

    router: Router
    endpoint: str
    messages: list[tuple[bytes, str, list[bytes]]] = field(default_factory=list)
    before: Callable[[bytes], None] = lambda _: None
    told: int = 0  # how many messages there were when the router last said that it has received

    def __post_init__(self) -> None:
        self.router.start(self._receive, self._received)

    def _received(self) -> None:
        self.told = len(self.messages)

    def _receive(self, peer: bytes, tenant: str, frames: list[Frame]) -> None:
        self.before(bytes(frames[0]))
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


async def say_as_zeromq(connection: socket.socket, text: bytes) -> None:
    """Shake hands by hand, and send one message; what comes then is read only if someone does."""
    await asyncio.to_thread(_say_as_zeromq, connection, text)


def _say_as_zeromq(connection: socket.socket, text: bytes) -> None:
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
    """Return whether the other end has closed the connection; drop what it sent before."""
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


@pytest.mark.parametrize("nbytes", [1, 8 * THREAD_BYTES])
async def test_a_sealed_message_of_any_size_is_told_without_another_one(
    nbytes: int, open_room: Callable[..., Room], dealer: Callable[..., zmq.Socket[bytes]]
) -> None:
    """A large frame is opened by another thread, after the turn that read it."""
    (server, secret), (public, own) = zmq.curve_keypair(), zmq.curve_keypair()
    room = open_room(keys=KeyPair(server, secret), allowed=lambda _: True)
    client = dealer(room.endpoint, curve_serverkey=server, curve_publickey=public, curve_secretkey=own)
    client.send(b"hello")
    room.router.hold(await room.heard(b"hello"))
    client.send_multipart([b"large", bytes(nbytes)])
    await room.heard(b"large")
    await until(lambda: room.told == len(room.messages))


async def test_a_receiver_that_raises_does_not_stop_the_others(
    open_room: Callable[..., Room], dealer: Callable[..., zmq.Socket[bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    room = open_room()

    def refuse(text: bytes) -> None:
        if text == b"bad":
            raise ValueError("on purpose")

    room.before = refuse
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
    await until(lambda: len(room.router.connections) == 0)


def test_it_binds_without_a_loop_and_tells_a_port_in_use() -> None:
    with closing(new_router()) as first:
        endpoint = first.bind("127.0.0.1", 0)
        _, port = address_of(endpoint)
        with pytest.raises(StartupError, match=f"127.0.0.1:{port}: .*port"):
            new_router().bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_that_this_machine_does_not_have_is_told_by_the_option_that_names_it(host: str) -> None:
    with pytest.raises(StartupError, match=f"{host}:0: .*--host"):
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
    old = tcp(cleanup, room.endpoint, b"\x01\x00\x06\x00ZMTP1")  # in ZMTP 1.0, a whole message
    dealer(room.endpoint).send(b"hello")
    await room.heard(b"hello")
    await until(lambda: was_cut(old))
    assert room.texts == [b"hello"]


# --- connections -----------------------------------------------------------------------------------------------------


async def test_it_counts_connections_that_say_nothing_too(cleanup: ExitStack, open_room: Callable[..., Room]) -> None:
    room = open_room()
    connections = [tcp(cleanup, room.endpoint) for _ in range(3)]
    await until(lambda: len(room.router.connections) == 3)
    for connection in connections:
        connection.close()
    await until(lambda: len(room.router.connections) == 0)


async def test_when_all_places_are_taken_the_oldest_without_a_session_is_cut(
    cleanup: ExitStack,
    open_room: Callable[..., Room],
    dealer: Callable[..., zmq.Socket[bytes]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "zsl.transport")
    room = open_room(max_connections=3)
    member = dealer(room.endpoint)
    member.send(b"member")
    room.router.hold(await room.heard(b"member"))
    silent = [tcp(cleanup, room.endpoint) for _ in range(2)]
    await until(lambda: len(room.router.connections) == 3)
    for number in range(5):
        silent.append(tcp(cleanup, room.endpoint))
        await until(lambda: was_cut(silent[number]))  # noqa: B023 (awaited here)
    assert len(room.router.connections) == 3
    dealer(room.endpoint).send(b"new")
    await room.heard(b"new")
    member.send(b"still there")
    await room.heard(b"still there")
    assert len([record for record in caplog.records if "connections are taken" in record.message]) == 1


async def test_members_keep_their_places_and_a_newcomer_is_turned_away(
    cleanup: ExitStack, open_room: Callable[..., Room], dealer: Callable[..., zmq.Socket[bytes]]
) -> None:
    room = open_room(max_connections=2)
    members = [dealer(room.endpoint) for _ in range(2)]
    for number, member in enumerate(members):
        member.send(b"%d" % number)
        room.router.hold(await room.heard(b"%d" % number))
    newest = tcp(cleanup, room.endpoint)
    await until(lambda: was_cut(newest))
    room.router.release(await room.heard(b"0"))
    dealer(room.endpoint).send(b"new")
    await room.heard(b"new")


async def test_there_are_no_more_connections_than_open_files_allow(
    cleanup: ExitStack, open_room: Callable[..., Room], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(resource, "getrlimit", lambda _: (OTHER_FILES + 2, 4096))
        room = open_room()
    connections = [tcp(cleanup, room.endpoint) for _ in range(3)]
    await until(lambda: was_cut(connections[0]))
    assert len(room.router.connections) == 2


async def test_silence_without_a_session_and_an_unfinished_handshake_end(
    cleanup: ExitStack, open_room: Callable[..., Room]
) -> None:
    now = [0.0]
    room = open_room(clock=lambda: now[0])
    half, silent, member = (tcp(cleanup, room.endpoint) for _ in range(3))
    for connection, text in ((silent, b"silent"), (member, b"member")):
        await say_as_zeromq(connection, text)
        await room.heard(text)
    room.router.hold(await room.heard(b"member"))
    now[0] = HANDSHAKE_SECONDS + 1
    await until(lambda: was_cut(half))
    assert not was_cut(silent)
    now[0] = STRANGER_SECONDS + 1
    await until(lambda: was_cut(silent))
    assert not was_cut(member)


# --- what a peer can make it hold ------------------------------------------------------------------------------------


def properties(**named: bytes) -> bytes:
    return b"".join(
        bytes((len(name),)) + name.encode() + len(value).to_bytes(4, "big") + value
        for name, value in {"Socket-Type": b"DEALER", **named}.items()
    )


def ready(data: bytes) -> bytes:
    body = b"\x05READY" + data
    return b"\x06" + len(body).to_bytes(8, "big") + body


READIES = {
    "an identity": ready(properties(Identity=b"claimed")),
    "an identity as given by a ROUTER": ready(properties(Identity=b"\0\0\0\0\1")),
    "an identity of 255 bytes": ready(properties(Identity=b"x" * 255)),
    "a property of 64 KiB": ready(properties(X=bytes(1 << 16))),
    "many properties": ready(properties(**{f"x{i}": b"" for i in range(200)})),
    "a property twice": ready(properties() * 2),
    "a property cut short": ready(properties()[:-1]),
    "a length of four gigabytes": ready(b"\x01x\xff\xff\xff\xff"),
    "another type": ready(properties(**{"Socket-Type": b"SUB"})),
    "no type": ready(b""),
    "a command without its name": b"\x04\x01\x09",
    "an empty command": b"\x04\x00",
    "a message": b"\x00\x01x",
    "a length over all": b"\x06" + b"\xff" * 8,
    "reserved flags": b"\x08\x00",
    "a command in parts": b"\x05\x00",
}


@pytest.mark.parametrize("sent", READIES.values(), ids=READIES)
async def test_a_handshake_that_no_client_of_ours_makes_ends_the_connection(
    sent: bytes, cleanup: ExitStack, open_room: Callable[..., Room]
) -> None:
    room = open_room()
    connection = tcp(cleanup, room.endpoint, GREETING + sent + b"\x00\x05hello")
    await until(lambda: was_cut(connection))
    await until(lambda: len(room.router.connections) == 0)
    assert room.messages == []


MESSAGES = {
    "empty frames without end": b"\x01\x00" * 1000,
    "a frame too many": b"\x01\x01x" * MOST_FRAMES + b"\x00\x01x",
    "a frame over all": b"\x02" + (STRANGER_MESSAGE_BYTES + 1).to_bytes(8, "big"),
    "frames of too many bytes": (b"\x03" + STRANGER_MESSAGE_BYTES.to_bytes(8, "big") + bytes(STRANGER_MESSAGE_BYTES))
    * 3,
    "a length of exabytes": b"\x03" + b"\x7f" + b"\xff" * 7,
    "an unknown command": b"\x04\x0a\x09SUBSCRIBE",
    "a large command": b"\x06\x00\x00\x00\x00\x00\x00\x01\x00",
    "a ping with a long context": b"\x04\x18\x04PING\x00\x00" + b"c" * 17,
    "a ping cut short": b"\x04\x06\x04PING\x00",
}


@pytest.mark.parametrize("sent", MESSAGES.values(), ids=MESSAGES)
async def test_what_is_over_the_bounds_of_a_message_ends_the_connection_before_it_is_held(
    sent: bytes, cleanup: ExitStack, open_room: Callable[..., Room]
) -> None:
    room = open_room()
    connection = tcp(cleanup, room.endpoint)
    await say_as_zeromq(connection, b"hello")
    await room.heard(b"hello")
    with suppress(ConnectionError):  # it may end in the middle
        connection.sendall(sent)
    await until(lambda: was_cut(connection))
    assert room.texts == [b"hello"]


async def test_a_member_may_send_large_messages_and_a_stranger_may_not(
    open_room: Callable[..., Room], dealer: Callable[..., zmq.Socket[bytes]]
) -> None:
    room = open_room(max_message_bytes=len(LARGE))
    client = dealer(room.endpoint)
    client.send(b"hello")
    peer = await room.heard(b"hello")
    room.router.hold(peer)
    client.send_multipart([b"large", LARGE])
    assert await room.heard(b"large") == peer
    assert room.messages[-1][2] == [b"large", LARGE]
    room.router.release(peer)
    client.send_multipart([b"large again", LARGE])
    await until(lambda: not room.router.is_connected(peer))
    assert b"large again" not in room.texts


async def test_a_member_that_is_distrusted_may_still_send_what_it_might(
    open_room: Callable[..., Room], dealer: Callable[..., zmq.Socket[bytes]]
) -> None:
    room = open_room(max_message_bytes=len(LARGE))
    client = dealer(room.endpoint)
    client.send(b"hello")
    peer = await room.heard(b"hello")
    room.router.hold(peer)
    room.router.distrust(peer)
    client.send_multipart([b"large", LARGE])
    assert await room.heard(b"large") == peer
    assert list(room.router._strangers) == [room.router.connections[peer]]


async def test_large_frames_wait_while_there_is_no_memory_for_them(
    cleanup: ExitStack, open_room: Callable[..., Room]
) -> None:
    room = open_room(max_receiving_bytes=1 << 20)
    half, other = (tcp(cleanup, room.endpoint) for _ in range(2))
    for connection, text in ((half, b"half"), (other, b"other")):
        await say_as_zeromq(connection, text)
        room.router.hold(await room.heard(text))
    frame = b"\x02" + (4 << 20).to_bytes(8, "big")
    await asyncio.to_thread(half.sendall, frame + bytes(2 << 20))
    connections = room.router.connections.values()
    await until(lambda: sum(connection.receiving_bytes for connection in connections) >= 2 << 20)
    sending = asyncio.create_task(asyncio.to_thread(other.sendall, frame + bytes(4 << 20)))
    await until(lambda: room.router.memory.parked)
    assert len(room.messages) == 2
    await asyncio.to_thread(half.sendall, bytes(2 << 20))
    await until(lambda: len(room.messages) == 4)
    await sending


async def test_of_large_messages_that_began_together_only_the_oldest_comes_in_when_the_memory_is_full(
    cleanup: ExitStack, open_room: Callable[..., Room]
) -> None:
    """Whatever they are made of: one large frame, or small ones."""
    room = open_room(max_receiving_bytes=1 << 20)
    large = b"\x02" + (4 << 20).to_bytes(8, "big") + bytes(4 << 20)
    small = b"".join(b"\x03" + (30_000).to_bytes(8, "big") + bytes(30_000) for _ in range(70)) + b"\0\0"
    members = [tcp(cleanup, room.endpoint) for _ in range(8)]
    for number, member in enumerate(members):
        await say_as_zeromq(member, b"%d" % number)
        room.router.hold(await room.heard(b"%d" % number))
    connections = room.router.connections.values()
    whole = [large if number % 2 == 0 else small for number in range(len(members))]
    for number, member in enumerate(members):
        member.sendall(whole[number][: 64 << 10])
        await until(lambda: sum(c.receiving_bytes > 0 for c in connections) == number + 1)  # noqa: B023 (waits)
    first, *others = members
    first.sendall(large[64 << 10 : 80 << 10])
    await until(lambda: room.router.memory.nbytes)
    sending = [asyncio.create_task(asyncio.to_thread(first.sendall, large[80 << 10 : -1]))]
    for member, message in zip(others, whole[1:], strict=True):
        sending.append(asyncio.create_task(asyncio.to_thread(member.sendall, message[64 << 10 :])))
    await until(lambda: room.router.memory.parked == len(others))
    await until(lambda: room.router.connections[room.messages[0][0]].receiving_bytes == len(large) - 1)
    # The oldest one, and what came in the turns in which the others were stopped.
    assert sum(connection.receiving_bytes for connection in connections) <= len(large) + (6 << 20)
    assert len(room.messages) == len(members)
    await asyncio.to_thread(first.sendall, large[-1:])
    await until(lambda: len(room.messages) == 2 * len(members))
    assert repr(room.router.memory) == "<ReceivingMemory: 0 bytes of 0 messages, 0 parked>"
    await asyncio.gather(*sending)


async def test_a_message_that_comes_too_slowly_ends_the_connection(
    cleanup: ExitStack, open_room: Callable[..., Room]
) -> None:
    now = [0.0]
    room = open_room(clock=lambda: now[0])
    connection = tcp(cleanup, room.endpoint)
    await say_as_zeromq(connection, b"hello")
    peer = await room.heard(b"hello")
    room.router.hold(peer)
    connection.sendall(b"\x01\x01x\x00")
    await until(lambda: room.router.connections[peer].receiving_bytes)
    now[0] = SLOW_SECONDS + 1
    await until(lambda: was_cut(connection))


async def test_a_ping_is_answered_with_its_context(cleanup: ExitStack, open_room: Callable[..., Room]) -> None:
    room = open_room()
    connection = tcp(cleanup, room.endpoint)
    await say_as_zeromq(connection, b"hello")
    await room.heard(b"hello")
    connection.sendall(b"\x04\x0a\x04PING\x00\x00abc")
    answer = await asyncio.to_thread(exactly, connection, 10)
    assert answer == b"\x04\x08\x04PONGabc"


async def test_libzmq_s_own_heartbeats_keep_a_connection(
    open_room: Callable[..., Room], dealer: Callable[..., zmq.Socket[bytes]]
) -> None:
    room = open_room()
    client = dealer(room.endpoint, heartbeat_ivl=10, heartbeat_timeout=1000)
    client.send(b"one")
    peer = await room.heard(b"one")
    heard = room.router.connections[peer].heard_at
    await until(lambda: room.router.connections[peer].heard_at > heard + 0.05)
    client.send(b"two")
    assert await room.heard(b"two") == peer


async def test_strangers_wait_for_their_share_and_members_do_not(
    open_room: Callable[..., Room], dealer: Callable[..., zmq.Socket[bytes]]
) -> None:
    """The clock moves when a stranger's message is handled: each takes a second."""
    now = [0.0]
    room = open_room(clock=lambda: now[0])

    def take_a_second(text: bytes) -> None:
        now[0] += float(text == b"flood")

    member, stranger = dealer(room.endpoint), dealer(room.endpoint)
    member.send(b"member")
    room.router.hold(await room.heard(b"member"))
    stranger.send(b"stranger")
    await room.heard(b"stranger")
    room.before = take_a_second
    stranger.send(b"flood")
    await room.heard(b"flood")
    stranger.send(b"flood again")  # nine seconds and more from now
    for number in range(20):
        member.send(b"member %d" % number)
        await room.heard(b"member %d" % number)
    assert b"flood again" not in room.texts


async def test_two_hundred_silent_connections_stop_no_client(
    cleanup: ExitStack, open_room: Callable[..., Room], dealer: Callable[..., zmq.Socket[bytes]]
) -> None:
    room = open_room()
    for _ in range(200):
        tcp(cleanup, room.endpoint)
    dealer(room.endpoint).send(b"hello")
    await room.heard(b"hello")
    assert len(room.router.connections) == 201


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
    await say_as_zeromq(tcp(cleanup, room.endpoint), b"slow")
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
    await say_as_zeromq(connection, b"hello")
    peer = await room.heard(b"hello")
    for _ in range(3):
        room.router.send(peer, [b"head", LARGE])
    await found_slow(room.router, peer, now)
    before = room.router.unsent_bytes(peer)
    read = 0
    while read < len(LARGE):
        read += len(await asyncio.to_thread(connection.recv, 1 << 20))
    await until(lambda: room.router.unsent_bytes(peer) < before)
    assert room.router.slow_peers(now[0]) == []
    await found_slow(room.router, peer, now)
    connection.close()  # otherwise the router's end would wait for it to read
    await until(lambda: len(room.router.connections) == 0)


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
        "from zsl.transport.listening import raise_file_limit\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard}))\n"
        "raise_file_limit()\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert finished.stdout.strip() == str(hard)
