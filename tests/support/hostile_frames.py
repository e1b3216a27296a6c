"""Hostile forms after a right handshake, below zsl's own messages: flags, lengths, commands, multipart, connections."""

from __future__ import annotations

from .hostile_bytes import HUGE, LEAVING, MEBIBYTE, SLOW_SECONDS, SOME
from .hostile_scene import FLOOD_SECONDS, Act, Acts, Scene, forward, status, tensor
from .raw_zmtp import COMMAND, LONG, MORE, RawPeer, frame, greeting, long_frame, message

SILENT = 300
SMALL_BUFFER = 4096
FRAMES_TOGETHER = 1000  # each may have to be encrypted, and the daemon may take none of them
EMPTY_FRAMES = 1_000_000
FLOOD_BYTES = 65 * 1000 * 1000


def frames() -> Acts:
    """At a daemon with or without keys, by one who got in."""

    def says(data: bytes) -> Act:
        """As it is, encrypted or not."""
        return lambda scene: scene.joined().send(data)

    def commands(name: bytes, content: bytes = b"", *, times: int = 1) -> Act:
        def act(scene: Scene) -> None:
            peer = scene.joined()
            for _ in range(times):
                peer.send_command(name, content)

        return act

    def framed(body: bytes, flags: int = 0) -> Act:
        return lambda scene: scene.joined().send_frame(body, flags)

    forms: Acts = {
        "an empty message": framed(b""),
        "a message of one byte": framed(b"x"),
        "MORE and then nothing": framed(b"x", MORE),
        "a command with MORE": framed(b"\4PING\0\0", COMMAND | MORE),
        "a command within a message": lambda scene: (peer := scene.joined()).send(
            peer.wrapped(b"x", MORE) + peer.wrapped(b"\4PING\0\0", COMMAND) + peer.wrapped(b"y")
        ),
        "a short text as a long frame": says(long_frame(b"x")),
        "a long frame of length 0": says(long_frame(b"")),
        "a frame that was not encrypted": says(message([b"ZSLT", b"x"])),
        "a message again, byte by byte": lambda scene: (peer := scene.joined()).send(peer.wrapped(b"x") * 2),
        "messages out of order": lambda scene: (peer := scene.joined()).send(
            b"".join(reversed([peer.wrapped(b"%d" % n) for n in range(5)]))
        ),
        "MESSAGE of no bytes": says(frame(b"\x07MESSAGE")),
        "MESSAGE with a box of zeros": says(frame(b"\x07MESSAGE" + b"\xff" * 8 + bytes(100))),
        "the greeting again": says(greeting()),
        "READY again": commands(b"READY", b"\x0bSocket-Type\0\0\0\6DEALER"),
        "PING without a TTL": commands(b"PING"),
        "PING with half a TTL": commands(b"PING", b"\0"),
        "PING with a TTL of 0": commands(b"PING", b"\0\0"),
        "PING with a TTL of 0.1 s, then silence": commands(b"PING", b"\0\1"),
        "PING with the longest TTL": commands(b"PING", b"\xff\xff" + b"c" * 16),
        "PING with a context of 17 bytes": commands(b"PING", b"\0\0" + b"c" * 17),
        "PING with a context of 1 MiB": commands(b"PING", bytes(MEBIBYTE)),
        "PING ten thousand times, and no PONG read": commands(b"PING", b"\0\0" + b"c" * 16, times=10_000),
        "PONG that nobody asked for": commands(b"PONG", b"c" * 16),
        "SUBSCRIBE to all": commands(b"SUBSCRIBE"),
        "CANCEL of a subscription": commands(b"CANCEL", b"x" * 300),
        "JOIN and LEAVE": commands(b"JOIN", b"x"),
        "ERROR": commands(b"ERROR", b"\3why"),
        "ERROR with a reason that is longer than it": commands(b"ERROR", b"\xffwhy"),
        "an unknown command": commands(b"KNOCK", b"x"),
        "an unknown command ten thousand times": commands(b"KNOCK", b"x", times=10_000),
        "a command with a name of 255 bytes": commands(b"N" * 255),
        "a command without a name": framed(b"\0", COMMAND),
        "an empty command": framed(b"", COMMAND),
        "a command whose name is longer than it": framed(b"\xffPING", COMMAND),
        "a message of 64 MiB": lambda scene: scene.flood(
            _said(scene, long_frame(b"", length=64 * MEBIBYTE)), bytes(MEBIBYTE), 64 * MEBIBYTE
        ),
        "a message without an end, of frames of 64 kB": lambda scene: _endless(scene, bytes(1 << 16)),
        "a message without an end, of frames of 1 MiB": lambda scene: _endless(scene, bytes(MEBIBYTE)),
        "a message without an end, of one byte each": lambda scene: _endless(scene, b"x"),
        "a message of a million empty frames": lambda scene: _many_empty(scene, count=EMPTY_FRAMES),
        "65 MB of empty frames": lambda scene: _many_empty(scene),
        "ten thousand empty messages": lambda scene: (peer := scene.joined()).send(
            b"".join(peer.wrapped(b"") for _ in range(10_000))
        ),
        "a message of a thousand frames": lambda scene: scene.joined().send_message([b"x"] * 1000),
        "300 silent connections": lambda scene: [scene.connected() for _ in range(SILENT)],
        "300 greeted connections": lambda scene: [scene.greeted() for _ in range(SILENT)],
        "100 connections that have joined": lambda scene: [scene.joined() for _ in range(SOME)],
        "100 connections with a message that is not finished": lambda scene: [
            scene.joined().send_frame(bytes(1000), MORE) for _ in range(SOME)
        ],
        "300 connections that come and go": lambda scene: [scene.connected().reset() for _ in range(SILENT)],
        "a frame a byte at a time": lambda scene: (peer := scene.joined()).send_slowly(
            peer.wrapped(bytes(100)), pause_seconds=SLOW_SECONDS
        ),
        "STATUS at full speed, and no answer read": _answers_unread,
    }
    for name, length in HUGE.items():
        forms[f"a frame of length {name}"] = says(long_frame(b"x" * 100, length=length))
        forms[f"a command of length {name}"] = says(long_frame(b"\4PING", COMMAND, length=length))
    for flags in (8, 16, 32, 64, 128, 0xFF, COMMAND | LONG):
        forms[f"a frame with the flags {flags:#x}"] = says(bytes([flags]) + frame(bytes(300), 0)[1:])
    for name, leave in LEAVING.items():
        forms[f"a frame {name} in its midst"] = lambda scene, leave=leave: leave(_in_its_midst(scene))
        forms[f"a request {name} before its answer"] = lambda scene, leave=leave: leave(_before_its_answer(scene))
    return forms


def _said(scene: Scene, data: bytes) -> RawPeer:
    peer = scene.joined()
    peer.send(data)
    return peer


def _endless(scene: Scene, body: bytes) -> None:
    _frames_without_end(scene.joined(), body, most_bytes=FLOOD_BYTES)


def _many_empty(scene: Scene, *, count: int | None = None) -> None:
    """One message of so many frames, or what has 65 MB of them."""
    peer = scene.joined()
    if _frames_without_end(peer, b"", most_bytes=FLOOD_BYTES, count=count):
        peer.send(peer.wrapped(b""))


def _frames_without_end(peer: RawPeer, body: bytes, *, most_bytes: int, count: int | None = None) -> bool:
    """False if the daemon takes no more of them: it has ended the connection."""
    together = max(1, min(FRAMES_TOGETHER, MEBIBYTE // max(len(body), 1)))
    sent = 0
    while sent < count if count is not None else peer.sent_bytes < most_bytes:
        piece = b"".join(peer.wrapped(body, MORE) for _ in range(together))
        if not peer.send(piece, wait_seconds=FLOOD_SECONDS):
            return False
        sent += together
    return True


def _answers_unread(scene: Scene) -> None:
    peer = scene.joined(receive_buffer=SMALL_BUFFER)
    asks = b"".join(
        b"".join([*(peer.wrapped(f, MORE) for f in status()[:-1]), peer.wrapped(status()[-1])]) for _ in range(2000)
    )
    peer.send(asks, wait_seconds=FLOOD_SECONDS)


def _in_its_midst(scene: Scene) -> RawPeer:
    peer = scene.joined()
    whole = peer.wrapped(bytes(1000))
    peer.send(whole[: scene.random.randrange(1, len(whole))])
    return peer


def _before_its_answer(scene: Scene) -> RawPeer:
    peer, welcome = scene.opened()
    peer.send_message(forward(welcome, [tensor((1, 8, scene.place.hidden))], keep=True))
    return peer
