"""Encode and decode messages as frames: preamble, header, one buffer a tensor.

    frame 0   preamble, 16 bytes: magic, major version, message type, flags, checksum of all the rest
    frame 1   header: msgpack, at most `MAX_HEADER_BYTES`
    frame 2…  one raw buffer a tensor

`decode` is the only place where bytes from the network become a message: for any input it returns a `Message` or raises
a `WireError`. It copies no buffer. Imports no sockets and no torch.

The checksum (xxh3, 64 bits) is needed because TCP's own has 16 bits: in a terabyte of activations some damage passes
it (Stone and Partridge, "When the CRC and TCP checksum disagree", SIGCOMM 2000), and a flipped bit would be a wrong
gradient that nobody notices. It does not protect against an attacker; keys do. With the flag `UNCHECKED_BUFFERS` it
covers all but the content of the buffers: on an encrypted connection, whose cipher notices damage, and on one that does
not leave the machine (`zsl.transport.connection_digest`). A round trip of 8 MB takes 0.86 of the time then.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgpack
import xxhash
from pydantic import ValidationError

from zsl.errors import CorruptError, MalformedError, ProtocolVersionError, TooLargeError, WireError
from zsl.wire.messages import ID_BYTES, MAX_TENSORS, MAX_TEXT_CHARS, Header, TensorDescriptor

MAGIC = b"ZSLT"
MAJOR = 5
KIND = struct.Struct("<4sBBH")  # magic, major, type, flags
CHECKSUM_BYTES = 8
PREAMBLE_BYTES = KIND.size + CHECKSUM_BYTES
UNCHECKED_BUFFERS = 1  # a flag
MAX_HEADER_BYTES = 16 * 1024
HEAD_FRAMES = 2
# No valid header has more: parsing stops at the first item over it, before memory is taken for the rest.
MAX_KEYS, MAX_ITEMS = 24, 16  # of one map, of one list
MAX_CONTAINERS = 2 + 2 * MAX_TENSORS  # maps and lists: the header, its tensors, and per tensor a map and a shape

Frame = bytes | memoryview
# Matrix products round differently on differently aligned memory; torch's own allocations are aligned to this.
ALIGNMENT_BYTES = 64
Container = TypeVar("Container", dict[Any, Any], list[Any])


@dataclass(frozen=True, slots=True)
class Message:
    """Checked header and the buffers that its descriptors describe. `checked`: the checksum covers them."""

    header: Header
    buffers: tuple[Frame, ...] = ()
    checked: bool = True


def encode(header: Header, buffers: Sequence[Frame] = (), *, checked: bool = True) -> list[Frame]:
    """Return the frames of one message. The buffers are not copied. `checked`: the checksum covers their content.

    Raises `TooLargeError` if the header is over `MAX_HEADER_BYTES`.
    """
    packed = msgpack.packb(header.model_dump())
    if len(packed) > MAX_HEADER_BYTES:
        raise TooLargeError(f"a header of {len(packed)} bytes is over {MAX_HEADER_BYTES}")
    return seal([KIND.pack(MAGIC, MAJOR, header.TYPE, 0 if checked else UNCHECKED_BUFFERS), packed, *buffers])


def seal(frames: Sequence[Frame]) -> list[Frame]:
    """Return the frames of a message with the checksum appended to the first, an incomplete preamble."""
    kind, *rest = frames
    return [bytes(kind) + _checksum(kind, rest), *rest]


def seal_again(frames: Sequence[Frame], *, checked: bool) -> list[Frame]:
    """Return an encoded message with a checksum that covers the content of its buffers, or not."""
    *_, message_type, _ = KIND.unpack(frames[0][: KIND.size])
    return seal([KIND.pack(MAGIC, MAJOR, message_type, 0 if checked else UNCHECKED_BUFFERS), *frames[1:]])


def _checksum(kind: Frame, rest: Sequence[Frame]) -> bytes:
    unchecked = kind[6] & UNCHECKED_BUFFERS
    digest = xxhash.xxh3_64(kind)
    for index, frame in enumerate(rest):
        # The length too: the same bytes split differently into frames are another message.
        digest.update(len(frame).to_bytes(8, "little"))
        if index == 0 or not unchecked:
            digest.update(frame)
    return digest.digest()


def decode(frames: Sequence[Frame], schemas: Mapping[int, type[Header]]) -> Message:
    """Return the message in `frames`; `schemas` has the header class of each message type that this end receives.

    Raises `ProtocolVersionError`, `CorruptError`, `TooLargeError` or `MalformedError`, with the ids of request and
    session as attributes if they could be read, so that it can be answered.
    """
    if not frames or len(frames[0]) < KIND.size:
        raise MalformedError("the first frame is not a preamble")
    kind = frames[0][: KIND.size]
    magic, major, message_type, flags = KIND.unpack(kind)
    if magic != MAGIC:
        raise MalformedError("the first frame is not a preamble of this protocol")
    if major != MAJOR:
        raise ProtocolVersionError(f"this end speaks version {MAJOR} of the protocol, the message is of {major}")
    if len(frames[0]) != PREAMBLE_BYTES:
        raise MalformedError(f"a preamble of {len(frames[0])} bytes; it has {PREAMBLE_BYTES}")
    if not HEAD_FRAMES <= len(frames) <= HEAD_FRAMES + MAX_TENSORS:
        raise MalformedError(f"{len(frames)} frames: a message has 2 to {HEAD_FRAMES + MAX_TENSORS}")
    if frames[0][KIND.size :] != _checksum(kind, frames[1:]):
        raise CorruptError()
    if flags & ~UNCHECKED_BUFFERS:
        raise MalformedError(f"unknown flags {flags:#06x}")
    schema = schemas.get(message_type)
    if schema is None:
        raise MalformedError(f"a message of type {message_type} is not accepted here")
    fields = _unpack(frames[1])
    try:
        header = schema.model_validate(fields)
        buffers = tuple(frames[HEAD_FRAMES:])
        _check_buffers(getattr(header, "tensors", ()), buffers)
    except ValidationError as error:
        raise _with_sender(MalformedError(_first_problem(schema, error)), fields) from None
    except WireError as error:
        raise _with_sender(error, fields) from None
    return Message(header, buffers, checked=not flags & UNCHECKED_BUFFERS)


def _unpack(frame: Frame) -> dict[str, Any]:
    if len(frame) > MAX_HEADER_BYTES:
        raise TooLargeError(f"a header of {len(frame)} bytes is over {MAX_HEADER_BYTES}")
    containers = 0

    def counted(container: Container) -> Container:
        nonlocal containers
        containers += 1
        if containers > MAX_CONTAINERS:
            raise ValueError("too many maps and lists")
        return container

    try:
        fields = msgpack.unpackb(
            frame,
            object_pairs_hook=lambda pairs: counted(_map_without_duplicates(pairs)),
            list_hook=counted,
            max_map_len=MAX_KEYS,
            max_array_len=MAX_ITEMS,
            max_ext_len=0,
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException):
        raise MalformedError("the header is not one msgpack map, or holds more than any message has") from None
    if not isinstance(fields, dict):
        raise MalformedError("the header is not one msgpack map")
    return fields


def _map_without_duplicates(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key occurs twice")
    return fields


def _check_buffers(descriptors: Sequence[TensorDescriptor], buffers: Sequence[Frame]) -> None:
    if len(descriptors) != len(buffers):
        raise MalformedError(f"{len(descriptors)} tensors are described, {len(buffers)} buffers came")
    if len({descriptor.role for descriptor in descriptors}) != len(descriptors):
        raise MalformedError("two tensors have the same role")
    for descriptor, buffer in zip(descriptors, buffers, strict=True):
        if descriptor.nbytes != len(buffer):
            raise MalformedError(f"{descriptor.role}: {descriptor.nbytes} bytes are described, {len(buffer)} came")


def _first_problem(schema: type[Header], error: ValidationError) -> str:
    """Return the first error in a header, without its value: values can be data."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(ascii(str(part)[:40])[1:-1] for part in problem["loc"]) or "header"  # for terminals
    return f"{schema.__name__}: {where}: {problem['msg']}"[:MAX_TEXT_CHARS]


def _with_sender(error: WireError, fields: Mapping[str, Any]) -> WireError:
    request, session = fields.get("request"), fields.get("session")
    if type(request) is int and 0 <= request <= 2**53:
        error.request = request
    if type(session) is bytes and len(session) == ID_BYTES:
        error.session = session
    return error
