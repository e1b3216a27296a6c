"""Real messages, damaged: an endless stream of what a broken or a malicious peer could send.

The damage knows the form of a message (preamble, header of msgpack, buffers), so that much of it gets past the first
checks. Half of the messages get a right checksum again; without it all would be refused for the same reason.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import msgpack

from zsl.wire.frames import KIND, seal

Frames = list[bytes]
Path = tuple[str | int, ...]

INTEGERS = [0, 1, -1, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)]
FLOATS = [0.0, -0.0, 1.5, 1e300, float("inf"), float("nan")]
TEXTS = ["", "\0", "x" * 600, "é" * 100, "__class__", "load", "../x", "f32", "bf16", "i64", "bool", "gradients"]
OTHERS = [None, True, False, b"", [], {}, {"a": 1}, [[[[]]]], msgpack.ExtType(5, b"x"), msgpack.Timestamp(1)]
PAYLOADS = [struct.pack("<f", value) for value in (float("nan"), float("inf"), -float("inf"), -0.0, 3e38, 1e-45)]


def mutated(messages: Sequence[Frames], random: Random) -> Iterator[Frames]:
    """Endlessly, messages that are each like one of `messages`, but not quite; the same ones for the same `random`."""
    while True:
        original = random.choice(messages)
        frames = list(original)
        for _ in range(random.choice([1, 1, 1, 2, 3])):
            change = random.choice(CHANGES)
            change(frames, random, random.choice(messages))
        if random.random() < 0.5 and frames and len(frames[0]) >= KIND.size:
            frames = [bytes(frame) for frame in seal([frames[0][: KIND.size], *frames[1:]])]
        if frames != original:
            yield frames


# Each change is made in place; `other` is another real message. What has no such part stays as it is.


def _flip(frames: Frames, random: Random, other: Frames) -> None:
    index = _some(frames, random)
    if index is not None and frames[index]:
        frame = bytearray(frames[index])
        for _ in range(random.choice([1, 1, 8])):
            frame[random.randrange(len(frame))] ^= 1 << random.randrange(8)
        frames[index] = bytes(frame)


def _truncate(frames: Frames, random: Random, other: Frames) -> None:
    index = _some(frames, random)
    if index is not None and frames[index]:
        frames[index] = frames[index][: random.randrange(len(frames[index]))]


def _extend(frames: Frames, random: Random, other: Frames) -> None:
    index = _some(frames, random)
    if index is not None:
        frames[index] += random.choice([b"\0", frames[index], random.randbytes(random.choice([1, 4, 20_000]))])


def _empty(frames: Frames, random: Random, other: Frames) -> None:
    index = _some(frames, random)
    if index is not None:
        frames[index] = b""


def _drop(frames: Frames, random: Random, other: Frames) -> None:
    index = _some(frames, random)
    if index is not None:
        del frames[index]


def _duplicate(frames: Frames, random: Random, other: Frames) -> None:
    index = _some(frames, random)
    if index is not None:
        frames[index:index] = [frames[index]] * random.choice([1, 1, 20])


def _reorder(frames: Frames, random: Random, other: Frames) -> None:
    random.shuffle(frames)


def _insert(frames: Frames, random: Random, other: Frames) -> None:
    frames.insert(random.randint(0, len(frames)), random.randbytes(random.choice([0, 1, 16, 300])))


def _splice(frames: Frames, random: Random, other: Frames) -> None:
    """The first frames of one message, the last ones of another."""
    frames[random.randint(0, len(frames)) :] = other[random.randint(0, len(other)) :]


def _other_frame(frames: Frames, random: Random, other: Frames) -> None:
    """One frame of another message in the same place: its preamble, its header, or a buffer."""
    if frames and other:
        index = random.randrange(min(len(frames), len(other)))
        frames[index] = other[index]


def _other_kind(frames: Frames, random: Random, other: Frames) -> None:
    """One byte of version, type or flags is another one."""
    if frames and len(frames[0]) >= KIND.size:
        preamble = bytearray(frames[0])
        preamble[random.choice([4, 5, 5, 5, 6, 7])] = random.choice([*range(20), 255])
        frames[0] = bytes(preamble)


def _payload(frames: Frames, random: Random, other: Frames) -> None:
    """A buffer of the same size that holds numbers which are none."""
    if len(frames) > 2:
        index = random.randrange(2, len(frames))
        size = len(frames[index])
        payload = random.choice([*PAYLOADS, b"\xff", random.randbytes(4)])
        frames[index] = (payload * (size // len(payload) + 1))[:size]


def _field(frames: Frames, random: Random, other: Frames) -> None:
    """One value of the header, or of something in it, is another one, is gone, or has a new neighbour."""
    try:
        header = msgpack.unpackb(frames[1])
        path = random.choice(list(_paths(header)))
    except (IndexError, ValueError, msgpack.UnpackException):
        return  # it is no longer a header
    holder = header
    for step in path[:-1]:
        holder = holder[step]
    what = random.random()
    if what < 0.1:
        del holder[path[-1]]
    elif what < 0.2 and isinstance(holder, dict):
        holder[random.choice(["extra", "request", "tensors", "__reduce__", ""])] = _nasty(holder[path[-1]], random)
    else:
        holder[path[-1]] = _nasty(holder[path[-1]], random)
    frames[1] = msgpack.packb(header)


CHANGES: list[Callable[[Frames, Random, Frames], None]] = [
    _flip, _truncate, _extend, _empty, _drop, _duplicate, _reorder, _insert, _splice, _other_frame, _other_kind,
    _payload, *[_field] * 8,  # most of what there is to get wrong
]  # fmt: skip


def _some(frames: Frames, random: Random) -> int | None:
    return random.randrange(len(frames)) if frames else None


def _paths(value: Any) -> Iterator[Path]:
    """The ways to all values within a map or a list."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (key,)
        yield from ((key, *path) for path in _paths(inner))


def _nasty(value: Any, random: Random) -> Any:
    """Mostly of the same type as `value`, so that only its meaning can be wrong."""
    if random.random() < 0.25:
        return random.choice([*INTEGERS, *FLOATS, *TEXTS, *OTHERS])
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        near = [near for near in (value - 1, value + 1, value * 2) if -(2**63) <= near < 2**64]
        return random.choice([*INTEGERS, *near, random.getrandbits(random.randrange(1, 64))])
    if isinstance(value, str):
        return random.choice([*TEXTS, value[:-1], value + "x", value.upper(), value[::-1]])
    if isinstance(value, bytes):
        same_size = [random.randbytes(len(value)), bytes(len(value))]
        return random.choice([b"", value[:-1], value + b"\0", value * 99, *same_size])
    if isinstance(value, list):
        return random.choice([[], value * 2, value[::-1], value[1:], [value], value * 20])
    return random.choice(OTHERS)
