"""Keys and values of the cut's layers, in transformers' own cache layers, so that windows are those of a local model.

Pure torch. A cache is never changed: a request runs on a copy of its layers, which shares the tensors, as transformers
replaces those and does not write into them. So a failed pass leaves its caches as they were.
"""

from __future__ import annotations

import copy
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
        layers = tuple(copy.copy(layer) for layer in self.layers)
        for layer in layers:
            if rows is not None:
                layer.reorder_cache(torch.tensor(rows))
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
            )
        )


def no_keys_and_values(config: PreTrainedConfig, cut: Cut) -> KeysAndValues | None:
    """Make an empty cache for the cut of a model; None if one of its layers keeps something else."""
    layers = DynamicCache(config=config).layers[cut.start : cut.stop]
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    for layer in layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.activate_past_recording()  # so that the tokens of the last request can be taken back
    return KeysAndValues(tuple(layers))


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

    def in_model(self, cut: Cut, layers: int) -> Cache:
        """Return a cache of all layers of the model, with nothing outside the cut."""
        by_layer = zip(*(cache.layers for cache in self.caches), strict=True)
        return KeysAndValues(tuple(_PackedLayer(self, of_layer) for of_layer in by_layer)).in_model(cut, layers)

    def rows_of(self, packed: torch.Tensor) -> list[torch.Tensor]:
        """Split `[1, heads, all tokens, dim]` into `[rows, heads, tokens, dim]` of each request."""
        parts = packed[0].split([rows * tokens for rows, tokens in self.shapes], dim=1)
        return [part.unflatten(1, shape).transpose(0, 1) for part, shape in zip(parts, self.shapes, strict=True)]


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
