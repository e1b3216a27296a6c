"""Hostile forms before the first message: greetings and handshakes, right up to a place, and wrong from there on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

from .hostile_scene import Act, Acts, Scene
from .raw_zmtp import (
    COMMAND,
    DEALER,
    MORE,
    SIGNATURE,
    Curve,
    Ended,
    Metadata,
    RawKeys,
    RawPeer,
    command,
    frame,
    greeting,
    long_frame,
    message,
    properties,
    ready,
)

LEAVING: dict[str, Callable[[RawPeer], None]] = {
    "closed": RawPeer.close,
    "reset": RawPeer.reset,
    "half closed": RawPeer.half_close,
    "left silent": lambda peer: None,
}
SOME = 100
SLOW_SECONDS = 0.002
MEBIBYTE = 1 << 20
HUGE = {"2^63 - 1": 2**63 - 1, "2^63": 2**63, "2^64 - 1": 2**64 - 1, "1 GiB": 1 << 30}
SOCKET_TYPES = (b"REQ", b"REP", b"ROUTER", b"PUB", b"SUB", b"PUSH", b"PAIR", b"SERVER", b"", b"dealer", b"D" * 300)


def greetings() -> Acts:
    """At any daemon."""

    def says(data: bytes | Callable[[Scene], bytes]) -> Act:
        return lambda scene: scene.connected().send(data if isinstance(data, bytes) else data(scene))

    def right(scene: Scene) -> bytes:
        return greeting(scene.mechanism)

    forms: Acts = {
        "a TLS hello": says(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(505)),
        "an HTTP request": says(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
        "an SSH banner": says(b"SSH-2.0-x\r\n"),
        "64 kB at random": says(lambda scene: scene.random.randbytes(1 << 16)),
        "64 kB of zeros": says(bytes(1 << 16)),
        "64 kB of 0xff": says(b"\xff" * (1 << 16)),
        "ZMTP 1.0: an anonymous peer and a frame": says(b"\x01\x00\x06\x00ZMTP1"),
        "ZMTP 1.0: a frame without an end": says(b"\x01\x00\xff" + (2**62).to_bytes(8) + b"\x01" + bytes(4096)),
        "ZMTP 1.0: ten thousand frames": says(b"\x01\x00" + b"\x01\x01" * 10_000),
        "ZMTP 1.0: an identity of five bytes": says(b"\x06\x00" + bytes(5) + b"\x02\x00x"),
        "ZMTP 2.0: a DEALER with an identity": says(SIGNATURE + b"\x01\x05\x00\x05" + bytes(5) + b"\x00\x01x"),
        "ZMTP 2.0: nothing after the revision": says(SIGNATURE + b"\x01"),
        "a signature that counts": says(b"\xff" + (2**63).to_bytes(8) + b"\x7f"),
        "a signature of another end": says(SIGNATURE[:9] + b"\x00" + bytes(54)),
        "a greeting with a filler": says(lambda scene: right(scene)[:33] + b"\xff" * 31),
        "a greeting twice": says(lambda scene: right(scene) * 2),
        "a greeting as a server": says(lambda scene: greeting(scene.mechanism, as_server=1)),
        "a greeting as server 255": says(lambda scene: greeting(scene.mechanism, as_server=255)),
        "a greeting a byte at a time": _slow_greeting,
        "a greeting, then 1 MiB of zeros": lambda scene: scene.greeted().send(bytes(MEBIBYTE)),
        "a greeting, then 1 MiB at random": lambda scene: scene.greeted().send(scene.random.randbytes(MEBIBYTE)),
        "a message before the handshake": lambda scene: scene.greeted().send(message([b"a", b"b"])),
        "PING before the handshake": lambda scene: scene.greeted().send(command(b"PING", b"\0\1x")),
        "ERROR in place of the handshake": lambda scene: scene.greeted().send(command(b"ERROR", b"\xffwhy")),
        "an unknown command in place of the handshake": lambda scene: scene.greeted().send(command(b"KNOCK", b"x")),
        "an empty command in place of the handshake": lambda scene: scene.greeted().send(frame(b"", COMMAND)),
        "a command without an end in place of the handshake": _endless_command,
        "a command of 8 MiB in place of the handshake": lambda scene: scene.greeted().send(
            long_frame(b"\5READY" + bytes(8 * MEBIBYTE), COMMAND)
        ),
    }
    for version in (b"\x00\x00", b"\x02\x00", b"\x03\x00", b"\x03\xff", b"\x04\x00", b"\xff\xff"):
        forms[f"a greeting of version {version[0]}.{version[1]}, and READY"] = says(
            lambda scene, version=version: greeting(scene.mechanism, version=version) + ready()
        )
    for mechanism in (b"PLAIN", b"GSSAPI", b"null", b"", b"\xff" * 20, b"CURVE\0x"):
        forms[f"a greeting with the mechanism {mechanism!r}, and READY"] = says(greeting(mechanism) + ready())
    forms["a greeting with the other mechanism, and READY"] = says(
        lambda scene: greeting(b"NULL" if scene.keyed else b"CURVE") + ready()
    )
    for name, length in HUGE.items():
        forms[f"a command of {name} bytes in place of the handshake"] = lambda scene, length=length: (
            scene.greeted().send(long_frame(b"\5READY", COMMAND, length=length))
        )
    for name, leave in LEAVING.items():
        forms[f"a handshake {name} at each place"] = lambda scene, leave=leave: _cut_everywhere(scene, leave)
    return forms


def ready_forms() -> Acts:
    """At a daemon without keys: READY, and what is in it."""

    def says(data: bytes) -> Act:
        return lambda scene: scene.greeted().send(data + message([b"then this"]))

    def joins(pairs: Metadata) -> Act:
        return says(ready(pairs))

    def with_identity(identity: bytes) -> Metadata:
        return (*DEALER, (b"Identity", identity))

    forms: Acts = {
        "READY twice": says(ready() + ready()),
        "READY after a message": says(message([b"x"]) + ready()),
        "READY as a message": says(frame(ready()[2:])),
        "READY with MORE": says(command(b"READY", properties(DEALER), flags=COMMAND | MORE)),
        "READY in a long frame": says(long_frame(ready()[2:], COMMAND)),
        "READY with all flags": says(b"\xff" + ready()[1:]),
        "READY of no bytes": says(frame(b"", COMMAND)),
        "READY in small letters": says(command(b"ready", properties(DEALER))),
        "READY with a name of 255 bytes": says(command(b"R" * 255, properties(DEALER))),
        "READY whose name is longer than it": says(frame(b"\xffREADY", COMMAND)),
        "READY a byte at a time": lambda scene: scene.greeted().send_slowly(ready(), pause_seconds=SLOW_SECONDS),
        "READY that claims 1 MiB and ends": lambda scene: _sent(
            scene.greeted(), long_frame(ready()[2:], COMMAND, length=MEBIBYTE)
        ).half_close(),
        "metadata: none": joins(()),
        "metadata: without a socket type": joins([(b"Identity", b"x")]),
        "metadata: the socket type twice": joins([*DEALER, *DEALER]),
        "metadata: two socket types": joins([*DEALER, (b"Socket-Type", b"REQ")]),
        "metadata: the identity twice": joins([*DEALER, (b"Identity", b"a"), (b"Identity", b"b")]),
        "metadata: a name of no bytes": joins([*DEALER, (b"", b"x")]),
        "metadata: a name of 255 bytes": joins([*DEALER, (b"X" * 255, b"x")]),
        "metadata: a name that is no name": joins([*DEALER, (b"\0\xff\n", b"x")]),
        "metadata: names in other cases": joins([(b"SOCKET-TYPE", b"DEALER"), (b"IDENTITY", b"x")]),
        "metadata: a user id": joins([*DEALER, (b"User-Id", b"alice"), (b"Peer-Address", b"10.0.0.1")]),
        "metadata: ten thousand properties": joins([*DEALER, *((b"X-%d" % n, b"x") for n in range(10_000))]),
        "metadata: the same property ten thousand times": joins([*DEALER, *[(b"X-Y", b"x")] * 10_000]),
        "metadata: a value of 64 kB": joins([*DEALER, (b"X-Large", bytes(1 << 16))]),
        "metadata: a value of 8 MiB": joins([*DEALER, (b"X-Large", bytes(8 * MEBIBYTE))]),
        "metadata: a value that is longer than all": says(command(b"READY", properties(DEALER) + b"\1X\0\0\1\0x")),
        "metadata: a value of 2^31 bytes": says(command(b"READY", properties(DEALER) + b"\1X\x80\0\0\0x")),
        "metadata: a value of 2^32 - 1 bytes": says(command(b"READY", properties(DEALER) + b"\1X\xff\xff\xff\xffx")),
        "metadata: a name without a value": says(command(b"READY", properties(DEALER) + b"\1X")),
        "metadata: half a length": says(command(b"READY", properties(DEALER) + b"\1X\0\0")),
        "200 connections with large metadata": _large_metadata,
    }
    for kind in SOCKET_TYPES:
        forms[f"metadata: the socket type {kind[:8]!r}"] = joins([(b"Socket-Type", kind)])
    for size in (0, 1, 4, 5, 16, 255, 256, 60_000):
        forms[f"an identity of {size} bytes"] = joins(with_identity(b"i" * size))
    for number in (0, 1, 2**31, 2**32 - 1):
        forms[f"an identity of five bytes that begins with zero, {number}"] = joins(
            with_identity(b"\0" + number.to_bytes(4))
        )
    return forms


def curve_forms() -> Acts:
    """At a daemon with keys: CURVE's handshake, by a stranger and by a tenant."""

    def hellos(change: Callable[[Curve], bytes]) -> Act:
        return lambda scene: scene.greeted().send(frame(change(Curve(scene.tenant)), COMMAND))

    def initiates(change: Callable[[Curve], bytes]) -> Act:
        def act(scene: Scene) -> None:
            peer, curve = scene.welcomed()
            peer.send(frame(change(curve), COMMAND))

        return act

    forms: Acts = {
        "READY of NULL": lambda scene: scene.greeted().send(ready() + message([b"x"])),
        "HELLO of 199 bytes": hellos(lambda curve: curve.hello()[:-1]),
        "HELLO of 201 bytes": hellos(lambda curve: curve.hello() + b"\0"),
        "HELLO of 1 MiB": hellos(lambda curve: curve.hello() + bytes(MEBIBYTE)),
        "HELLO of version 2.0": hellos(lambda curve: curve.hello(version=b"\2\0")),
        "HELLO with a padding": hellos(lambda curve: curve.hello(padding=b"\xff" * 72)),
        "HELLO with a wrong box": hellos(lambda curve: curve.hello(signature=b"\xff" * 80)),
        "HELLO with a key of zeros": hellos(lambda curve: curve.hello().replace(curve.public, bytes(32))),
        "HELLO as a message": lambda scene: scene.greeted().send(frame(Curve(scene.tenant).hello())),
        "HELLO with MORE": lambda scene: scene.greeted().send(frame(Curve(scene.tenant).hello(), COMMAND | MORE)),
        "HELLO a byte at a time": lambda scene: scene.greeted().send_slowly(
            frame(Curve(scene.tenant).hello(), COMMAND), pause_seconds=SLOW_SECONDS
        ),
        "HELLO twice": lambda scene: scene.greeted().send(frame(Curve(scene.tenant).hello(), COMMAND) * 2),
        "HELLO, then nothing, a hundred times": lambda scene: [scene.welcomed() for _ in range(SOME)],
        "HELLO for another server's key": lambda scene: scene.greeted().send(
            frame(Curve(RawKeys.of_nobody(scene.random.randbytes(32))).hello(), COMMAND)
        ),
        "INITIATE before HELLO": lambda scene: scene.greeted().send(frame(b"\x08INITIATE" + bytes(300), COMMAND)),
        "INITIATE with a cookie of zeros": initiates(lambda curve: curve.initiate(cookie=bytes(96))),
        "INITIATE with another connection's cookie": _other_cookie,
        "INITIATE twice": initiates(lambda curve: curve.initiate()),
        "INITIATE with a wrong vouch": initiates(lambda curve: curve.initiate(vouched=bytes(32))),
        "INITIATE with a box of zeros": initiates(lambda curve: curve.initiate()[:113] + bytes(200)),
        "INITIATE cut short": initiates(lambda curve: curve.initiate()[:100]),
        "INITIATE without a box": initiates(lambda curve: curve.initiate()[:113]),
        "INITIATE with metadata that is none": initiates(lambda curve: curve.initiate(raw=b"\xff" * 60)),
        "INITIATE with a value of 2^32 - 1 bytes": initiates(
            lambda curve: curve.initiate(raw=properties(DEALER) + b"\1X\xff\xff\xff\xffx")
        ),
        "INITIATE without a socket type": initiates(lambda curve: curve.initiate([])),
        "INITIATE as a SUB": initiates(lambda curve: curve.initiate([(b"Socket-Type", b"SUB")])),
        "INITIATE with metadata of 1 MiB": initiates(
            lambda curve: curve.initiate([*DEALER, (b"X-Large", bytes(MEBIBYTE))])
        ),
        "INITIATE with metadata of 8 MiB": initiates(
            lambda curve: curve.initiate([*DEALER, (b"X-Large", bytes(8 * MEBIBYTE))])
        ),
        "INITIATE with an identity of five bytes": initiates(
            lambda curve: curve.initiate([*DEALER, (b"Identity", b"\0\0\0\0\1")])
        ),
        "INITIATE with a user id": initiates(lambda curve: curve.initiate([*DEALER, (b"User-Id", b"alice")])),
        "INITIATE with an unknown key": _unknown_key,
        "INITIATE with an unknown key, a hundred times": lambda scene: [_unknown_key(scene) for _ in range(SOME)],
        "INITIATE with an unknown key, and messages at once": _unknown_key_and_messages,
        "INITIATE with another's public key": _others_public_key,
        "MESSAGE in place of INITIATE": initiates(lambda curve: b"\x07MESSAGE" + bytes(100)),
        "ERROR in place of INITIATE": initiates(lambda curve: b"\x05ERROR\3why"),
        "READY in place of INITIATE": initiates(lambda curve: b"\x05READY" + bytes(100)),
    }
    for name, leave in LEAVING.items():
        forms[f"INITIATE {name} at twenty places"] = lambda scene, leave=leave: _initiate_cut(scene, leave)
    return forms


# --- what takes several steps ----------------------------------------------------------------------------------------


def _sent(peer: RawPeer, data: bytes) -> RawPeer:
    peer.send(data)
    return peer


def _slow_greeting(scene: Scene) -> None:
    scene.connected().send_slowly(greeting(scene.mechanism), pause_seconds=SLOW_SECONDS)


def _endless_command(scene: Scene) -> None:
    peer = scene.greeted()
    peer.send(long_frame(b"\5READY", COMMAND, length=2**40))
    scene.flood(peer, bytes(MEBIBYTE), 64 * MEBIBYTE)


def _cut_everywhere(scene: Scene, leave: Callable[[RawPeer], None]) -> None:
    """A connection for each place in greeting and first command."""
    first = frame(Curve(scene.tenant).hello(), COMMAND) if scene.keyed else ready()
    whole = greeting(scene.mechanism) + first
    for at in range(len(whole)):
        peer = scene.connected()
        peer.send(whole[:at])
        leave(peer)


def _initiate_cut(scene: Scene, leave: Callable[[RawPeer], None]) -> None:
    for at in sorted(scene.random.sample(range(250), 20)):
        peer, curve = scene.welcomed()
        peer.send(frame(curve.initiate(), COMMAND)[:at])
        leave(peer)


def _other_cookie(scene: Scene) -> None:
    (_, other), (peer, curve) = scene.welcomed(), scene.welcomed()
    peer.send(frame(curve.initiate(cookie=other.cookie), COMMAND))


def _unknown_key(scene: Scene) -> tuple[RawPeer, Curve]:
    peer, curve = scene.welcomed(RawKeys.of_nobody(scene.tenant.server))
    peer.send(frame(curve.initiate(), COMMAND))
    return peer, curve


def _unknown_key_and_messages(scene: Scene) -> None:
    peer, curve = _unknown_key(scene)
    peer.send(b"".join(frame(curve.message(b"x")) for _ in range(1000)))


def _others_public_key(scene: Scene) -> None:
    """Says that it is the tenant, but has no secret key to vouch with."""
    nobody = RawKeys.of_nobody(scene.tenant.server)
    peer, curve = scene.welcomed(RawKeys(scene.tenant.server, scene.tenant.public, nobody.secret))
    peer.send(frame(curve.initiate(), COMMAND))


def before_ready(*, keyed: bool) -> Iterator[tuple[str, Act]]:
    yield from greetings().items()
    yield from (curve_forms() if keyed else ready_forms()).items()


def _large_metadata(scene: Scene) -> None:
    for _ in range(2 * SOME):
        with suppress(Ended):
            scene.joined([*DEALER, (b"X-Large", bytes(60_000))])
