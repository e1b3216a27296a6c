"""Validate the tensors of a request, and decide how it may share a pass.

Pure: checks descriptors and values in NumPy, before conversion to torch.
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
from zsl.trunk.requests.finite import not_finite
from zsl.trunk.settings import TrunkTraits
from zsl.trunk.work import Alone, BehindCache, Buffers, Packed, Shape, Sharing, Stacked
from zsl.wire.adapter_layout import PrefixLayer
from zsl.wire.messages import FLOAT_DTYPES, Limits, Role, TensorDescriptor, UsedCache

_NUMPY_DTYPES = {"i64": np.int64, "i32": np.int32, "i16": np.int16, "i8": np.int8, "u8": np.uint8, "bool": np.uint8}


Integers = np.ndarray[tuple[int, ...], np.dtype[np.integer[Any]]]

_OPTIONAL: set[Role] = {"attention_mask", "position_ids", "lengths"}
_BEHIND_CACHE: set[Role] = {"attention_mask", "position_ids", "cache_rows"}


def check_forward(
    buffers: Buffers,
    hidden_size: int,
    limits: Limits,
    prefix: PrefixLayer | None = None,
    cache: UsedCache | None = None,
) -> Shape:
    """Validate a forward, and return the shape of its activations `[rows, tokens, hidden]`.

    Optional tensors: `attention_mask` `[rows, tokens]` of 0 and 1, `position_ids` `[rows or 1, tokens]`, and
    for a single row `lengths` `[sequences]`, whose sum is its tokens. With a prefix, the mask is `[rows, prefix
    tokens + tokens]`, and the lengths in the shape count it too. With a `cache` there are no lengths, and the mask is
    of the tokens in it too.
    Raises `MalformedError`, `BadShapeError`, `BadDtypeError`, `TooLargeError` or `NonFiniteError`.
    """
    if prefix is not None and cache is not None:
        raise MalformedError("a request with a cache has no prefix")
    _check_roles(buffers, needed={"activations"}, optional=_OPTIONAL if cache is None else _BEHIND_CACHE)
    return _check_inputs(buffers, hidden_size, limits, prefix, cache)


def check_backward(
    buffers: Buffers, held: Shape | None, hidden_size: int, limits: Limits, prefix: PrefixLayer | None = None
) -> Shape:
    """Validate a backward, and return the shape of its gradients: `held`, that of its forward, or that of its own
    activations.

    Gradients may be infinite: a loss scaled for half precision overflows at times, and `GradScaler` has to see it.
    Raises as `check_forward`, and `UnknownStepError` without a held step and activations.
    """
    if "activations" in buffers:
        _check_roles(buffers, needed={"activations", "gradients"}, optional=_OPTIONAL)
        shape = _check_inputs(buffers, hidden_size, limits, prefix)
    else:
        _check_roles(buffers, needed={"gradients"}, optional=set())
        if held is None:
            raise UnknownStepError("no stash is held for this step; send its activations too")
        shape = held
    gradients = buffers["gradients"][0]
    _check_float(gradients)
    if gradients.shape != (shape.rows, shape.tokens, hidden_size):
        raise BadShapeError(
            f"gradients of shape {gradients.shape} for activations of ({shape.rows}, {shape.tokens}, {hidden_size})"
        )
    return shape


def sharing_of(buffers: Buffers, shape: Shape, traits: TrunkTraits) -> Sharing:
    """Decide how a valid request may share a pass of this trunk: packed, stacked, or not at all.

    A request runs alone if it can be neither packed nor stacked, if it is too large to gain from merging, or if
    stacking would break determinism.
    Raises `MalformedError` for lengths if the trunk does not pack.
    """
    has_mask, has_positions, has_lengths = (role in buffers for role in ("attention_mask", "position_ids", "lengths"))
    restarts = not has_mask and not has_lengths and len(shape.lengths) > shape.rows
    packs = traits.packs and (traits.packs_masks or not has_mask) and (traits.packs_restarts or not restarts)
    if has_lengths and not traits.packs:
        raise MalformedError("this trunk does not pack: send rows and their attention_mask instead of lengths")
    if not traits.merges or shape.total_tokens > traits.batch_limits.merge_below_tokens:
        return Alone()
    if packs:
        return Packed()
    if has_lengths or traits.deterministic:
        return Alone()
    return Stacked(shape.tokens, has_mask, has_positions)


def cache_rows(buffers: Buffers, shape: Shape) -> tuple[int, ...] | None:
    """Return the rows of its cache that a forward runs behind; None for all, in order. Raises as `check_forward`."""
    if "cache_rows" not in buffers:
        return None
    rows = _integers(buffers, "cache_rows", {(shape.rows,)}, lowest=0, highest=2**31)
    return tuple(rows.tolist())


def sharing_behind_cache(shape: Shape, traits: TrunkTraits) -> Sharing:
    """Decide how a valid request behind a cache may share a pass. In a deterministic trunk it runs alone."""
    small = shape.total_tokens <= traits.batch_limits.merge_below_tokens
    return BehindCache() if traits.merges_caches and small and not traits.deterministic else Alone()


def _check_roles(buffers: Buffers, *, needed: set[Role], optional: set[Role]) -> None:
    missing, extra = needed - buffers.keys(), buffers.keys() - needed - optional
    if missing or extra:
        wrong = f"lacks {', '.join(sorted(missing))}" if missing else f"has unexpected {', '.join(sorted(extra))}"
        raise MalformedError(f"the request {wrong}")


def _check_inputs(
    buffers: Buffers,
    hidden_size: int,
    limits: Limits,
    prefix: PrefixLayer | None = None,
    cache: UsedCache | None = None,
) -> Shape:
    activations = buffers["activations"][0]
    _check_float(activations)
    if len(activations.shape) != 3 or 0 in activations.shape:
        raise BadShapeError(f"activations of shape {activations.shape}: this trunk needs (rows, tokens, hidden)")
    rows, tokens, hidden = activations.shape
    if hidden != hidden_size:
        raise BadShapeError(f"activations have hidden size {hidden}, this trunk has {hidden_size}")
    keys = tokens if prefix is None else prefix.tokens + tokens  # of a row
    if rows * keys > limits.max_request_tokens:
        raise TooLargeError(
            f"a request of {rows} x {keys} tokens is over {limits.max_request_tokens}; send fewer rows at once, "
            "or start the daemon with more --stash-memory"
        )
    masked: frozenset[int] = frozenset()
    past = 0 if cache is None else cache.length
    if "attention_mask" in buffers:
        mask = _integers(buffers, "attention_mask", {(rows, past + keys)}, lowest=0, highest=1)
        masked = frozenset(np.flatnonzero((mask.reshape(rows, -1) == 0).any(1)).tolist())
    positions = None
    if "position_ids" in buffers:
        shapes: set[tuple[int, ...]] = {(rows, tokens), (1, tokens)}
        positions = _integers(buffers, "position_ids", shapes, lowest=0, highest=limits.max_row_tokens - 1)
    if prefix and ("lengths" in buffers or prefix.rows not in (1, rows)):
        raise BadShapeError(f"a prefix of {prefix.rows} rows needs as many, without lengths; the request has {rows}")
    lengths = (keys,) * rows if prefix or cache else _lengths(buffers, rows, tokens, positions)
    longest = past + max(lengths)
    # Given positions are within the limit, but with a prefix a long row would not be packed.
    if (positions is None or prefix) and longest > limits.max_row_tokens:
        raise TooLargeError(f"sequences of {longest} tokens; this model accepts up to {limits.max_row_tokens}")
    _check_finite(buffers)
    fits_rows = "lengths" in buffers or tokens <= limits.max_row_tokens
    return Shape(rows, tokens, lengths, masked, fits_rows)


def _lengths(buffers: Buffers, rows: int, tokens: int, positions: Integers | None) -> tuple[int, ...]:
    """Return the lengths of the sequences in a request: the stated ones of its single row, or those of its rows.

    Without a mask, a new sequence starts where positions do not increase by one: transformers masks attention across
    such a step (`find_packed_sequence_indices`).
    """
    if "lengths" not in buffers:
        if positions is None or "attention_mask" in buffers:
            return (tokens,) * rows
        steps = np.diff(positions.reshape(-1, tokens).astype(np.int64))
        starts = np.ones((rows, tokens), dtype=bool)
        starts[:, 1:] = steps != 1
        return tuple(np.diff(np.flatnonzero(starts), append=rows * tokens).tolist())
    if rows != 1 or "attention_mask" in buffers:
        raise BadShapeError("lengths need a single row without attention_mask")
    shape = buffers["lengths"][0].shape
    if len(shape) != 1 or not 0 < shape[0] <= tokens:
        raise BadShapeError(f"lengths of shape {shape}: one number per sequence is needed")
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
    """Raise `NonFiniteError`, with the place of the first one, if activations are infinite or NaN."""
    descriptor, buffer = buffers["activations"]
    wrong = not_finite(descriptor.dtype, buffer)
    if wrong:
        rows, tokens, hidden = descriptor.shape
        row, token, _ = np.unravel_index(wrong[0], (rows, tokens, hidden))
        raise NonFiniteError(
            f"{len(wrong)} of the activations are not finite, the first in row {row}, token {token}: look for a "
            "diverging loss, or an overflow of half precision"
        )


def _integers(buffers: Buffers, role: Role, shapes: set[tuple[int, ...]], *, lowest: int, highest: int) -> Integers:
    """Validate a tensor of integers, and return its values, flattened."""
    descriptor, buffer = buffers[role]
    if descriptor.dtype in FLOAT_DTYPES:
        raise BadDtypeError(f"{role} of {descriptor.dtype}: integers are needed")
    if descriptor.shape not in shapes:
        raise BadShapeError(f"{role} of shape {descriptor.shape}: {sorted(shapes)[-1]} is needed")
    values = np.frombuffer(buffer, dtype=_NUMPY_DTYPES[descriptor.dtype])
    if values.size and not (values.min() >= lowest and values.max() <= highest):
        raise BadShapeError(f"{role} has values outside {lowest} to {highest}")
    return values
