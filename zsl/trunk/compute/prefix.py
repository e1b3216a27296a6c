"""Keys and values of a prefix, in front of those of a pass's own tokens, as a cache of transformers.

The family's own model takes them from the cache, so masks, windows and positions are those of a local model that PEFT
gives a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Cache

KeysAndValues = tuple[torch.Tensor, torch.Tensor]  # each [rows, heads, tokens, dim]


@dataclass(frozen=True, slots=True)
class LayerPrefix:
    """Prefix of one layer. The tensors are leaves of autograd."""

    keys: torch.Tensor  # [rows or 1 * tokens, heads * dim]
    values: torch.Tensor  # [rows or 1 * tokens, heads * dim]
    tokens: int
    heads: int


class _FixedCache(Cache):
    """Cache of `tokens` in front of each row. Stays as it is, so a layer may be called any number of times."""

    def __init__(self, tokens: int) -> None:
        super().__init__(layers=[])
        self._tokens = tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._tokens + query_length, 0


class PrefixCache(_FixedCache):
    """A prefix in front of each row. `layers`: their prefixes, by index. `trains`: they need gradients."""

    def __init__(self, layers: Mapping[int, LayerPrefix], *, trains: bool) -> None:
        super().__init__(next(iter(layers.values())).tokens)
        self._prefixes = layers
        self._trains = trains

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeysAndValues:
        """Return a layer's keys and values behind those of its prefix."""
        prefix = self._prefixes[layer_idx]
        return (
            self._in_front(prefix.keys, prefix.heads, key_states),
            self._in_front(prefix.values, prefix.heads, value_states),
        )

    def _in_front(self, weight: torch.Tensor, heads: int, states: torch.Tensor) -> torch.Tensor:
        """Put a weight in front of each row of states. The rows' gradients are added up as in the embedding of PEFT's
        encoder: in their order, in single precision."""
        if not self._trains:
            weight = weight.detach()
        rows = states.shape[0]
        index = torch.arange(len(weight), device=weight.device).view(-1, self._tokens).expand(rows, -1)
        front = F.embedding(index, weight.float()).to(states.dtype)
        return torch.cat([front.view(rows, self._tokens, heads, -1).transpose(1, 2), states], dim=-2)


class SeenKeys(_FixedCache):
    """Cache of one token of zeros that notes the heads of each layer's keys and their size, if its values have the
    same."""

    def __init__(self) -> None:
        super().__init__(1)
        self.sizes: dict[str, tuple[int, int]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeysAndValues:
        """Return a layer's keys and values behind zeros."""
        if key_states.ndim == 4 and key_states.shape == value_states.shape:
            self.sizes[str(layer_idx)] = key_states.shape[1], key_states.shape[3]
        return F.pad(key_states, (0, 0, 1, 0)), F.pad(value_states, (0, 0, 1, 0))
