"""Hostile forms with keys and values that the daemon keeps: names, versions, lengths and rows that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np

from zsl.wire.messages import MessageType, Welcome

from .hostile_scene import Act, Acts, Scene, forward, packed, tensor
from .hostile_sessions import ROW, answered
from .raw_zmtp import RawPeer

NAME = 1  # the request that makes the cache
MANY = 300
NEW: dict[str, Any] = {"name": NAME, "version": 0, "length": 0}
NEXT: dict[str, Any] = {"name": NAME, "version": 1, "length": ROW}
# Of a daemon without a model, which keeps none.
REFUSED = {"MALFORMED"}


def caches() -> Acts:
    """In sessions of one's own, unless a name says otherwise."""

    def first(codes: set[str], *, message: dict[str, Any] | None = None, **changes: object) -> Act:
        return lambda scene: _ask(scene, *scene.opened(), codes, 1, 1, ROW, {**NEW, **changes}, **(message or {}))

    def second(
        codes: set[str],
        *,
        of: tuple[int, int] = (1, 1),
        mask: int | None = None,
        kept: list[int] | None = None,
        **changes: object,
    ) -> Act:
        """A request of so many rows and tokens behind a cache of one row, with a mask of so many tokens."""

        def act(scene: Scene) -> None:
            peer, welcome = _made(scene)
            _ask(scene, peer, welcome, codes, 2, *of, {**NEXT, **changes}, mask=mask, kept=kept)

        return act

    return {
        "a new cache of another name": first({"MALFORMED"}, name=7),
        "a new cache of many tokens": first({"MALFORMED", "TOO_LARGE"}, length=2**31 - 1),
        "a new cache of chosen rows": first({"MALFORMED"}, message={"kept": [0]}),
        "a cache with a backward": first({"MALFORMED"}, message={"keep": True}),
        "an unknown cache": second({"UNKNOWN_CACHE"}, name=7),
        "a cache of a later version": second({"UNKNOWN_CACHE"}, version=2**53),
        "a cache of version -1": second({"MALFORMED"}, version=-1),
        "a cache made by two requests": second({"MALFORMED"}, version=0, length=0),
        "more tokens than a cache has": second({"BAD_SHAPE"}, length=ROW + 1),
        "2^31 tokens of a cache": second({"BAD_SHAPE", "TOO_LARGE"}, length=2**31 - 1),
        "no token of a cache": second({"BAD_SHAPE"}, length=0),
        "a row that a cache has not": second({"BAD_SHAPE"}, kept=[1]),
        "a row below 0": second({"BAD_SHAPE"}, kept=[-1]),
        "2^16 rows of a cache": second({"BAD_SHAPE", "TOO_LARGE"}, kept=[0] * 2**16),
        "no row of a cache": second({"BAD_SHAPE"}, kept=[]),
        "more rows than are asked for": second({"BAD_SHAPE"}, of=(3, 1)),
        "a mask of the new token only": second({"BAD_SHAPE"}, mask=1),
        "8,000 rows of one": _repeated,
        "one cache with two requests": _twice,
        "300 caches": _many,
        "a cache that is left behind": lambda scene: _made(scene)[0].close(),
        "another's cache": _of_others,
        "a release of another's cache": _released_by_others,
    }


def _ask(
    scene: Scene,
    peer: RawPeer,
    welcome: Welcome,
    codes: set[str],
    request: int,
    rows: int,
    tokens: int,
    cache: dict[str, Any],
    *,
    mask: int | None = None,
    kept: list[int] | None = None,
    **changes: Any,
) -> None:
    """Send a FORWARD with a cache. It is answered with one of these codes."""
    tensors = [tensor((rows, tokens, scene.place.hidden))]
    if mask is not None:
        tensors.append(tensor((rows, mask), "attention_mask", "u8", 1))
    buffers = [bytes(one["nbytes"]) for one in tensors]  # type: ignore[call-overload]
    if kept is not None:
        tensors.append(tensor((len(kept),), "cache_rows", "i32", 4))
        buffers.append(np.array(kept, np.int32).tobytes())
    peer.send_message(forward(welcome, tensors, buffers, request=request, cache=cache, **changes))
    answered(peer, request, *codes, *REFUSED)


def _made(scene: Scene) -> tuple[RawPeer, Welcome]:
    """A session with a cache of one row."""
    peer, welcome = scene.opened()
    peer.send_message(forward(welcome, [tensor((1, ROW, scene.place.hidden))], request=NAME, cache=NEW))
    answered(peer, NAME, None, "OVERLOADED", *REFUSED)
    return peer, welcome


def _repeated(scene: Scene) -> None:
    peer, welcome = _made(scene)
    rows = 8000
    tensors = [tensor((rows, 1, scene.place.hidden)), tensor((rows,), "cache_rows", "i32", 4)]
    peer.send_message(forward(welcome, tensors, request=2, cache=NEXT))
    answered(peer, 2, None, "TOO_LARGE", "OVERLOADED", *REFUSED)


def _twice(scene: Scene) -> None:
    peer, welcome = _made(scene)
    for request in (2, 3):
        peer.send_message(forward(welcome, [tensor((1, 1, scene.place.hidden))], request=request, cache=NEXT))
    answered(peer, 3, "UNKNOWN_CACHE", None, *REFUSED)


def _many(scene: Scene) -> None:
    peer, welcome = scene.opened()
    for request in range(1, MANY):
        cache = {**NEW, "name": request}
        peer.send_message(forward(welcome, [tensor((1, ROW, scene.place.hidden))], request=request, cache=cache))
        answered(peer, request, None, "OVERLOADED", *REFUSED)


def _of_others(scene: Scene) -> None:
    peer, _ = scene.opened()
    peer.send_message(forward(scene.victim, [tensor((1, 1, scene.place.hidden))], request=9, cache=NEXT))
    answered(peer, 9, "UNKNOWN_SESSION")


def _released_by_others(scene: Scene) -> None:
    peer, welcome = scene.opened()
    ids = {"session": scene.victim.session, "epoch": scene.victim.epoch}
    peer.send_message(packed(MessageType.RELEASE, {**ids, "step": scene.victim.request}))
    peer.send_message(forward(welcome, [tensor((1, ROW, scene.place.hidden))], request=1))
    answered(peer, 1, None)
