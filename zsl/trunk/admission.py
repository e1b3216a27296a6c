"""Whether a request's tensors are what this trunk takes. Pure: looks at descriptors, and at the values of masks and
positions, before anything becomes a torch tensor.
"""

from __future__ import annotations

import numpy as np

from zsl.errors import BadDtypeError, BadShapeError, MalformedError, TooLargeError, UnknownStepError
from zsl.trunk.work import Buffers, Shape
from zsl.wire.messages import FLOAT_DTYPES, Limits, Role, TensorDescriptor

_NUMPY_DTYPES = {"i64": np.int64, "i32": np.int32, "i16": np.int16, "i8": np.int8, "u8": np.uint8, "bool": np.uint8}


def check_forward(buffers: Buffers, hidden_size: int, limits: Limits) -> Shape:
    """The shape of a forward's activations `[rows, tokens, hidden]`.

    Optional beside them: `attention_mask` `[rows, tokens]` of 0 and 1, `position_ids` `[rows or 1, tokens]`.
    Raises `MalformedError`, `BadShapeError`, `BadDtypeError` or `TooLargeError`.
    """
    _check_roles(buffers, needed={"activations"}, optional={"attention_mask", "position_ids"})
    return _check_inputs(buffers, hidden_size, limits)


def check_backward(buffers: Buffers, held: Shape | None, hidden_size: int, limits: Limits) -> Shape:
    """The shape of a backward's gradients, which is that of its forward: `held`, or the activations beside them."""
    if "activations" in buffers:
        _check_roles(buffers, needed={"activations", "gradients"}, optional={"attention_mask", "position_ids"})
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


def row_merge_key(buffers: Buffers, shape: Shape) -> tuple[object, ...]:
    """Requests with equal keys can be stacked row on row."""
    return (shape.tokens, buffers["activations"][0].dtype, "attention_mask" in buffers, "position_ids" in buffers)


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
    if tokens > limits.max_row_tokens:
        raise TooLargeError(f"rows of {tokens} tokens; this model takes {limits.max_row_tokens}")
    if rows * tokens > limits.max_request_tokens:
        raise TooLargeError(
            f"a request of {rows} x {tokens} tokens is over {limits.max_request_tokens}; send fewer rows at once"
        )
    shape = Shape(rows, tokens)
    if "attention_mask" in buffers:
        _check_integers(buffers, "attention_mask", {(rows, tokens)}, highest=1)
    if "position_ids" in buffers:
        _check_integers(buffers, "position_ids", {(rows, tokens), (1, tokens)}, highest=limits.max_row_tokens - 1)
    return shape


def _check_float(descriptor: TensorDescriptor) -> None:
    if descriptor.dtype not in FLOAT_DTYPES:
        raise BadDtypeError(
            f"{descriptor.role} of {descriptor.dtype}: one of {', '.join(sorted(FLOAT_DTYPES))} is needed"
        )


def _check_integers(buffers: Buffers, role: Role, shapes: set[tuple[int, int]], *, highest: int) -> None:
    descriptor, buffer = buffers[role]
    if descriptor.dtype in FLOAT_DTYPES:
        raise BadDtypeError(f"{role} of {descriptor.dtype}: integers are needed")
    if descriptor.shape not in shapes:
        raise BadShapeError(f"{role} of shape {descriptor.shape}: {sorted(shapes)[-1]} is needed")
    values = np.frombuffer(buffer, dtype=_NUMPY_DTYPES[descriptor.dtype])
    if values.size and not (values.min() >= 0 and values.max() <= highest):
        raise BadShapeError(f"{role} has values outside 0 to {highest}")
