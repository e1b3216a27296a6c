"""ZMTP 3, the protocol of ZeroMQ's sockets (RFC 23 and 37): greeting, frames, commands and metadata.

Bytes in, bytes out; no sockets. `admit` checks a frame's size before memory is allocated for it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

import numpy as np

from zsl.wire.frames import ALIGNMENT_BYTES, Frame

SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
VERSION = b"\x03\x01"
GREETING_BYTES = 64
MECHANISM = slice(12, 32)
MIN_MAJOR = 3

MORE, LONG, COMMAND = 1, 2, 4
SHORT_FRAME_BYTES = 255
LONG_LENGTH = struct.Struct(">Q")
SHORT_HEAD_BYTES, LONG_HEAD_BYTES = 2, 1 + LONG_LENGTH.size
PROPERTY_LENGTH = struct.Struct(">I")

# Bodies from this size on are received without a copy, into memory aligned as torch's own.
LARGE_BYTES = 32 * 1024


class ProtocolViolation(Exception):
    """A peer violated ZMTP or a limit of this end; its connection must be closed. The text is for the log."""


def greeting(mechanism: bytes) -> bytes:
    """Return the server's greeting of 64 bytes."""
    as_server = b"\1" if mechanism == b"CURVE" else b"\0"
    return (SIGNATURE + VERSION + mechanism.ljust(20, b"\0") + as_server).ljust(GREETING_BYTES, b"\0")


def check_greeting(received: Frame, mechanism: bytes) -> None:
    """Check the received part of a peer's greeting. Raises `ProtocolViolation`."""
    # The eight bytes inside the signature are a length to older peers, and padding to those of version 3.
    if received[:1] != SIGNATURE[:1] or received[9:10] not in (b"", SIGNATURE[9:10]):
        raise ProtocolViolation("it does not speak ZeroMQ")
    if len(received) > len(SIGNATURE) and received[10] < MIN_MAJOR:
        raise ProtocolViolation(f"it speaks version {received[10]} of ZMTP; 3 is needed")
    if len(received) >= MECHANISM.stop and bytes(received[MECHANISM]).rstrip(b"\0") != mechanism:
        raise ProtocolViolation("one end encrypts, the other does not")


def head(nbytes: int, flags: int = 0) -> bytes:
    """Return the flags and length before a frame's body."""
    if nbytes <= SHORT_FRAME_BYTES:
        return bytes((flags, nbytes))
    return bytes((flags | LONG,)) + LONG_LENGTH.pack(nbytes)


def command(name: bytes, data: bytes = b"") -> bytes:
    """Return the body of a command."""
    return bytes((len(name),)) + name + data


def parse_command(body: Frame) -> tuple[bytes, bytes]:
    """Return name and data of a command. Raises `ProtocolViolation`."""
    if len(body) < 1 or len(body) < 1 + body[0]:
        raise ProtocolViolation("a command that is cut short")
    return bytes(body[1 : 1 + body[0]]), bytes(body[1 + body[0] :])


def metadata(properties: Mapping[bytes, bytes]) -> bytes:
    """Return the encoded properties of READY and INITIATE."""
    return b"".join(
        bytes((len(name),)) + name + PROPERTY_LENGTH.pack(len(value)) + value for name, value in properties.items()
    )


def parse_metadata(data: bytes) -> dict[bytes, bytes]:
    """Return the properties by name in lower case. Raises `ProtocolViolation`, also for duplicates."""
    properties: dict[bytes, bytes] = {}
    position = 0
    while position < len(data):
        value_at = position + 1 + data[position] + PROPERTY_LENGTH.size
        if not data[position] or value_at > len(data):
            raise ProtocolViolation("metadata that is cut short")
        name = data[position + 1 : value_at - PROPERTY_LENGTH.size].lower()
        (nbytes,) = PROPERTY_LENGTH.unpack_from(data, value_at - PROPERTY_LENGTH.size)
        position = value_at + nbytes
        if position > len(data) or name in properties:
            raise ProtocolViolation("metadata that is cut short, or says a property twice")
        properties[name] = data[value_at:position]
    return properties


def aligned_memory(nbytes: int) -> memoryview:
    """Return writable memory, aligned as torch's own and not initialized."""
    raw = np.empty(nbytes + ALIGNMENT_BYTES, dtype=np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[offset : offset + nbytes].data


def _head_bytes(first: int) -> int:
    """Return the length of a frame's head, from its first byte."""
    return LONG_HEAD_BYTES if first & LONG else SHORT_HEAD_BYTES


def _body_bytes(head: bytearray | memoryview) -> int | None:
    """Return the length of a frame's body, from its head; None if that is incomplete."""
    if not head or len(head) < _head_bytes(head[0]):
        return None
    nbytes: int = LONG_LENGTH.unpack_from(head, 1)[0] if head[0] & LONG else head[1]
    return nbytes


class FrameReader:
    """Parser of a byte stream into frames. `admit(flags, nbytes)` may raise before a body is allocated."""

    def __init__(self, admit: Callable[[int, int], None]) -> None:
        self._admit = admit
        self._head = bytearray()
        self._flags = 0
        self._body: memoryview | None = None
        self._filled = 0

    @property
    def rest(self) -> memoryview | None:
        """Memory to receive the rest of a large body into; None if the next bytes are for `feed`."""
        if self._body is None or len(self._body) - self._filled < LARGE_BYTES:
            return None
        return self._body[self._filled :]

    @property
    def held_bytes(self) -> int:
        """Received bytes of an unfinished frame."""
        return self._filled + len(self._head)

    def filled(self, nbytes: int) -> tuple[int, memoryview] | None:
        """Note `nbytes` received into `rest`. Return flags and body once the frame is complete."""
        assert self._body is not None
        self._filled += nbytes
        if self._filled < len(self._body):
            return None
        body, self._body, self._filled = self._body, None, 0
        self._head.clear()
        return self._flags, body

    def feed(self, data: memoryview) -> tuple[tuple[int, memoryview] | None, int]:
        """Return flags and body of the next frame, or None if incomplete, and the number of bytes used of `data`.

        Raises `ProtocolViolation`, and any error of `admit`.
        """
        used = 0
        if self._body is None:
            if not self._head and (frame := self._whole(data)) is not None:
                return frame
            used = self._feed_head(data)
            if self._body is None:
                return None, used
        part = data[used : used + len(self._body) - self._filled]
        self._body[self._filled : self._filled + len(part)] = part
        return self.filled(len(part)), used + len(part)

    def _whole(self, data: memoryview) -> tuple[tuple[int, memoryview], int] | None:
        """Return a small frame that `data` begins with, as `feed` does; None if it is incomplete or large."""
        nbytes = _body_bytes(data)
        if nbytes is None or nbytes >= LARGE_BYTES:
            return None
        start = _head_bytes(data[0])
        end = start + nbytes
        if end > len(data):
            return None
        flags = self._admitted(data[0], nbytes)
        return (flags, memoryview(bytearray(data[start:end]))), end

    def _admitted(self, first: int, nbytes: int) -> int:
        """Return the flags of a frame, from its first byte. Raises `ProtocolViolation`, and any error of `admit`."""
        flags = first & ~LONG
        if flags & ~(MORE | COMMAND) or flags == MORE | COMMAND:
            raise ProtocolViolation(f"a frame with the flags {first:#04x}")
        self._admit(flags, nbytes)
        return flags

    def _feed_head(self, data: memoryview) -> int:
        used = 0
        while (nbytes := _body_bytes(self._head)) is None:
            if used == len(data):
                return used
            wanted = _head_bytes(self._head[0] if self._head else data[0])
            part = data[used : used + wanted - len(self._head)]
            self._head += part
            used += len(part)
        self._flags = self._admitted(self._head[0], nbytes)
        self._body = aligned_memory(nbytes) if nbytes >= LARGE_BYTES else memoryview(bytearray(nbytes))
        self._filled = 0
        return used
