"""ZMTP 3.1 by hand on a blocking socket: right where it is asked to be, and wrong in every other way.

    peer = RawPeer("127.0.0.1", port)                     a TCP connection, nothing said
    peer.handshake()                                      greeting and READY, as a DEALER
    peer.handshake(keys=RawKeys(server, public, secret))  the same encrypted: ZeroMQ's RFC 26
    peer.send_message([b"a", b"b"])                       then whole messages, frames or commands
    peer.send(long_frame(b"", length=2**63))              or bytes of any kind

Written from the specifications (RFC 23, 26 and 37) and not from zsl: a fault that both ends share would not be seen.
Every wait is bounded by `WAIT_SECONDS`.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from nacl.bindings import (
    crypto_box_afternm,
    crypto_box_beforenm,
    crypto_box_keypair,
    crypto_box_open_afternm,
)
from nacl.utils import random as random_bytes

WAIT_SECONDS = 10.0
READ_BYTES = 1 << 16
RESET_ON_CLOSE = struct.pack("ii", 1, 0)

MORE, LONG, COMMAND = 1, 2, 4
BOXED_COMMAND = 2  # of libzmq; RFC 26 knows MORE only
SHORT_FRAME_BYTES = 255
SIGNATURE = b"\xff" + bytes(7) + b"\x01\x7f"
GREETING_BYTES = 64
KEY_BYTES = 32
CURVE_VERSION = b"\x01\x00"
COOKIE_BYTES = 96

Metadata = Iterable[tuple[bytes, bytes]]
DEALER: Metadata = ((b"Socket-Type", b"DEALER"),)


# --- bytes -----------------------------------------------------------------------------------------------------------


def greeting(mechanism: bytes = b"NULL", *, version: bytes = b"\x03\x01", as_server: int = 0) -> bytes:
    """The 64 bytes in which an end says its version and its mechanism."""
    return (SIGNATURE + version + mechanism.ljust(20, b"\0") + bytes([as_server])).ljust(GREETING_BYTES, b"\0")


def frame(body: bytes, flags: int = 0) -> bytes:
    """A frame in its short form if that can be, else in its long one."""
    if len(body) > SHORT_FRAME_BYTES:
        return long_frame(body, flags)
    return bytes([flags, len(body)]) + body


def long_frame(body: bytes, flags: int = 0, *, length: int | None = None) -> bytes:
    """A frame with eight bytes of length, which is that of its body if not said otherwise."""
    return bytes([flags | LONG]) + (len(body) if length is None else length).to_bytes(8) + body


def message(frames: Sequence[bytes]) -> bytes:
    """A whole message."""
    *others, last = frames
    return b"".join([*(frame(body, MORE) for body in others), frame(last)])


def command(name: bytes, content: bytes = b"", *, flags: int = COMMAND) -> bytes:
    """A command's frame."""
    return frame(bytes([len(name)]) + name + content, flags)


def properties(pairs: Metadata) -> bytes:
    """Metadata, as READY and INITIATE carry it."""
    return b"".join(bytes([len(name)]) + name + len(value).to_bytes(4) + value for name, value in pairs)


def ready(pairs: Metadata = DEALER) -> bytes:
    """The handshake of the mechanism NULL."""
    return command(b"READY", properties(pairs))


# --- CURVE -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RawKeys:
    """The server's public key and a pair of the client's own, 32 bytes each."""

    server: bytes
    public: bytes
    secret: bytes

    @classmethod
    def of_nobody(cls, server: bytes) -> RawKeys:
        """A fresh pair, which is on no list."""
        return cls(server, *crypto_box_keypair())


class Curve:
    """The client's side of CURVE. Each step gives the body of its command; `changes` put other bytes in its place."""

    def __init__(self, keys: RawKeys) -> None:
        self.keys = keys
        self.public, self._secret = crypto_box_keypair()  # of this connection only
        self.cookie = b""
        self.nonce = 0
        self._with_server_key = crypto_box_beforenm(keys.server, self._secret)
        self._session = b""

    def hello(self, *, version: bytes = CURVE_VERSION, padding: bytes = bytes(72), signature: bytes = b"") -> bytes:
        """The first command, of 200 bytes."""
        box = signature or self._box(self._with_server_key, b"CurveZMQHELLO---", bytes(64))
        return b"\x05HELLO" + version + padding + self.public + self._short_nonce() + box

    def take_welcome(self, body: bytes) -> None:
        """Learn the server's key of this connection. Raises `ValueError` for another command."""
        if not body.startswith(b"\x07WELCOME") or len(body) != 168:
            raise ValueError(f"not WELCOME: {body[:16]!r}, {len(body)} bytes")
        opened = crypto_box_open_afternm(body[24:], b"WELCOME-" + body[8:24], self._with_server_key)
        self.server_public, self.cookie = opened[:KEY_BYTES], opened[KEY_BYTES:]
        self._session = crypto_box_beforenm(self.server_public, self._secret)

    def initiate(
        self, pairs: Metadata = DEALER, *, cookie: bytes | None = None, vouched: bytes | None = None, raw: bytes = b""
    ) -> bytes:
        """The second command: who the client is. `vouched`: another key for the vouch; `raw`: instead of metadata."""
        vouch_nonce = random_bytes(16)
        long_term = crypto_box_beforenm(self.server_public, self.keys.secret)
        vouch = crypto_box_afternm((vouched or self.public) + self.keys.server, b"VOUCH---" + vouch_nonce, long_term)
        content = self.keys.public + vouch_nonce + vouch + (raw or properties(pairs))
        box = self._box(self._session, b"CurveZMQINITIATE", content)
        return b"\x08INITIATE" + (self.cookie if cookie is None else cookie) + self._short_nonce() + box

    def message(self, body: bytes, flags: int = 0) -> bytes:
        """A frame, encrypted. In the box a command has the flag `BOXED_COMMAND`."""
        box = self._box(self._session, b"CurveZMQMESSAGEC", bytes([flags]) + body)
        return b"\x07MESSAGE" + self._short_nonce() + box

    def open(self, body: bytes, name: bytes = b"MESSAGE") -> bytes:
        """Open a box from the server: flags and a frame, or the metadata of its READY."""
        prefix = b"CurveZMQMESSAGES" if name == b"MESSAGE" else b"CurveZMQREADY---"
        begin = 1 + len(name)
        if body[1:begin] != name:
            raise ValueError(f"not {name!r}: {body[:16]!r}")
        return crypto_box_open_afternm(body[begin + 8 :], prefix + body[begin : begin + 8], self._session)

    def _box(self, key: bytes, prefix: bytes, content: bytes) -> bytes:
        self.nonce += 1
        return crypto_box_afternm(content, prefix + self.nonce.to_bytes(8), key)

    def _short_nonce(self) -> bytes:
        return self.nonce.to_bytes(8)


# --- a connection ----------------------------------------------------------------------------------------------------


class Ended(Exception):
    """The other end has closed the connection, or was too slow."""


class RawPeer:
    """A TCP connection. What it sends is the caller's; reading tells frames apart, and decrypts."""

    def __init__(self, host: str, port: int, *, receive_buffer: int | None = None) -> None:
        """`receive_buffer`: a small one, so that answers that nobody reads soon stop the other end."""
        self.socket = socket.socket()
        self.socket.settimeout(WAIT_SECONDS)
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect((host, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.curve: Curve | None = None
        self.sent_bytes = 0
        self._unread = bytearray()

    # Sending.

    def send(self, data: bytes, *, wait_seconds: float = WAIT_SECONDS) -> bool:
        """False if the other end has closed, or does not take it in time: the rest is not sent then."""
        give_up_at = time.monotonic() + wait_seconds
        left = memoryview(data)
        while left:
            self.socket.settimeout(max(give_up_at - time.monotonic(), 0.001))
            try:
                taken = self.socket.send(left)
            except OSError:
                return False
            self.sent_bytes += taken
            left = left[taken:]
        return True

    def send_slowly(self, data: bytes, *, pause_seconds: float, piece_bytes: int = 1) -> bool:
        """Pieces with pauses between them."""
        for at in range(0, len(data), piece_bytes):
            if not self.send(data[at : at + piece_bytes]):
                return False
            time.sleep(pause_seconds)
        return True

    def wrapped(self, body: bytes, flags: int = 0) -> bytes:
        """A frame as this connection sends it: encrypted, if that is how it shook hands."""
        if self.curve is None:
            return frame(body, flags)
        return frame(self.curve.message(body, flags & MORE | (BOXED_COMMAND if flags & COMMAND else 0)))

    def send_frame(self, body: bytes, flags: int = 0) -> bool:
        return self.send(self.wrapped(body, flags))

    def send_message(self, frames: Sequence[bytes]) -> bool:
        *others, last = frames
        return self.send(b"".join([*(self.wrapped(bytes(body), MORE) for body in others), self.wrapped(bytes(last))]))

    def send_command(self, name: bytes, content: bytes = b"") -> bool:
        return self.send_frame(bytes([len(name)]) + name + content, COMMAND)

    # The handshake.

    def greet(self, mechanism: bytes = b"NULL") -> None:
        """Send a right greeting, and read the other's."""
        self.send(greeting(mechanism))
        self.receive_exactly(GREETING_BYTES)

    def handshake(self, pairs: Metadata = DEALER, keys: RawKeys | None = None) -> None:
        """All that comes before the first message. Raises `Ended`, or `ValueError` for an ERROR."""
        if keys is None:
            self.greet()
            self.send(ready(pairs))
            self._expect(b"\x05READY", self.receive_frame()[1])
            return
        curve = self.welcomed(keys)
        self.send(frame(curve.initiate(pairs), COMMAND))
        body = self.receive_frame()[1]
        self._expect(b"\x05READY", body)
        curve.open(body, b"READY")
        self.curve = curve

    def welcomed(self, keys: RawKeys) -> Curve:
        """Up to the server's WELCOME: INITIATE is next."""
        self.greet(b"CURVE")
        curve = Curve(keys)
        self.send(frame(curve.hello(), COMMAND))
        curve.take_welcome(self.receive_frame()[1])
        return curve

    @staticmethod
    def _expect(begin: bytes, body: bytes) -> None:
        if not body.startswith(begin):
            raise ValueError(f"{body[:40]!r} in place of {begin!r}")

    # Receiving.

    def receive_exactly(self, nbytes: int, *, wait_seconds: float = WAIT_SECONDS) -> bytes:
        """Raises `Ended`."""
        give_up_at = time.monotonic() + wait_seconds
        while len(self._unread) < nbytes:
            self.socket.settimeout(max(give_up_at - time.monotonic(), 0.001))
            try:
                received = self.socket.recv(READ_BYTES)
            except OSError as error:
                raise Ended(str(error)) from error
            if not received:
                raise Ended("closed")
            self._unread += received
        taken = bytes(self._unread[:nbytes])
        del self._unread[:nbytes]
        return taken

    def receive_frame(self, *, wait_seconds: float = WAIT_SECONDS) -> tuple[int, bytes]:
        """Flags and body of the next frame, decrypted after a handshake with keys. Raises `Ended`."""
        flags = self.receive_exactly(1, wait_seconds=wait_seconds)[0]
        length = int.from_bytes(self.receive_exactly(8 if flags & LONG else 1, wait_seconds=wait_seconds))
        body = self.receive_exactly(length, wait_seconds=wait_seconds)
        if self.curve is None or body[:6] == b"\x05ERROR":
            return flags & ~LONG, body
        opened = self.curve.open(body)
        return opened[0] & MORE | (COMMAND if opened[0] & BOXED_COMMAND else 0), opened[1:]

    def receive_message(self, *, wait_seconds: float = WAIT_SECONDS) -> list[bytes]:
        """The frames of the next message; commands between are dropped. Raises `Ended`."""
        frames: list[bytes] = []
        while True:
            flags, body = self.receive_frame(wait_seconds=wait_seconds)
            if flags & COMMAND:
                continue
            frames.append(body)
            if not flags & MORE:
                return frames

    def received_until_quiet(self, seconds: float = 0.2) -> list[tuple[int, bytes]]:
        """The frames that come until none has come for so long, or the connection has ended."""
        frames = []
        while True:
            try:
                frames.append(self.receive_frame(wait_seconds=seconds))
            except Ended:
                return frames

    # Leaving.

    def half_close(self) -> None:
        """Send no more, but go on to listen."""
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the other end was faster

    def reset(self) -> None:
        """Leave with RST in place of FIN."""
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        except OSError:
            pass
        self.socket.close()

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
