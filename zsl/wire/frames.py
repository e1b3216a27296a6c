"""Frames: preamble, header, buffers.

    frame 0   preamble, 8 bytes: magic, major version, message type, flags (0)
    frame 1   header: msgpack, at most `MAX_HEADER_BYTES`
    frame 2…  one raw buffer a tensor

`decode` is the one place where bytes from the network become a message: whatever it is given, it returns a
`Message` or raises a `WireError`, and nothing of a message is trusted before it has passed here. It copies no
buffer. This module knows no socket and no torch.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
from pydantic import ValidationError

from zsl.errors import MalformedError, ProtocolVersionError, TooLargeError, WireError
from zsl.wire.messages import MAX_TENSORS, MAX_TEXT_CHARS, Header, TensorDescriptor

MAGIC = b"ZSLT"
MAJOR = 1
PREAMBLE = struct.Struct("<4sBBH")  # magic, major, type, flags
MAX_HEADER_BYTES = 16 * 1024
HEAD_FRAMES = 2

Frame = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Message:
    """A checked header and the buffers that its descriptors describe."""

    header: Header
    buffers: tuple[Frame, ...] = ()


def encode(header: Header, buffers: Sequence[Frame] = ()) -> list[Frame]:
    """The frames of one message. The buffers are passed on as they are, not copied.

    Raises `TooLargeError` if the header is over `MAX_HEADER_BYTES`.
    """
    packed = msgpack.packb(header.model_dump())
    if len(packed) > MAX_HEADER_BYTES:
        raise TooLargeError(f"a header of {len(packed)} bytes is over {MAX_HEADER_BYTES}")
    return [PREAMBLE.pack(MAGIC, MAJOR, header.TYPE, 0), packed, *buffers]


def decode(frames: Sequence[Frame], schemas: Mapping[int, type[Header]]) -> Message:
    """The message in `frames`; `schemas` says which types this end receives.

    Raises `ProtocolVersionError`, `TooLargeError` or `MalformedError`. If the sender's request id could be
    read, the error has it as the attribute `request`, so that it can be answered.
    """
    if not frames or len(frames[0]) != PREAMBLE.size:
        raise MalformedError("the first frame is not a preamble")
    magic, major, message_type, flags = PREAMBLE.unpack(frames[0])
    if magic != MAGIC:
        raise MalformedError("the first frame is not a preamble of this protocol")
    if major != MAJOR:
        raise ProtocolVersionError(f"this end speaks version {MAJOR} of the protocol, the message is of {major}")
    if flags != 0:
        raise MalformedError(f"unknown flags {flags:#06x}")
    schema = schemas.get(message_type)
    if schema is None:
        raise MalformedError(f"a message of type {message_type} is not taken here")
    if not HEAD_FRAMES <= len(frames) <= HEAD_FRAMES + MAX_TENSORS:
        raise MalformedError(f"{len(frames)} frames: a message has 2 to {HEAD_FRAMES + MAX_TENSORS}")
    fields = _unpack(frames[1])
    try:
        header = schema.model_validate(fields)
        buffers = tuple(frames[HEAD_FRAMES:])
        _check_buffers(getattr(header, "tensors", ()), buffers)
    except ValidationError as error:
        raise _with_request(MalformedError(_first_problem(schema, error)), fields) from None
    except WireError as error:
        raise _with_request(error, fields) from None
    return Message(header, buffers)


def _unpack(frame: Frame) -> dict[str, Any]:
    if len(frame) > MAX_HEADER_BYTES:
        raise TooLargeError(f"a header of {len(frame)} bytes is over {MAX_HEADER_BYTES}")
    try:
        fields = msgpack.unpackb(frame, object_pairs_hook=_map_without_duplicates)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException):
        raise MalformedError("the header is not one msgpack map") from None
    if not isinstance(fields, dict):
        raise MalformedError("the header is not one msgpack map")
    return fields


def _map_without_duplicates(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands twice")
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
    """The first thing wrong with a header, without its value: values can be data."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part)[:40] for part in problem["loc"]) or "header"
    return f"{schema.__name__}: {where}: {problem['msg']}"[:MAX_TEXT_CHARS]


def _with_request(error: WireError, fields: Mapping[str, Any]) -> WireError:
    request = fields.get("request")
    if type(request) is int and 0 <= request <= 2**53:
        error.request = request
    return error
