"""Tensor codec: torch tensors to descriptors and raw buffers, and back, without a copy where safe.

Received tensors have been checked by `frames.decode` (shape, dtype and size agree). Encoding aliases memory: an encoded
tensor must not be written until its message is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch

from zsl.errors import BadDtypeError
from zsl.wire.frames import ALIGNMENT_BYTES, Frame
from zsl.wire.messages import FloatDtypeName, Role, TensorDescriptor, WireDtypeName

TORCH_DTYPES: dict[WireDtypeName, torch.dtype] = {
    "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8,
    "u8": torch.uint8, "bool": torch.bool,
}  # fmt: skip
WIRE_NAMES: dict[torch.dtype, WireDtypeName] = {dtype: name for name, dtype in TORCH_DTYPES.items()}

# libzmq leaves small messages in its read buffer: a tensor that aliases one would keep the whole buffer alive.
READ_BUFFER_BYTES = 8192


def wire_name(dtype: torch.dtype) -> WireDtypeName:
    """Return the wire name of a torch dtype. Raises `BadDtypeError` for one without a wire name."""
    try:
        return WIRE_NAMES[dtype]
    except KeyError:
        raise BadDtypeError(f"{dtype} cannot be sent; use one of {', '.join(map(str, WIRE_NAMES))}") from None


def float_wire_name(dtype: torch.dtype) -> FloatDtypeName:
    """Return the wire name of a floating-point dtype. Raises `BadDtypeError`."""
    for name in get_args(FloatDtypeName):
        if TORCH_DTYPES[name] == dtype:
            found: FloatDtypeName = name
            return found
    raise BadDtypeError(f"activations of {dtype}: one of {', '.join(get_args(FloatDtypeName))} is needed")


def encode_tensor(role: Role, tensor: torch.Tensor) -> tuple[TensorDescriptor, Frame]:
    """Return the descriptor and buffer of a tensor on any device. A contiguous CPU tensor shares its memory.

    Raises `BadDtypeError` for a dtype without a wire name.
    """
    dtype = wire_name(tensor.dtype)
    flat = tensor.detach().cpu().contiguous().view(-1)
    buffer = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    descriptor = TensorDescriptor(role=role, dtype=dtype, shape=tuple(tensor.shape), nbytes=buffer.nbytes)
    return descriptor, buffer


def encode_tensors(tensors: Mapping[Role, torch.Tensor | None]) -> tuple[list[TensorDescriptor], list[Frame]]:
    """Encode each tensor that is not None."""
    pairs = [encode_tensor(role, tensor) for role, tensor in tensors.items() if tensor is not None]
    return [descriptor for descriptor, _ in pairs], [buffer for _, buffer in pairs]


def decode_tensor(descriptor: TensorDescriptor, buffer: Frame) -> torch.Tensor:
    """Return the CPU tensor in a buffer. It shares the buffer's memory if that is writable, aligned and large."""
    dtype = TORCH_DTYPES[descriptor.dtype]
    if descriptor.nbytes == 0:
        return torch.empty(descriptor.shape, dtype=dtype)
    view = memoryview(buffer)
    raw = None if view.readonly or view.nbytes <= READ_BUFFER_BYTES else torch.frombuffer(view, dtype=torch.uint8)
    if raw is None or raw.data_ptr() % ALIGNMENT_BYTES:
        raw = torch.empty(descriptor.nbytes, dtype=torch.uint8)
        # Copied by one thread: torch would use several, and wait for a core that another process uses.
        raw.numpy()[:] = view
    if dtype is torch.bool:
        return raw.ne(0).view(descriptor.shape)  # a byte other than 0 and 1 is no valid bool
    return raw.view(dtype).view(descriptor.shape)
