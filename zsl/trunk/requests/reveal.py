"""Check requests for tensors from inside the trunk, and for their gradients. Pure."""

from __future__ import annotations

from math import prod
from typing import get_args

from zsl.errors import BadDtypeError, BadShapeError, MalformedError, NotRevealedError, TooLargeError
from zsl.trunk.settings import TrunkInfo, TrunkTraits
from zsl.trunk.work import Buffers, Shape
from zsl.wire.messages import DTYPE_BYTES, FLOAT_DTYPES, GRADIENTS_OF, Forward, Limits, Reveal


def asked_reveals(header: Forward, info: TrunkInfo) -> tuple[Reveal, ...]:
    """Return what a forward asks to reveal, each once. Raises `NotRevealedError`."""
    asked = tuple(name for name in get_args(Reveal) if name in header.reveal)
    for name in asked:
        _check_allowed(name, info)
    return asked


def check_answer_size(
    reveals: tuple[Reveal, ...], buffers: Buffers, shape: Shape, info: TrunkInfo, traits: TrunkTraits, limits: Limits
) -> int:
    """Return the bytes that an answer to a valid forward reveals. Raises `TooLargeError`."""
    if not reveals:
        return 0
    sizes = [
        prod(_shape_of(name, shape, info, traits)) * DTYPE_BYTES[buffers["activations"][0].dtype] for name in reveals
    ]
    if max(sizes) > limits.max_message_bytes:
        raise TooLargeError(
            f"the trunk would reveal {max(sizes)} bytes, {limits.max_message_bytes} are allowed in a tensor; "
            "send fewer rows at once, or start the daemon with more --stash-memory"
        )
    if not shape.fits_rows:
        raise TooLargeError(f"rows of {shape.tokens} tokens are over the model's positions: the trunk reveals nothing")
    return sum(sizes)


def taken_gradients(buffers: Buffers, info: TrunkInfo) -> Buffers:
    """Remove the gradients of revealed tensors from those of a backward, and return them. Raises `NotRevealedError`."""
    taken: Buffers = {}
    for name, role in GRADIENTS_OF.items():
        if role in buffers:
            _check_allowed(name, info)
            taken[role] = buffers.pop(role)
    return taken


def check_gradients(
    gradients: Buffers, shape: Shape, revealed: tuple[Reveal, ...] | None, info: TrunkInfo, traits: TrunkTraits
) -> tuple[Reveal, ...]:
    """Return the names of the revealed tensors that have gradients, which may be infinite.

    `revealed`: those of the held forward; None without one. Raises `MalformedError`, `BadShapeError`, `BadDtypeError`
    or `TooLargeError`.
    """
    names = tuple(name for name, role in GRADIENTS_OF.items() if role in gradients)
    for name in names:
        role = GRADIENTS_OF[name]
        descriptor, expected = gradients[role][0], _shape_of(name, shape, info, traits)
        if revealed is not None and name not in revealed:
            raise MalformedError(f"{role} for a forward that did not ask for {name}")
        if descriptor.dtype not in FLOAT_DTYPES:
            raise BadDtypeError(f"{role} of {descriptor.dtype}: one of {', '.join(sorted(FLOAT_DTYPES))} is needed")
        if descriptor.shape != expected:
            raise BadShapeError(f"{role} of shape {descriptor.shape}: {expected} is needed")
    if names and not shape.fits_rows:
        raise TooLargeError(f"rows of {shape.tokens} tokens are over the model's positions: the trunk reveals nothing")
    return names


def _check_allowed(name: Reveal, info: TrunkInfo) -> None:
    if name not in info.reveals:
        raise NotRevealedError(
            f"this trunk does not reveal its {name.replace('_', ' ')}; its owner can, with --reveal "
            f"{name.replace('_', '-')}"
        )


def _shape_of(name: Reveal, shape: Shape, info: TrunkInfo, traits: TrunkTraits) -> tuple[int, ...]:
    if name == "hidden_states":
        return (info.cut.stop - info.cut.start - 1, shape.rows, shape.tokens, info.model.hidden_size)
    routers, experts = traits.routers
    return (routers, shape.total_tokens, experts)
