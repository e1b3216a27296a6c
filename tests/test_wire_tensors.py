"""The tensor codec: every dtype comes back bit for bit, without a copy where that is safe."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zsl.errors import BadDtypeError
from zsl.wire.messages import DTYPE_BYTES
from zsl.wire.tensors import ALIGNMENT_BYTES, TORCH_DTYPES, decode_tensor, encode_tensor, float_wire_name


def random_tensor(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    """Any bit pattern, NaN and infinities included; for bool 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    elements = torch.Size(shape).numel()
    raw = torch.randint(0, 256, (elements * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape)


@given(st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 99))
def test_a_round_trip_is_the_identity(name: str, shape: list[int], seed: int) -> None:
    tensor = random_tensor(TORCH_DTYPES[name], shape, seed)  # type: ignore[index]
    descriptor, buffer = encode_tensor("activations", tensor)
    back = decode_tensor(descriptor, bytes(buffer))
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    if tensor.numel():
        assert torch.equal(back.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_the_dtype_tables_agree() -> None:
    assert TORCH_DTYPES.keys() == DTYPE_BYTES.keys()
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == DTYPE_BYTES


def test_a_contiguous_tensor_is_sent_from_its_own_memory() -> None:
    tensor = torch.zeros(2, 3)
    _, buffer = encode_tensor("activations", tensor)
    tensor[0, 0] = 1.0
    assert bytes(buffer) == tensor.numpy().tobytes()


def test_a_strided_tensor_is_sent_in_its_own_order() -> None:
    tensor = torch.arange(6.0).view(2, 3).T
    descriptor, buffer = encode_tensor("activations", tensor)
    assert torch.equal(decode_tensor(descriptor, buffer), tensor)


def test_what_is_received_is_writable_and_aligned() -> None:
    """Matrix products round differently on unaligned memory; autograd may write in place."""
    descriptor, _ = encode_tensor("activations", torch.zeros(5))
    storage = torch.zeros(200, dtype=torch.uint8).numpy()
    for offset in range(1, 9):
        tensor = decode_tensor(descriptor, memoryview(storage)[offset : offset + 20])
        assert tensor.data_ptr() % ALIGNMENT_BYTES == 0
        tensor += 1
    decode_tensor(descriptor, bytes(20)).add_(1)


def test_a_byte_that_is_no_bool_is_true() -> None:
    descriptor, _ = encode_tensor("attention_mask", torch.zeros(3, dtype=torch.bool))
    assert decode_tensor(descriptor, b"\x00\x02\xff").tolist() == [False, True, True]


def test_a_dtype_that_does_not_travel_is_refused() -> None:
    with pytest.raises(BadDtypeError, match="float64"):
        encode_tensor("activations", torch.zeros(1, dtype=torch.float64))
    with pytest.raises(BadDtypeError, match="int64"):
        float_wire_name(torch.int64)
