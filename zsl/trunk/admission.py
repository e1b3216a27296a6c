"""Whether a request's tensors are what this trunk takes. Pure: looks at descriptors and values before anything becomes
a torch tensor.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from zsl.errors import (
    BadDtypeError,
    BadShapeError,
    MalformedError,
    NonFiniteError,
    TooLargeError,
    UnknownStepError,
)
from zsl.trunk.work import Buffers, Shape
from zsl.wire.messages import FLOAT_DTYPES, Limits, Role, TensorDescriptor

# What the exponent of an infinity or NaN looks like.
_EXPONENTS = {"f32": (np.uint32, 0x7F80_0000), "f16": (np.uint16, 0x7C00), "bf16": (np.uint16, 0x7F80)}
_NUMPY_DTYPES = {"i64": np.int64, "i32": np.int32, "i16": np.int16, "i8": np.int8, "u8": np.uint8, "bool": np.uint8}


_OPTIONAL: set[Role] = {"attention_mask", "position_ids", "lengths"}


def check_forward(buffers: Buffers, hidden_size: int, limits: Limits) -> Shape:
    """The shape of a forward's activations `[rows, tokens, hidden]`.

    Optional beside them: `attention_mask` `[rows, tokens]` of 0 and 1, `position_ids` `[rows or 1, tokens]`, and
    for one row `lengths` `[sequences]`, which add up to its tokens.
    Raises `MalformedError`, `BadShapeError`, `BadDtypeError`, `TooLargeError` or `NonFiniteError`.
    """
    _check_roles(buffers, needed={"activations"}, optional=_OPTIONAL)
    return _check_inputs(buffers, hidden_size, limits)


def check_backward(buffers: Buffers, held: Shape | None, hidden_size: int, limits: Limits) -> Shape:
    """The shape of a backward's gradients, which is that of its forward: `held`, or the activations beside them.

    Gradients may be infinite: a loss that is scaled for half precision overflows now and then, and its owner's
    `GradScaler` counts on seeing it.
    """
    if "activations" in buffers:
        _check_roles(buffers, needed={"activations", "gradients"}, optional=_OPTIONAL)
        shape = _check_inputs(buffers, hidden_size, limits)
    else:
        _check_roles(buffers, needed={"gradients"}, optional=set())
        if held is None:
            raise UnknownStepError("nothing is held for this step; send the activations along")
        shape = held
    gradients = buffers["gradients"][0]
    _check_float(gradients)
    if gradients.shape != (shape.rows, shape.tokens, hidden_size):
        raise BadShapeError(
            f"gradients of shape {gradients.shape} for activations of ({shape.rows}, {shape.tokens}, {hidden_size})"
        )
    return shape


def merge_key(buffers: Buffers, shape: Shape, *, packs: bool) -> tuple[object, ...] | None:
    """Requests with equal keys can share a pass: packed, whatever their lengths, or else stacked row on row.

    None for one that can share with nobody.
    """
    if packs and shape.packable:
        return ("packed",)
    if "lengths" in buffers:
        return None
    return (shape.tokens, "attention_mask" in buffers, "position_ids" in buffers)


def _check_roles(buffers: Buffers, *, needed: set[Role], optional: set[Role]) -> None:
    missing, extra = needed - buffers.keys(), buffers.keys() - needed - optional
    if missing or extra:
        wrong = f"lacks {', '.join(sorted(missing))}" if missing else f"has no use for {', '.join(sorted(extra))}"
        raise MalformedError(f"the request {wrong}")


def _check_inputs(buffers: Buffers, hidden_size: int, limits: Limits) -> Shape:
    activations = buffers["activations"][0]
    _check_float(activations)
    if len(activations.shape) != 3 or 0 in activations.shape:
        raise BadShapeError(f"activations of shape {activations.shape}: this trunk takes (rows, tokens, hidden)")
    rows, tokens, hidden = activations.shape
    if hidden != hidden_size:
        raise BadShapeError(f"activations have hidden size {hidden}, this trunk has {hidden_size}")
    if rows * tokens > limits.max_request_tokens:
        raise TooLargeError(
            f"a request of {rows} x {tokens} tokens is over {limits.max_request_tokens}; send fewer rows at once"
        )
    lengths = _lengths(buffers, rows, tokens)
    if max(lengths) > limits.max_row_tokens:
        raise TooLargeError(f"rows of {max(lengths)} tokens; this model takes {limits.max_row_tokens}")
    if "attention_mask" in buffers:
        _integers(buffers, "attention_mask", {(rows, tokens)}, lowest=0, highest=1)
    consecutive = True
    if "position_ids" in buffers:
        shapes: set[tuple[int, ...]] = {(rows, tokens), (1, tokens)}
        positions = _integers(buffers, "position_ids", shapes, lowest=0, highest=limits.max_row_tokens - 1)
        # Positions that start again tell sequences apart within a row: transformers masks between them.
        consecutive = bool((np.diff(positions.reshape(-1, tokens).astype(np.int64)) == 1).all())
    _check_finite(buffers)
    if "lengths" in buffers:
        return Shape(rows, tokens, lengths)
    return Shape(rows, tokens, lengths, packable=consecutive and "attention_mask" not in buffers)


def _lengths(buffers: Buffers, rows: int, tokens: int) -> tuple[int, ...]:
    """The lengths of the sequences in a request: its rows, or what it says of its one row."""
    if "lengths" not in buffers:
        return (tokens,) * rows
    if rows != 1 or "attention_mask" in buffers:
        raise BadShapeError("lengths tell apart the sequences of one row, without a mask")
    shape = buffers["lengths"][0].shape
    if len(shape) != 1 or not 0 < shape[0] <= tokens:
        raise BadShapeError(f"lengths of shape {shape}: a number for each sequence is needed")
    lengths = tuple(int(n) for n in _integers(buffers, "lengths", {(shape[0],)}, lowest=1, highest=tokens))
    if sum(lengths) != tokens:
        raise BadShapeError(f"lengths add up to {sum(lengths)}, the activations have {tokens} tokens")
    return lengths


def _check_float(descriptor: TensorDescriptor) -> None:
    if descriptor.dtype not in FLOAT_DTYPES:
        raise BadDtypeError(
            f"{descriptor.role} of {descriptor.dtype}: one of {', '.join(sorted(FLOAT_DTYPES))} is needed"
        )


def _check_finite(buffers: Buffers) -> None:
    """Raises `NonFiniteError`, which says where the first one is."""
    descriptor, buffer = buffers["activations"]
    integer, exponent = _EXPONENTS[descriptor.dtype]
    if descriptor.dtype == "f32":
        # Two passes without memory of their own; a NaN is neither the smallest nor the largest, but comes out of both.
        floats = np.frombuffer(buffer, dtype=np.float32)
        with np.errstate(invalid="ignore"):
            if np.isfinite(floats.min()) and np.isfinite(floats.max()):
                return
    bits = np.frombuffer(buffer, dtype=integer) & integer(exponent)
    wrong = np.flatnonzero(bits == exponent)
    if len(wrong):
        rows, tokens, hidden = descriptor.shape
        row, token, _ = np.unravel_index(wrong[0], (rows, tokens, hidden))
        raise NonFiniteError(
            f"{len(wrong)} of the activations are not finite, the first in row {row}, token {token}: look for a loss "
            "that has run away, or an overflow of half precision"
        )


def _integers(
    buffers: Buffers, role: Role, shapes: set[tuple[int, ...]], *, lowest: int, highest: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.integer[Any]]]:
    """The flat values of a tensor of integers, checked."""
    descriptor, buffer = buffers[role]
    if descriptor.dtype in FLOAT_DTYPES:
        raise BadDtypeError(f"{role} of {descriptor.dtype}: integers are needed")
    if descriptor.shape not in shapes:
        raise BadShapeError(f"{role} of shape {descriptor.shape}: {sorted(shapes)[-1]} is needed")
    values = np.frombuffer(buffer, dtype=_NUMPY_DTYPES[descriptor.dtype])
    if values.size and not (values.min() >= lowest and values.max() <= highest):
        raise BadShapeError(f"{role} has values outside {lowest} to {highest}")
    return values
