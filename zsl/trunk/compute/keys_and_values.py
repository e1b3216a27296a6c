"""Keys and values of the cut's layers, in cache layers of transformers, so that windows are those of a local model.

Pure torch. A cache is never changed: a request runs on a copy of its layers, which shares the tensors and writes only
behind their tokens. So a failed pass leaves its caches as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from zsl.errors import UnknownCacheError
from zsl.trunk.compute.growing_layers import GrowingLayer, GrowingWindowLayer
from zsl.trunk.compute.passes import Pass, as_rows
from zsl.trunk.costs import CacheMemory
from zsl.wire.messages import Cut


@dataclass(frozen=True, slots=True)
class KeysAndValues:
    """Cache layers of the cut, in order."""

    layers: tuple[Any, ...]

    def behind(self, length: int, rows: Sequence[int] | None) -> KeysAndValues:
        """Copy the first `length` tokens of these rows (None: of all, in order).

        Raises `UnknownCacheError` if a sliding window has left them behind.
        """
        layers = tuple(layer.copied() for layer in self.layers)
        chosen = None if rows is None else torch.tensor(rows)
        for layer in layers:
            if chosen is not None:
                layer.reorder_cache(chosen)
            excess = layer.get_seq_length() - length
            if layer.is_sliding and layer.keys.shape[-2] - excess < min(length, layer.sliding_window - 1):
                raise UnknownCacheError()
            layer.crop(-excess)  # with 0, a window is cut to its size
        return KeysAndValues(layers)

    def in_model(self, cut: Cut, layers: int) -> Cache:
        """Return a cache of all layers of the model, with nothing outside the cut."""
        before, behind = ([DummyLayer() for _ in range(count)] for count in (cut.start, layers - cut.stop))
        return Cache(layers=[*before, *self.layers, *behind])

    def memory(self, rows: int) -> CacheMemory:
        """Return the memory that layers like these take, which hold `rows` of equal length."""
        return CacheMemory(
            tuple(
                (
                    (layer.keys.nbytes + layer.values.nbytes) // (rows * layer.keys.shape[-2]),
                    layer.sliding_window - 1 if layer.is_sliding else None,
                )
                for layer in self.layers
            ),
            has_room=True,
        )


def no_keys_and_values(config: PreTrainedConfig, cut: Cut) -> KeysAndValues | None:
    """Make an empty cache for the cut of a model; None if one of its layers keeps something else."""
    layers = DynamicCache(config=config).layers[cut.start : cut.stop]
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    return KeysAndValues(
        tuple(
            GrowingWindowLayer(layer.sliding_window) if isinstance(layer, DynamicSlidingWindowLayer) else GrowingLayer()
            for layer in layers
        )
    )


@dataclass(slots=True)
class PackedCaches:
    """Caches of requests that share a packed row, each of `shapes` (rows, tokens); `masks`: of all tokens, 2-D.

    For the attention of this pass: `pairs` are the keys and values of each request in the layer that runs, `sized` the
    layers whose sizes were asked last, for a mask.
    """

    caches: tuple[KeysAndValues, ...]
    shapes: tuple[tuple[int, int], ...]
    masks: tuple[torch.Tensor | None, ...]
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    sized: tuple[Any, ...] = ()
    _sizes: list[int] = field(init=False)  # tokens of each request, in all its rows

    def __post_init__(self) -> None:
        self._sizes = [rows * tokens for rows, tokens in self.shapes]

    def in_model(self, cut: Cut, layers: int) -> Cache:
        """Return a cache of all layers of the model, with nothing outside the cut."""
        by_layer = zip(*(cache.layers for cache in self.caches), strict=True)
        return KeysAndValues(tuple(_PackedLayer(self, of_layer) for of_layer in by_layer)).in_model(cut, layers)

    def rows_of(self, packed: torch.Tensor) -> list[torch.Tensor]:
        """Split `[1, heads, all tokens, dim]` into `[rows, heads, tokens, dim]` of each request."""
        parts = packed.split_with_sizes(self._sizes, 2)
        return [
            part if shape[0] == 1 else part[0].unflatten(1, shape).transpose(0, 1)
            for part, shape in zip(parts, self.shapes, strict=True)
        ]

    def in_one_row(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Join `[rows, tokens, heads, dim]` of each request to `[1, all tokens, heads, dim]`."""
        return torch.cat([part if part.shape[0] == 1 else part.flatten(0, 1).unsqueeze(0) for part in parts], 1)


def packed_caches(caches: Sequence[KeysAndValues | None], parts: Sequence[Pass]) -> PackedCaches | None:
    """Return the caches of requests that share a packed row; None if they have none."""
    those = tuple(cache for cache in caches if cache is not None)
    if not those:
        return None
    shapes = tuple((part.rows, part.tokens) for part in parts)
    return PackedCaches(those, shapes, tuple(as_rows(part).attention_mask for part in parts))


class _PackedLayer(DynamicLayer):
    """One layer of the caches in a pass: hands each request's keys and values to its own."""

    def __init__(self, packed: PackedCaches, layers: tuple[Any, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._packed = packed
        self._layers = layers
        self.is_sliding = layers[0].is_sliding  # masks of windows are sized by such a layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new = zip(self._layers, *map(self._packed.rows_of, (key_states, value_states)), strict=True)
        self._packed.pairs = [layer.update(keys, values) for layer, keys, values in new]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        self._packed.sized = self._layers
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0
