"""Hostile forms in zsl's own messages: preambles, headers, descriptors, tensors, damage at random."""

from __future__ import annotations

import struct
from itertools import islice

import msgpack

from zsl.wire.frames import MAX_HEADER_BYTES
from zsl.wire.messages import MessageType

from .hostile_scene import Act, Acts, Scene, Victim, forward, hello, packed, sealed, status, tensor
from .mutations import mutated
from .raw_zmtp import MORE

KINDS = MessageType
NAN, INFINITY = struct.pack("<f", float("nan")), struct.pack("<f", float("inf"))
BUNDLES, IN_A_BUNDLE = 12, 150


def messages() -> Acts:
    """At a daemon with or without keys."""

    def says(frames: list[bytes]) -> Act:
        return lambda scene: scene.joined().send_message(frames)

    def header(data: bytes) -> Act:
        return says(sealed(KINDS.HELLO, data))

    deep = 16_000
    forms: Acts = {
        "a message of 19 frames": says(sealed(KINDS.HELLO, b"\x80", [b"x"] * 17)),
        "a preamble of 15 bytes": says([status()[0][:15], status()[1]]),
        "a preamble of 17 bytes": says([status()[0] + b"x", status()[1]]),
        "a preamble of 1 MiB": says([status()[0] * 65_536, status()[1]]),
        "a preamble with a wrong magic": says([b"ZSLX" + status()[0][4:], status()[1]]),
        "a wrong checksum": says([status()[0][:8] + bytes(8), status()[1]]),
        "version 0 of the protocol": says(sealed(KINDS.STATUS, status()[1], major=0)),
        "version 255 of the protocol": says(sealed(KINDS.STATUS, status()[1], major=255)),
        "unknown flags of a message": says(sealed(KINDS.STATUS, status()[1], flags=0xFFFF)),
        "a header of no bytes": header(b""),
        "a header that is no map": header(msgpack.packb([1, 2, 3])),
        "a header over 16 KiB": header(msgpack.packb({"x": bytes(MAX_HEADER_BYTES)})),
        "a header of 3 MiB": header(bytes(3 << 20)),
        "a header of unknown keys": header(msgpack.packb({f"k{n}": 0 for n in range(2500)})),
        "a header of unknown keys, 200 times": _unknown_keys,
        "a header of arrays in arrays": header(b"\x91" * deep + b"\xc0"),
        "a header of maps in maps": header(b"\x81\xa1x" * (deep // 3) + b"\xc0"),
        "a header of ext types": header(msgpack.packb({"request": msgpack.ExtType(5, b"x"), "software": "x"})),
        "a header of timestamps": header(msgpack.packb({"request": msgpack.Timestamp(1)})),
        "a header of invalid UTF-8": header(b"\x81\xa7request\xa4\xff\xfe\xff\xfe"),
        "a header with a key of invalid UTF-8": header(b"\x81\xa2\xff\xfe\x01"),
        "a header with an invalid byte": header(b"\xc1"),
        "a header that claims a map of 4 G": header(b"\xdf\xff\xff\xff\xff"),
        "a header that claims an array of 4 G": header(b"\xdd\xff\xff\xff\xff"),
        "a header that claims a text of 4 G": header(b"\xdb\xff\xff\xff\xff"),
        "a header that claims 4 G of bytes": header(b"\xc6\xff\xff\xff\xff"),
        "a header with trailing bytes": header(hello()[1] + b"x"),
        "a header with a key twice": header(b"\x82\xa7request\x01\xa7request\x02"),
        "a header with integer keys": header(msgpack.packb({n: n for n in range(100)})),
        "a pickle in place of a header": header(b"\x80\x04cposix\nsystem\n\x8c\x04true\x85R."),
        "a request id of 2^64 - 1": says(status(2**64 - 1)),
        "a request id of -2^63": says(status(-(2**63))),
        "a request id that is NaN": says(status(float("nan"))),
        "a request id that is infinite": says(status(float("inf"))),
        "a request id that is true": says(status(True)),
        "HELLO with a software of 15 kB": says(hello(software="x" * 15_000)),
        "HELLO with an unknown dtype": says(hello(dtype="f64")),
        "HELLO for another cut": says(hello(cut={"start": 0, "stop": 65_536})),
        "a FORWARD before HELLO": lambda scene: scene.joined().send_message(
            forward(Victim(bytes(16), bytes(16), 0), [tensor((1, 2, scene.place.hidden))])
        ),
        "damaged WELCOME, RESULT and PONG": lambda scene: [
            scene.joined().send_message(packed(kind, {"request": 1}))
            for kind in (KINDS.WELCOME, KINDS.RESULT, KINDS.PONG)
        ],
    }
    for kind in (0, 14, 255):
        forms[f"a message of type {kind}"] = says(packed(kind, {"request": 1}))
    for number in range(BUNDLES):
        forms[f"{IN_A_BUNDLE} damaged messages, bundle {number}"] = _damaged
    return {**forms, **works()}


def works() -> Acts:
    """In a session of one's own: tensors and their descriptors."""

    def asks(*tensors: object, buffers: list[bytes] | None = None, times: int = 1, **changes: object) -> Act:
        """FORWARDs; in a shape, -1 stands for the hidden size."""

        def act(scene: Scene) -> None:
            peer, welcome = scene.opened()
            described = [_with_hidden(one, scene.place.hidden) for one in tensors]
            for number in range(times):
                peer.send_message(forward(welcome, described, buffers, **{"request": number + 1, **changes}))

        return act

    def one(shape: tuple[int, ...], **how: object) -> tuple[tuple[int, ...], dict[str, object]]:
        return shape, how

    ids = {"dtype": "i64", "width": 8}
    return {
        "activations of another hidden size": asks(one((1, 2, 3))),
        "activations of rank 1": asks(one((8,))),
        "activations of rank 5": asks(one((1, 1, 1, 2, -1))),
        "activations without tokens": asks(one((1, 0, -1))),
        "activations without rows": asks(one((0, 2, -1))),
        "activations of integers": asks(one((1, 2, -1), dtype="i64", width=8)),
        "activations of an unknown dtype": asks(one((1, 2, -1), dtype="f8")),
        "activations over a row's tokens": asks(one((1, 4096, -1))),
        "activations over a request's tokens": asks(one((40_000, 1, -1))),
        "activations twice": asks(one((1, 2, -1)), one((1, 2, -1))),
        "an unknown role": asks(one((1, 2, -1), role="weights")),
        "a role of __class__": asks(one((1, 2, -1), role="__class__")),
        "no tensors": asks(),
        "seventeen tensors": asks(*[one((1, 2, -1))] * 17),
        "a buffer that is missing": asks(one((1, 2, -1)), buffers=[]),
        "a buffer too many": asks(one((1, 2, -1)), buffers=[b"", b"x"]),
        "a buffer that is too short": asks(one((1, 2, -1)), buffers=[b"x"]),
        "a shape whose product is over 2^64": asks(one((2**31 - 1,) * 4), buffers=[b"x"]),
        "a negative shape": asks(one((-7, -7, -1)), buffers=[b"x"]),
        "NaN": _not_finite(NAN),
        "infinities": _not_finite(INFINITY),
        "a mask of another shape": asks(one((1, 8, -1)), one((1, 9), role="attention_mask", **ids)),
        "a mask of zeros": asks(one((1, 8, -1)), one((1, 8), role="attention_mask", **ids)),
        "lengths of zeros": asks(one((1, 8, -1)), one((8,), role="lengths", **ids)),
        "a budget of 0 ms": asks(one((1, 2, -1)), budget_ms=0),
        "a budget of 2^53 ms": asks(one((1, 2, -1)), budget_ms=2**53),
        "an attempt of 256": asks(one((1, 2, -1)), attempt=256),
        "another life's epoch": asks(one((1, 2, -1)), epoch=bytes(16)),
        "a FORWARD for a backward that never comes, 20 times": asks(one((1, 32, -1)), times=20, keep=True),
        "a FORWARD over the credit of requests, no answer read": asks(one((1, 32, -1)), times=100),
        "a request id again with another content": asks(one((1, 2, -1)), times=5, request=1, keep=True),
    }


def _with_hidden(one: object, hidden: int) -> dict[str, object]:
    shape, how = one  # type: ignore[misc]
    return tensor([hidden if size == -1 else size for size in shape], **how)


def _unknown_keys(scene: Scene) -> None:
    peer = scene.joined()
    one = sealed(KINDS.HELLO, msgpack.packb({f"k{n}": 0 for n in range(2500)}))
    for _ in range(200):
        peer.send_message(one)


def _not_finite(value: bytes) -> Act:
    def act(scene: Scene) -> None:
        peer, welcome = scene.opened()
        peer.send_message(forward(welcome, [tensor((1, 2, scene.place.hidden))], [value * (2 * scene.place.hidden)]))

    return act


def _damaged(scene: Scene) -> None:
    """Messages of a session that are each wrong in some way; the connection is made anew if it is ended."""
    peer, welcome = scene.opened()
    ids = {"session": welcome.session, "epoch": welcome.epoch}
    right = [  # no HELLO: one that is still right would open a session that nobody knows of
        status(),
        forward(welcome, [tensor((1, 2, scene.place.hidden))]),
        packed(KINDS.PING, {**ids, "request": 1}),
        packed(KINDS.RELEASE, {**ids, "step": 1}),
    ]
    for frames in islice(mutated(right, scene.random), IN_A_BUNDLE):
        if not frames:
            continue
        data = b"".join([*(peer.wrapped(one, MORE) for one in frames[:-1]), peer.wrapped(frames[-1])])
        if not peer.send(data):
            peer = scene.joined()
