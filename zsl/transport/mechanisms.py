"""Server's end of the security mechanisms NULL and CURVE of ZMTP (RFC 25, 26).

Each object serves one connection: it answers the peer's handshake commands, then seals and opens frames. Bytes in,
bytes out. A peer that sends an Identity is refused: no peer may choose the address that answers are sent to.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import struct
from collections.abc import Callable
from typing import Protocol

import nacl.bindings as sodium
from nacl.exceptions import CryptoError
from zmq.utils import z85

from zsl.transport.curve_keys import BINARY_KEY_BYTES, KeyPair
from zsl.transport.zmtp import (
    COMMAND,
    MORE,
    ProtocolViolation,
    aligned_memory,
    command,
    head,
    metadata,
    parse_command,
    parse_metadata,
)
from zsl.wire.frames import Frame

logger = logging.getLogger(__name__)

SHOWN_KEY_CHARACTERS = 8
# Status codes of ZAP (RFC 27); libzmq's clients report them.
UNKNOWN_KEY, OTHER_SERVER_KEY = b"400", b"500"

COOKIE_BYTES = 96
NONCE = struct.Struct(">Q")
LONG_NONCE_BYTES = 16
MAC_BYTES = 16
HELLO_BYTES = 200
VERSION_AND_PADDING = b"\1\0" + bytes(72)
SIGNATURE_BOX = bytes(64)
VOUCH_BOX_BYTES = 80
MESSAGE = command(b"MESSAGE")
# CURVE's own flags, inside the box.
INNER_MORE, INNER_COMMAND = 1, 2


class Refused(Exception):
    """The peer is refused; `answer` is the ERROR command with the reason."""

    def __init__(self, reason: bytes, text: str) -> None:
        super().__init__(text)
        self.answer = command(b"ERROR", bytes((len(reason),)) + reason)


class Mechanism(Protocol):
    """Server's end of a connection's security. `tenant`: the peer's public key in z85, "" without keys."""

    name: bytes
    overhead_bytes: int  # maximum, of a sealed frame over its body
    tenant: str
    is_ready: bool
    encrypts: bool

    def answer(self, body: Frame) -> bytes:
        """Return the answer to a handshake command. Raises `ProtocolViolation` or `Refused`."""

    def seal(self, flags: int, body: Frame) -> tuple[bytes, Frame]:
        """Return the bytes before the body, and the body, both as sent."""

    def open(self, flags: int, body: memoryview) -> tuple[int, memoryview]:
        """Return flags and body of a received frame. Raises `ProtocolViolation`."""


class Null:
    """NULL: no keys, no encryption."""

    name = b"NULL"
    overhead_bytes = 0
    encrypts = False

    def __init__(self) -> None:
        self.tenant = ""
        self.is_ready = False

    def answer(self, body: Frame) -> bytes:
        name, data = parse_command(body)
        if name != b"READY":
            raise ProtocolViolation("READY was expected")
        _check_properties(data)
        self.is_ready = True
        return command(b"READY", _OWN_PROPERTIES)

    def seal(self, flags: int, body: Frame) -> tuple[bytes, Frame]:
        return head(len(body), flags), body

    def open(self, flags: int, body: memoryview) -> tuple[int, memoryview]:
        return flags, body


class Curve:
    """CURVE with the server's `keys`; `allowed(public key in z85)` returns whether a client may connect.

    Each connection has fresh keys and nonces. `random` returns cryptographically secure random bytes.
    """

    name = b"CURVE"
    overhead_bytes = len(MESSAGE) + NONCE.size + MAC_BYTES + 1
    encrypts = True

    def __init__(
        self,
        keys: KeyPair,
        allowed: Callable[[str], bool],
        random: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._allowed = allowed
        self._random = random
        self._public, self._secret = z85.decode(keys.public), z85.decode(keys.secret)
        self._peer = b""  # the peer's public key for this connection
        self._own_secret = b""  # this end's secret key for this connection
        self._cookie = b""
        self._shared = b""
        self._sent = 0
        self._heard = 0
        self.tenant = ""
        self.is_ready = False

    def answer(self, body: Frame) -> bytes:
        name, data = parse_command(body)
        if name == b"HELLO" and not self._cookie:
            return self._welcome(body)
        if name == b"INITIATE" and self._cookie and not self.is_ready:
            return self._ready(data)
        raise ProtocolViolation("HELLO, then INITIATE were expected")

    def _welcome(self, body: Frame) -> bytes:
        hello = bytes(body)
        peer, nonce, box = hello[80:112], hello[112:120], hello[120:]
        if len(hello) != HELLO_BYTES or hello[6:80] != VERSION_AND_PADDING:
            raise ProtocolViolation("a malformed HELLO")
        shared = _shared_key(peer, self._secret)
        try:
            signature = _opened(box, b"CurveZMQHELLO---" + nonce, shared)
        except ProtocolViolation:
            raise Refused(OTHER_SERVER_KEY, "it expects another key of this server") from None
        if signature != SIGNATURE_BOX:
            raise ProtocolViolation("a malformed HELLO")
        self._heard = NONCE.unpack(nonce)[0]
        self._peer = peer
        own_public, self._own_secret = sodium.crypto_box_keypair()
        self._cookie = self._random(COOKIE_BYTES)
        long_nonce = self._random(LONG_NONCE_BYTES)
        sealed = sodium.crypto_box_easy_afternm(own_public + self._cookie, b"WELCOME-" + long_nonce, shared)
        return command(b"WELCOME", long_nonce + sealed)

    def _ready(self, data: bytes) -> bytes:
        cookie, nonce, box = data[:COOKIE_BYTES], data[COOKIE_BYTES : COOKIE_BYTES + 8], data[COOKIE_BYTES + 8 :]
        if not hmac.compare_digest(cookie, self._cookie) or len(nonce) != NONCE.size:
            raise ProtocolViolation("an INITIATE that answers no WELCOME")
        self._check_nonce(nonce)
        shared = _shared_key(self._peer, self._own_secret)
        initiate = _opened(box, b"CurveZMQINITIATE" + nonce, shared)
        key, rest = initiate[:BINARY_KEY_BYTES], initiate[BINARY_KEY_BYTES:]
        vouch_nonce, rest = rest[:LONG_NONCE_BYTES], rest[LONG_NONCE_BYTES:]
        vouch, properties = rest[:VOUCH_BOX_BYTES], rest[VOUCH_BOX_BYTES:]
        if len(vouch) != VOUCH_BOX_BYTES:
            raise ProtocolViolation("an INITIATE that is cut short")
        # The vouch proves that the peer holds its secret key: it binds its public key to this connection's.
        vouched = _opened(vouch, b"VOUCH---" + vouch_nonce, _shared_key(key, self._own_secret))
        if not hmac.compare_digest(vouched, self._peer + self._public):
            raise ProtocolViolation("a vouch for another connection")
        self.tenant = self._admitted(key)
        _check_properties(properties)
        self._shared = shared
        self.is_ready = True
        sealed_nonce = self._next_nonce()
        sealed = sodium.crypto_box_easy_afternm(_OWN_PROPERTIES, b"CurveZMQREADY---" + sealed_nonce, shared)
        return command(b"READY", sealed_nonce + sealed)

    def _admitted(self, binary_key: bytes) -> str:
        key: str = z85.encode(binary_key).decode()
        try:
            allowed = self._allowed(key)
        except Exception:
            logger.exception("a key could not be looked up; it was refused")
            allowed = False
        if not allowed:
            raise Refused(UNKNOWN_KEY, f"its key {key[:SHOWN_KEY_CHARACTERS]}… is on no list")
        return key

    def seal(self, flags: int, body: Frame) -> tuple[bytes, Frame]:
        inner = (INNER_MORE if flags & MORE else 0) | (INNER_COMMAND if flags & COMMAND else 0)
        nonce = self._next_nonce()
        plain = b"".join((bytes((inner,)), body))
        sealed = sodium.crypto_box_easy_afternm(plain, b"CurveZMQMESSAGES" + nonce, self._shared)
        before = MESSAGE + nonce
        return head(len(before) + len(sealed)) + before, sealed

    def open(self, flags: int, body: memoryview) -> tuple[int, memoryview]:
        if flags & MORE or len(body) < self.overhead_bytes or body[: len(MESSAGE)] != MESSAGE:
            raise ProtocolViolation("a MESSAGE was expected")
        nonce = bytes(body[len(MESSAGE) : len(MESSAGE) + NONCE.size])
        self._check_nonce(nonce)
        plain = _opened(bytes(body[len(MESSAGE) + NONCE.size :]), b"CurveZMQMESSAGEC" + nonce, self._shared)
        if plain[0] not in (0, INNER_MORE, INNER_COMMAND):
            raise ProtocolViolation("a MESSAGE with unknown flags")
        opened = aligned_memory(len(plain) - 1)
        opened[:] = memoryview(plain)[1:]
        return (COMMAND if plain[0] & INNER_COMMAND else plain[0] & INNER_MORE), opened

    def _check_nonce(self, nonce: bytes) -> None:
        (number,) = NONCE.unpack(nonce)
        if number <= self._heard:
            raise ProtocolViolation("a message was sent again")
        self._heard = number

    def _next_nonce(self) -> bytes:
        self._sent += 1
        return NONCE.pack(self._sent)


def _check_properties(data: bytes) -> None:
    properties = parse_metadata(data)
    if properties.get(b"socket-type") != b"DEALER":
        raise ProtocolViolation("it is not a DEALER")
    if properties.get(b"identity"):
        raise ProtocolViolation("it claims an identity")


_OWN_PROPERTIES = metadata({b"Socket-Type": b"ROUTER", b"Identity": b""})


def _shared_key(public: bytes, secret: bytes) -> bytes:
    try:
        return bytes(sodium.crypto_box_beforenm(public, secret))
    except CryptoError:  # a point of low order
        raise ProtocolViolation("an invalid key") from None


def _opened(box: bytes, nonce: bytes, shared: bytes) -> bytes:
    """Open a box. Raises `ProtocolViolation` if it was not sealed with this key and nonce."""
    if len(box) >= MAC_BYTES:
        try:
            return bytes(sodium.crypto_box_open_easy_afternm(box, nonce, shared))
        except CryptoError:
            pass
    raise ProtocolViolation("a box that was not sealed with the right key")
