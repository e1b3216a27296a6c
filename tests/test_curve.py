"""Encrypted connections: who is on the list gets in and is known by its key, everyone else is kept out, and a client
learns why. Also the files that keys are kept in."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest
import zmq

from test_router import (
    LARGE,
    SMALL_BUFFER,
    WAIT_SECONDS,
    Room,
    cleanup,
    dealer,
    found_slow,
    new_router,
    open_room,
    tcp,
    until,
)
from zsl.errors import ConfigError, StartupError
from zsl.transport import curve_keys as curve
from zsl.transport.curve_keys import (
    ClientKeys,
    KeyPair,
    read_key_pair,
    read_public_key,
    refuses_unknown_keys,
    write_key_pair,
)
from zsl.transport.dealer import CURVE_OVERHEAD_BYTES, Dealer, LinkEvent
from zsl.transport.greeting import offered_mechanism
from zsl.transport.mechanisms import Curve
from zsl.wire.frames import MAX_HEADER_BYTES

__all__ = ["cleanup", "dealer", "open_room"]  # the fixtures of test_router.py

SERVER, ALICE, STRANGER = (KeyPair(*zmq.curve_keypair()) for _ in range(3))
Connect = Callable[..., Dealer]


def only_alice(key: str) -> bool:
    return key == ALICE.public.decode()


@pytest.fixture
async def encrypted(open_room: Callable[..., Room]) -> Room:
    return open_room(keys=SERVER, allowed=only_alice)


@pytest.fixture
def connect(cleanup: ExitStack) -> Connect:
    """`connect(endpoint, pair)` is a `Dealer`."""
    context = cleanup.enter_context(zmq.Context())

    def connected(
        endpoint: str, own: KeyPair | None = ALICE, *, server: bytes = SERVER.public, **limits: int
    ) -> Dealer:
        opened = Dealer(context, endpoint, None if own is None else ClientKeys(server, own), **limits)
        cleanup.callback(opened.close, linger_ms=0)
        return opened

    return connected


async def events_until(client: Dealer, last: LinkEvent) -> list[LinkEvent]:
    """Collect the events of a connection, up to and including `last`."""
    seen: list[LinkEvent] = []

    def came() -> bool:
        while last not in seen and (event := client.link_event()) is not None:
            seen.append(event)
        return last in seen

    def wait() -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not came() and time.monotonic() < deadline:
            client.monitor.poll(100)

    await asyncio.to_thread(wait)  # it may have to ask the server once more, whose loop is this test's
    assert last in seen, seen
    return seen


async def say(client: Dealer, text: bytes) -> None:
    await until(lambda: client.send([text]))


# --- who gets in -----------------------------------------------------------------------------------------------------


async def test_a_known_key_gets_in_and_its_messages_carry_it(encrypted: Room, connect: Connect) -> None:
    client = connect(encrypted.endpoint, max_frame_bytes=len(LARGE))
    await say(client, b"one")
    await say(client, b"two")
    peer = await encrypted.heard(b"two")
    assert [(tenant, frames) for _, tenant, frames in encrypted.messages] == [
        (ALICE.public.decode(), [b"one"]),
        (ALICE.public.decode(), [b"two"]),
    ]
    assert encrypted.router.send(peer, [b"head", LARGE])
    await until(lambda: client.socket.poll(0))
    assert client.receive() == [b"head", LARGE]


async def test_an_unknown_key_is_refused_and_the_log_shows_no_more_than_its_beginning(
    encrypted: Room, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "zsl.transport")
    client = connect(encrypted.endpoint, STRANGER)
    assert await events_until(client, LinkEvent.UNKNOWN_KEY) == [LinkEvent.MUTE, LinkEvent.UNKNOWN_KEY]
    await say(connect(encrypted.endpoint), b"hello")
    await encrypted.heard(b"hello")
    assert not client.send([b"x"])
    assert encrypted.texts == [b"hello"]
    assert STRANGER.public[:8].decode() in caplog.text
    assert STRANGER.public[:9].decode() not in caplog.text


async def test_when_the_list_cannot_be_asked_that_one_is_refused_and_the_next_gets_in(
    open_room: Callable[..., Room], connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    def allowed(key: str) -> bool:
        if key == STRANGER.public.decode():
            raise RuntimeError("on purpose")
        return True

    room = open_room(keys=SERVER, allowed=allowed)
    refused = connect(room.endpoint, STRANGER)
    await events_until(refused, LinkEvent.UNKNOWN_KEY)
    assert "on purpose" in caplog.text
    await say(connect(room.endpoint), b"hello")
    await room.heard(b"hello")
    assert not refused.send([b"x"])


async def test_who_has_no_key_gets_nothing_through(
    cleanup: ExitStack, encrypted: Room, connect: Connect, dealer: Callable[..., zmq.Socket[bytes]]
) -> None:
    without = [
        dealer(encrypted.endpoint),
        dealer(encrypted.endpoint, plain_username=b"alice", plain_password=ALICE.public),
    ]
    for client in without:
        client.send(b"let me in")
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00"
    null, claimed = (greeting + name.ljust(20, b"\0") + bytes(32) for name in (b"NULL", b"CURVE"))
    for sent in (
        b"\x01\x00\x06\x00ZMTP1",
        b"\xff" + bytes(8) + b"\x7f\x01\x05\x00\x00\x00\x05ZMTP2",
        null + b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x00\x01x",
        claimed + b"\x00\x05plain",
        b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc",
        bytes(range(256)) * 256,
    ):
        with suppress(ConnectionError):  # it may be refused in the middle
            tcp(cleanup, encrypted.endpoint, sent)
    for _ in range(200):
        tcp(cleanup, encrypted.endpoint)
    await say(connect(encrypted.endpoint), b"hello")
    await encrypted.heard(b"hello")
    assert encrypted.texts == [b"hello"]


async def test_a_peer_that_does_not_read_is_found_behind_encryption_too(
    open_room: Callable[..., Room], dealer: Callable[..., zmq.Socket[bytes]]
) -> None:
    now = [0.0]
    encrypted = open_room(keys=SERVER, allowed=only_alice, clock=lambda: now[0])
    keys = {
        "curve_serverkey": SERVER.public,
        "curve_publickey": ALICE.public,
        "curve_secretkey": ALICE.secret,
    }
    slow = dealer(encrypted.endpoint, rcvhwm=1, rcvbuf=SMALL_BUFFER, **keys)
    slow.send(b"hello")
    peer = await encrypted.heard(b"hello")
    for _ in range(6):
        assert encrypted.router.send(peer, [LARGE])
    assert encrypted.router.unsent_bytes(peer) > 0
    await found_slow(encrypted.router, peer, now)
    encrypted.router.cut(peer)
    await until(lambda: encrypted.router.unsent_bytes(peer) == 0)


# --- what a client learns --------------------------------------------------------------------------------------------


async def test_a_client_that_gets_in_is_up_and_then_lost(encrypted: Room, connect: Connect) -> None:
    client = connect(encrypted.endpoint)
    assert await events_until(client, LinkEvent.UP) == [LinkEvent.MUTE, LinkEvent.UP]
    await say(client, b"hello")
    encrypted.router.cut(await encrypted.heard(b"hello"))
    assert await events_until(client, LinkEvent.LOST) == [LinkEvent.LOST]


async def test_a_client_takes_frames_up_to_its_bound_and_ends_a_connection_that_brings_a_larger_one(
    encrypted: Room, open_room: Callable[..., Room], connect: Connect
) -> None:
    for room, own in ((encrypted, ALICE), (open_room(), None)):
        client = connect(room.endpoint, own)
        await say(client, b"hello")
        peer = await room.heard(b"hello")
        largest = bytes(MAX_HEADER_BYTES)
        assert room.router.send(peer, [largest])
        await until(partial(client.socket.poll, 0))
        assert client.receive() == [largest]
        assert room.router.send(peer, [bytes(MAX_HEADER_BYTES + CURVE_OVERHEAD_BYTES + 1)])
        assert await events_until(client, LinkEvent.LOST) == [LinkEvent.MUTE, LinkEvent.UP, LinkEvent.LOST]
        assert client.receive() is None
    assert Curve.overhead_bytes == CURVE_OVERHEAD_BYTES


def test_no_socket_of_a_client_has_heartbeats_of_libzmq(connect: Connect) -> None:
    """Its timers abort the process when a peer goes whose connection is stopped by a high-water mark."""
    client = connect("tcp://127.0.0.1:1")
    for pipe in (client.socket, client.monitor):
        assert pipe.get(zmq.HEARTBEAT_IVL) == 0
    assert client.socket.get(zmq.TCP_KEEPALIVE) == 1


@pytest.mark.parametrize("attempt", range(3))  # what libzmq reports of these is chance: see Dealer
async def test_a_wrong_server_key_is_told_from_a_server_that_does_not_encrypt(
    attempt: int, encrypted: Room, open_room: Callable[..., Room], connect: Connect
) -> None:
    plain = open_room()
    for endpoint, own, server, why in (
        (encrypted.endpoint, ALICE, STRANGER.public, LinkEvent.WRONG_SERVER_KEY),
        (encrypted.endpoint, None, b"", LinkEvent.OTHER_MECHANISM),
        (plain.endpoint, ALICE, SERVER.public, LinkEvent.OTHER_MECHANISM),
    ):
        client = connect(endpoint, own, server=server)
        assert await events_until(client, why) == [LinkEvent.MUTE, why]
    assert encrypted.messages == plain.messages == []


async def test_nothing_listens_is_refused(connect: Connect) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        client = connect(f"tcp://127.0.0.1:{closed.getsockname()[1]}")
        assert await events_until(client, LinkEvent.REFUSED) == [LinkEvent.REFUSED]


@pytest.fixture
def stranger() -> Iterator[Callable[[bytes], str]]:
    """`stranger(b"…")` is the endpoint of something that answers every connection so, once it was spoken to, and
    ends it."""
    with ExitStack() as stack:

        def started(answer: bytes) -> str:
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def run() -> None:
                while True:
                    try:
                        connection, _ = listening.accept()
                    except OSError:
                        return
                    with connection, suppress(OSError):
                        connection.settimeout(5)
                        connection.recv(1 << 10)
                        connection.sendall(answer)

            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            stack.callback(thread.join, 20)
            stack.callback(listening.shutdown, socket.SHUT_RDWR)
            return f"tcp://127.0.0.1:{listening.getsockname()[1]}"

        yield started


NOT_ZEROMQ = {"http": b"HTTP/1.1 400 Bad Request\r\n\r\n", "ssh": b"SSH-2.0-x\r\n" * 9, "as": b"a" * 99, "nothing": b""}


@pytest.mark.parametrize("answer", NOT_ZEROMQ.values(), ids=NOT_ZEROMQ)
@pytest.mark.parametrize("own", [None, ALICE], ids=["without keys", "with keys"])
async def test_what_is_no_zeromq_never_comes_up(
    answer: bytes, own: KeyPair | None, stranger: Callable[[bytes], str], connect: Connect
) -> None:
    endpoint = stranger(answer)
    client = connect(endpoint, own)
    seen = set(await events_until(client, LinkEvent.LOST))
    assert seen <= {LinkEvent.MUTE, LinkEvent.CUT, LinkEvent.LOST}, "a daemon that is full may look so too"
    assert offered_mechanism(endpoint, timeout_seconds=5) is None


async def test_the_mechanism_is_read_from_the_greeting(encrypted: Room, open_room: Callable[..., Room]) -> None:
    for _ in range(5):
        assert await asyncio.to_thread(offered_mechanism, encrypted.endpoint, timeout_seconds=5) == "CURVE"
        assert await asyncio.to_thread(offered_mechanism, open_room().endpoint, timeout_seconds=5) == "NULL"


# --- the self-test ---------------------------------------------------------------------------------------------------


async def test_the_self_test_tells_a_server_that_refuses_from_one_that_takes_all(
    open_room: Callable[..., Room], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = open_room(keys=SERVER, allowed=only_alice)
    assert await refuses_unknown_keys(refusing.endpoint, SERVER.public)
    taking_all = open_room(keys=SERVER, allowed=lambda _: True)
    assert not await refuses_unknown_keys(taking_all.endpoint, SERVER.public)
    monkeypatch.setattr(curve, "SELF_TEST_MS", 50)
    assert not await refuses_unknown_keys(open_room().endpoint, SERVER.public)  # no authentication at all


async def test_the_self_test_reaches_a_server_that_listens_on_all_addresses(cleanup: ExitStack) -> None:
    router = new_router(keys=SERVER, allowed=only_alice)
    cleanup.callback(router.close)
    endpoint = router.bind("0.0.0.0", 0)
    assert endpoint.startswith("tcp://0.0.0.0:")
    assert await refuses_unknown_keys(endpoint, SERVER.public)


# --- key files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("open_umask")
def test_a_secret_is_nobody_elses_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create, rename = zmq.auth.create_certificates, Path.rename
    seen: list[int] = []

    def watched_create(directory: str, name: str) -> tuple[str, str]:
        files = create(directory, name)
        seen.append(mode_of(Path(directory)))
        return files

    def watched_rename(source: Path, target: Path) -> Path:
        if target.suffix == ".key_secret":
            seen.append(mode_of(source))
        return rename(source, target)

    monkeypatch.setattr(zmq.auth, "create_certificates", watched_create)
    monkeypatch.setattr(Path, "rename", watched_rename)
    public, secret = write_key_pair(tmp_path / "new" / "keys", "alice")
    assert seen == [0o700, 0o600]
    assert mode_of(secret) == 0o600
    assert mode_of(secret.parent) == 0o700
    assert {path.name for path in secret.parent.iterdir()} == {"alice.key", "alice.key_secret"}
    assert secret.read_text().count("-key = ") == 2
    assert "secret" not in public.read_text()


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    public, secret = write_key_pair(tmp_path, "alice")
    pair = read_key_pair(secret)
    assert read_public_key(str(public)) == read_public_key(pair.public.decode()) == pair.public
    assert zmq.curve_public(pair.secret) == pair.public
    for text in (repr(pair), str(pair), repr(ClientKeys(SERVER.public, pair))):
        assert pair.public.decode() in text or repr(pair.public) in text
        assert repr(pair.secret)[1:] not in text


def test_a_pair_is_never_overwritten(tmp_path: Path) -> None:
    public, secret = write_key_pair(tmp_path, "alice")
    before = secret.read_bytes()
    for left_out in (None, public):
        if left_out is not None:
            left_out.unlink()
        with pytest.raises(ConfigError, match=rf"{tmp_path}/alice\.key.*--out"):
            write_key_pair(tmp_path, "alice")
    assert secret.read_bytes() == before


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", "a.b", ".a", "-a", "a\n", "é", "a" * 65, "\0"])
def test_names_that_are_no_file_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(repr(name))} .*64"):
        write_key_pair(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="file/keys"):
        write_key_pair(tmp_path / "file" / "keys", "alice")


def test_key_files_that_will_not_do_say_what_to_do(tmp_path: Path) -> None:
    public, secret = write_key_pair(tmp_path, "alice")
    whole = secret.read_text()

    def refused(path: Path, words: str) -> None:
        with pytest.raises(ConfigError) as caught:
            read_key_pair(path)
        assert str(path) in str(caught.value) and words in str(caught.value)

    refused(tmp_path / "nobody.key_secret", "zsl keygen")
    refused(tmp_path, "directory")
    refused(public, "NAME.key_secret")
    for mode in (0o640, 0o604, 0o660, 0o644):
        secret.chmod(mode)
        refused(secret, f"chmod 600 {secret}")
    secret.chmod(0o600)
    key = read_key_pair(secret).secret.decode()
    for damaged in (
        key[:-1],
        key[:35],
        key + "0",
        "",
        "'" + key[1:],
        "#" * 40,
        "é" + key[1:],
        STRANGER.secret.decode(),
        "0" + key[1:] if key[0] != "0" else "1" + key[1:],
    ):
        secret.write_text(whole.replace(key, damaged))
        refused(secret, "whole")
    secret.write_bytes(os.urandom(200))
    refused(secret, "holds no key")


def test_public_keys_that_will_not_do_say_what_to_do(tmp_path: Path) -> None:
    public, secret = write_key_pair(tmp_path, "alice")
    with pytest.raises(ConfigError, match=rf"{secret} .*secret key"):
        read_public_key(str(secret))
    for text in ("", "alice.key", "x" * 39, "x" * 41, "#" * 40, "'" * 40, "\0" * 40, str(tmp_path)):
        with pytest.raises(ConfigError, match=rf"^{re.escape(repr(text))} .*40"):
            read_public_key(text)
    public.write_text(public.read_text().replace(read_public_key(str(public)).decode(), "x" * 39))
    with pytest.raises(ConfigError, match="damaged"):
        read_public_key(str(public))


def test_a_key_file_that_is_no_small_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    pipe, large, odd = (tmp_path / name for name in ("pipe", "large", "odd"))
    os.mkfifo(pipe)
    with large.open("wb") as file:
        file.truncate(1 << 40)
    odd.write_text("public-key\n")
    for path, words in ((pipe, "regular file"), (Path("/dev/zero"), "regular file"), (large, "bytes"), (odd, "no key")):
        with pytest.raises(ConfigError, match=words) as caught:
            read_key_pair(path)
        assert str(path) in str(caught.value)
