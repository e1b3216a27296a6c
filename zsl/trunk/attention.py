"""Attention of a packed pass: many sequences in one row, each attending to itself only.

Registered with transformers' `AttentionInterface`, so every family's own layer code calls it. The mask function
makes one mask per length instead of one for the whole row, which would grow with its square. On CUDA, in half
precision, one call of the flash kernel for sequences of any lengths takes the whole row. While no pass is packed the
functions do what `sdpa` does, except that they avoid the CPU's flash kernel where its backward is slow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

IMPLEMENTATION = "zsl_segments"

# Up to this length the whole matrix of scores is cheaper than the CPU's flash kernel in half precision, whose backward
# is several times slower for short sequences.
MAX_SCORES_LENGTH = 512
# What the CUDA flash kernel takes: Ampere or later, half precision, heads of at most so many features.
VARLEN_CAPABILITY, MAX_VARLEN_DIM = (8, 0), 256


@dataclass(frozen=True, slots=True)
class Group:
    """`count` sequences of `length` tokens, one after the other."""

    count: int
    length: int

    @property
    def tokens(self) -> int:
        return self.count * self.length


@dataclass(frozen=True, slots=True)
class GroupMasks:
    """The mask of a packed pass, from the mask function to the attention function: one for each group.

    A mask is `[1, 1, length, length]`, true where a token is seen, or None for plain causal attention.
    """

    groups: tuple[Group, ...]
    masks: tuple[torch.Tensor | None, ...]
    flash: bool  # whether a flash kernel may be used


_packing: ContextVar[tuple[tuple[Group, ...], bool] | None] = ContextVar("packing", default=None)


def grouped(lengths: Sequence[int]) -> tuple[Group, ...]:
    """The groups of lengths of which equal ones are neighbours."""
    groups: list[Group] = []
    for length in lengths:
        if groups and groups[-1].length == length:
            groups[-1] = Group(groups[-1].count + 1, length)
        else:
            groups.append(Group(1, length))
    return tuple(groups)


@contextmanager
def segments_attention(config: Any, groups: tuple[Group, ...] | None, *, flash: bool = True) -> Iterator[None]:
    """Within it, the model of `config` uses the attention of this file, for a row packed from `groups`.

    Not `flash`: with no kernel whose rounding depends on how many sequences it is given.
    """
    before = config._attn_implementation
    token = _packing.set(None if groups is None else (groups, flash))
    config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = before
        _packing.reset(token)


def flash_is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the flash kernel of `sdpa` is the slower one, so that even requests that run alone should not use it."""
    return device.type == "cpu" and dtype != torch.float32


def _mask(
    batch_size: int, q_length: int, kv_length: int, mask_function: Any = causal_mask_function, **arguments: Any
) -> torch.Tensor | GroupMasks | None:
    """A mask as transformers asks for it, or one for each group of a packed row."""
    packing = _packing.get()
    if packing is None:
        return _whole_mask(batch_size, q_length, kv_length, mask_function=mask_function, **arguments)
    groups, flash = packing
    for irrelevant in ("attention_mask", "q_offset", "kv_offset"):
        arguments.pop(irrelevant, None)
    return GroupMasks(
        groups,
        tuple(_whole_mask(1, group.length, group.length, mask_function=mask_function, **arguments) for group in groups),
        flash,
    )


def _whole_mask(batch: int, queries: int, keys: int, **arguments: Any) -> torch.Tensor | None:
    mask: torch.Tensor | None = sdpa_mask(batch, queries, keys, **arguments)
    return mask


def _attention(
    module: nn.Module,
    query: torch.Tensor,  # [rows, heads, tokens, dim]
    key: torch.Tensor,  # [rows, key heads, tokens, dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | GroupMasks | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as a decoder layer of transformers asks for it: `[rows, tokens, heads, dim]`."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not isinstance(attention_mask, GroupMasks):
        return _attend(query, key, value, attention_mask, scale, causal, softcap, flash=True).transpose(1, 2), None
    plain = softcap is None and causal and all(mask is None for mask in attention_mask.masks)
    if plain and attention_mask.flash and _varlen_takes(query, value):
        return _attend_at_once(query, key, value, attention_mask.groups, scale), None
    outputs, start = [], 0
    for group, mask in zip(attention_mask.groups, attention_mask.masks, strict=True):
        q, k, v = (_rows_of(tensor, start, group) for tensor in (query, key, value))
        attended = _attend(q, k, v, mask, scale, causal, softcap, flash=attention_mask.flash)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
        start += group.tokens
    return torch.cat(outputs).unsqueeze(0), None  # [1, tokens, heads, dim]


def _rows_of(packed: torch.Tensor, start: int, group: Group) -> torch.Tensor:
    """A group's sequences as rows: `[1, heads, all tokens, dim]` to `[count, heads, length, dim]`."""
    part = packed[0, :, start : start + group.tokens]
    rows: torch.Tensor = part.unflatten(1, (group.count, group.length)).transpose(0, 1)
    return rows


def _varlen_takes(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the flash kernel for sequences of any lengths does."""
    dim = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and dim == value.shape[-1] <= MAX_VARLEN_DIM
        and dim % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= VARLEN_CAPABILITY
    )


def _attend_at_once(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: tuple[Group, ...], scale: float
) -> torch.Tensor:
    """Causal attention of all sequences by one kernel: `[1, heads, tokens, dim]` to `[1, tokens, heads, dim]`."""
    starts = _starts(groups, query.device)
    longest = max(group.length for group in groups)
    packed_query, packed_key, packed_value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    attended = varlen_attn(
        packed_query,  # [tokens, heads, dim]
        packed_key,
        packed_value,
        starts,
        starts,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),  # causal
        enable_gqa=key.shape[1] != query.shape[1],
    )
    assert isinstance(attended, torch.Tensor)
    return attended.unsqueeze(0)


@lru_cache(maxsize=64)
def _starts(groups: tuple[Group, ...], device: torch.device) -> torch.Tensor:
    """Where each sequence begins, and where the last one ends: `[sequences + 1]`. All layers of a pass share it."""
    lengths = [group.length for group in groups for _ in range(group.count)]
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    causal: bool,
    softcap: float | None,
    *,
    flash: bool,
) -> torch.Tensor:
    """`[rows, heads, length, dim]`; key and value may have fewer heads."""
    rows, heads, length, dim = query.shape
    slow = flash_is_slow(query.dtype, query.device) and length <= MAX_SCORES_LENGTH
    if flash and softcap is None and not slow:
        attended: torch.Tensor = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal and mask is None and length > 1,
            scale=scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return attended
    key_heads = key.shape[1]
    shared = heads // key_heads  # query heads to a key head: they are more rows of the same product
    # [rows * key heads, shared * length, dim]
    query = query.reshape(rows * key_heads, shared * length, dim)
    key = key.reshape(rows * key_heads, length, dim)
    value = value.reshape(rows * key_heads, length, value.shape[-1])
    if mask is None:
        bias = _bias_without_mask(length, shared, causal, query.dtype, query.device)
    else:
        bias = _bias_of_mask(mask, query.dtype).repeat(1, shared, 1)
        if bias.shape[0] > 1:
            bias = bias.repeat_interleave(key_heads, 0)
    if softcap is None:
        scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale)
    else:
        scores = torch.tanh(torch.bmm(query, key.transpose(1, 2)) * (scale / softcap)) * softcap + bias
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    attended = torch.bmm(weights, value)
    return attended.view(rows, heads, length, -1)


@lru_cache(maxsize=64)
def _bias_without_mask(
    length: int, shared: int, causal: bool, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """0 where a token is seen and -inf where not: `[1, shared * length, length]`."""
    bias = torch.zeros(length, length, dtype=dtype, device=device)
    if causal:
        bias.masked_fill_(torch.ones_like(bias, dtype=torch.bool).triu(1), float("-inf"))
    return bias.repeat(shared, 1).unsqueeze(0)


def _bias_of_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same of a mask `[rows or 1, 1, length, length]`: `[rows or 1, length, length]`."""
    seen = mask | ~mask.any(-1, keepdim=True)  # a token of padding may see nothing; what it computes is never used
    return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(~seen, float("-inf"))[:, 0]


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
