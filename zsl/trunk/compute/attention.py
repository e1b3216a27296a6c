"""Attention of a packed pass: many sequences in one row, each attending to itself only.

Registered with transformers' `AttentionInterface`, so every family's own layer code calls it. Sequences of equal length
become rows, and are passed to the family's own attention and mask functions, which handle padding, windows, soft caps
and sinks. Two kernels replace its `sdpa`: on CUDA, in half precision, one call of the variable-length flash kernel; on
a CPU, an explicit matrix of scores where the flash kernel is slow, or rounds differently by the other rows of a pass.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from zsl.trunk.compute.attention_by_scores import Biases, attend_by_scores
from zsl.trunk.compute.keys_and_values import PackedCaches

IMPLEMENTATION = "zsl_segments"

# Up to this length the matrix of scores is faster than the CPU's flash kernel in half precision, whose backward is
# several times slower for short sequences.
MAX_SCORES_LENGTH = 512
# Requirements of the CUDA flash kernel, beside half precision: compute capability (Ampere), and largest head size.
VARLEN_CAPABILITY, MAX_VARLEN_DIM = (8, 0), 256


@dataclass(frozen=True, slots=True)
class Group:
    """`count` sequences of `length` tokens; `masked`: each has masked tokens."""

    length: int
    masked: bool
    count: int

    @property
    def tokens(self) -> int:
        return self.count * self.length


@dataclass(frozen=True, slots=True)
class Layout:
    """Groups of equal-length sequences in a packed row.

    `order` permutes the tokens of the row to the order of the groups, `back` is its inverse; both None if the row is
    ordered already. `seen` is False for masked tokens, in the order of the groups.
    """

    groups: tuple[Group, ...]
    order: torch.Tensor | None  # [tokens]
    back: torch.Tensor | None  # [tokens]
    seen: torch.Tensor | None  # [tokens], bool
    invariant: bool  # forbid kernels whose rounding depends on the rest of the pass


@dataclass(frozen=True, slots=True)
class GroupMasks:
    """Masks of a packed pass, one per group from the family's mask function, passed on to the attention function."""

    layout: Layout
    masks: tuple[torch.Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class CacheMasks:
    """Masks of a pass of requests behind caches, one per request from the family's mask function."""

    packed: PackedCaches
    masks: tuple[torch.Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class _Active:
    own: str  # attention implementation of the family
    layout: Layout | PackedCaches | None  # None: unpacked rows
    # Shared by all layers of a pass, and freed with it: those of a long row would be memory that no session accounts
    # for.
    biases: Biases = field(default_factory=dict)
    starts: list[torch.Tensor] = field(default_factory=list)


_active: ContextVar[_Active] = ContextVar("active")


def layout_of(
    lengths: Sequence[int],
    masked: frozenset[int] = frozenset(),
    seen: torch.Tensor | None = None,
    *,
    invariant: bool = False,
    device: torch.device | str = "cpu",
) -> Layout:
    """Group the sequences of a row by length and presence of masked tokens (`masked`: their indices).

    `seen` `[tokens]`: False for masked tokens.
    """
    kinds = [(length, index in masked) for index, length in enumerate(lengths)]
    counts = Counter(kinds)
    groups = tuple(Group(length, has_mask, counts[length, has_mask]) for length, has_mask in sorted(counts))
    if all(before <= after for before, after in pairwise(kinds)):
        return Layout(groups, None, None, seen, invariant)
    starts = list(accumulate(lengths, initial=0))
    by_kind = torch.tensor(sorted(range(len(kinds)), key=kinds.__getitem__))
    sorted_lengths = torch.tensor(lengths)[by_kind]
    # Source index of each token of the sorted row: its own index plus the shift of its sequence.
    moved = torch.tensor(starts[:-1])[by_kind] - (sorted_lengths.cumsum(0) - sorted_lengths)
    order = (torch.arange(starts[-1]) + moved.repeat_interleave(sorted_lengths)).to(device)
    return Layout(groups, order, order.argsort(), None if seen is None else seen[order], invariant)


@contextmanager
def segments_attention(config: Any, layout: Layout | PackedCaches | None) -> Iterator[None]:
    """Make the model of `config` use this module's attention: for a packed row of this layout, or of requests behind
    caches, or for unpacked rows."""
    own = config._attn_implementation
    token = _active.set(_Active(own, layout))
    config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = own
        _active.reset(token)


def flash_is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the flash kernel of `sdpa` is slow here, so that unpacked requests avoid it too."""
    return device.type == "cpu" and dtype != torch.float32


def _mask(
    batch_size: int, q_length: int, kv_length: int, **arguments: Any
) -> torch.Tensor | GroupMasks | CacheMasks | None:
    """Mask function for transformers: the family's own mask, or one per group or request of a packed row."""
    active = _active.get()
    own: Callable[..., torch.Tensor | None] = ALL_MASK_ATTENTION_FUNCTIONS[active.own]
    if active.layout is None:
        return own(batch_size, q_length, kv_length, **arguments)
    for of_the_row in ("attention_mask", "q_offset", "kv_offset"):
        arguments.pop(of_the_row, None)
    if isinstance(active.layout, PackedCaches):
        return _masks_behind_caches(own, active.layout, arguments)
    masks, start = [], 0
    for group in active.layout.groups:
        rows, seen = 1, None
        if group.masked:
            assert active.layout.seen is not None
            rows = group.count
            seen = active.layout.seen[start : start + group.tokens].view(rows, group.length)
        masks.append(own(rows, group.length, group.length, attention_mask=seen, **arguments))
        start += group.tokens
    return GroupMasks(active.layout, tuple(masks))


def _attention(
    module: nn.Module,
    query: torch.Tensor,  # [rows, heads, tokens, dim]
    key: torch.Tensor,  # [rows, key heads, tokens, dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | GroupMasks | CacheMasks | None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for transformers. Returns `[rows, tokens, heads, dim]`, and no weights."""
    if isinstance(attention_mask, CacheMasks):
        return _attend_behind_caches(module, query, attention_mask, **arguments), None
    if not isinstance(attention_mask, GroupMasks):
        return _attend(module, query, key, value, attention_mask, invariant=False, **arguments), None
    layout, masks = attention_mask.layout, attention_mask.masks
    if layout.order is not None:
        query, key, value = (tensor[:, :, layout.order] for tensor in (query, key, value))
    if all(mask is None for mask in masks) and not layout.invariant and _varlen_takes(module, query, value, arguments):
        attended = _attend_at_once(query, key, value, layout.groups, _scale(query, arguments))
    else:
        outputs, start = [], 0
        for group, mask in zip(layout.groups, masks, strict=True):
            q, k, v = (_rows_of(tensor, start, group) for tensor in (query, key, value))
            outputs.append(_attend(module, q, k, v, mask, invariant=layout.invariant, **arguments).flatten(0, 1))
            start += group.tokens
        attended = torch.cat(outputs)  # [tokens, heads, dim]
    if layout.back is not None:
        attended = attended[layout.back]
    return attended.unsqueeze(0), None


def _masks_behind_caches(
    own: Callable[..., torch.Tensor | None], packed: PackedCaches, arguments: dict[str, Any]
) -> CacheMasks:
    """Make the family's mask of each request, from the sizes of the layer that was asked for them last."""
    masks = []
    for layer, (rows, tokens), seen in zip(packed.sized, packed.shapes, packed.masks, strict=True):
        kv_length, kv_offset = layer.get_mask_sizes(tokens)
        where = {"q_offset": layer.get_seq_length(), "kv_offset": kv_offset}
        mask = None if seen is None else seen.bool()  # as transformers passes it
        masks.append(own(rows, tokens, kv_length, attention_mask=mask, **where, **arguments))
    return CacheMasks(packed, tuple(masks))


def _attend_behind_caches(
    module: nn.Module, query: torch.Tensor, attention_mask: CacheMasks, **arguments: Any
) -> torch.Tensor:
    """Compute attention of each request to its own keys and values: `[1, tokens, heads, dim]`."""
    packed = attention_mask.packed
    each = zip(packed.rows_of(query), packed.pairs, attention_mask.masks, strict=True)
    return packed.in_one_row([_attend(module, q, k, v, mask, invariant=False, **arguments) for q, (k, v), mask in each])


def _rows_of(packed: torch.Tensor, start: int, group: Group) -> torch.Tensor:
    """Reshape a group's sequences to rows: `[1, heads, all tokens, dim]` to `[count, heads, length, dim]`."""
    part = packed[0, :, start : start + group.tokens]
    rows: torch.Tensor = part.unflatten(1, (group.count, group.length)).transpose(0, 1)
    return rows


def _attend(
    module: nn.Module,
    query: torch.Tensor,  # [rows, heads, length, dim]
    key: torch.Tensor,  # [rows, key heads, length, dim]; longer behind a cache
    value: torch.Tensor,
    mask: torch.Tensor | None,  # from the family's mask function
    *,
    invariant: bool,
    **arguments: Any,
) -> torch.Tensor:
    """Compute attention of rows, by the family's function or the matrix of scores: `[rows, length, heads, dim]`."""
    own = _active.get().own
    slow = flash_is_slow(query.dtype, query.device) and query.shape[2] == key.shape[2] <= MAX_SCORES_LENGTH
    if own == "sdpa" and (invariant or slow) and arguments.get("position_bias") is None:
        causal = _is_causal(module, arguments)
        scale, biases = _scale(query, arguments), _active.get().biases
        return attend_by_scores(query, key, value, mask, scale, causal, biases).transpose(1, 2)
    attended: torch.Tensor
    if own == "eager":
        # The default function in the family's modeling file.
        attended, _ = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"](
            module, query, key, value, mask, **arguments
        )
    else:
        attended, _ = ALL_ATTENTION_FUNCTIONS[own](module, query, key, value, mask, **arguments)
    return attended


def _scale(query: torch.Tensor, arguments: dict[str, Any]) -> float:
    scaling: float | None = arguments.get("scaling")
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def _is_causal(module: nn.Module, arguments: dict[str, Any]) -> bool:
    causal: bool | None = arguments.get("is_causal")
    return getattr(module, "is_causal", True) if causal is None else causal


def _varlen_takes(module: nn.Module, query: torch.Tensor, value: torch.Tensor, arguments: dict[str, Any]) -> bool:
    """Return whether the variable-length flash kernel computes the same as the family's attention."""
    return (
        _active.get().own == "sdpa"
        and arguments.get("position_bias") is None
        and _is_causal(module, arguments)
        and _kernel_takes(query, value)
    )


def _kernel_takes(query: torch.Tensor, value: torch.Tensor) -> bool:
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
    """Compute causal attention of all sequences in one kernel: `[1, heads, tokens, dim]` to `[tokens, heads, dim]`."""
    shared = _active.get().starts
    if not shared:
        shared.append(_starts(groups, query.device))
    (starts,) = shared
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
    return attended


def _starts(groups: tuple[Group, ...], device: torch.device) -> torch.Tensor:
    """Return the start index of each sequence and the end of the last, `[sequences + 1]`, int32."""
    lengths = [group.length for group in groups for _ in range(group.count)]
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
