"""Find a prefix: keys and values that a call gives in front of those of each layer, as PEFT's prefix tuning does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Cache

from zsl.client.trunk_cache import TRUNK_CACHE
from zsl.errors import ModelError

# Keys and values, each [rows, heads, tokens, dim], or of one row if all have the same, by index of the layer.
Prefix = Mapping[int, tuple[torch.Tensor, torch.Tensor]]


def find_prefix(past_key_values: Any, layers: range) -> Prefix | None:
    """Return the prefix of `layers`, with autograd's graph; None if the cache is empty, no cache, or a generation's.

    Raises `ModelError` if the cache is not as long in all layers.
    """
    if not isinstance(past_key_values, Cache) or not past_key_values.get_seq_length():
        return None
    cached: Any = past_key_values.layers
    if len(cached) > layers.start and hasattr(cached[layers.start], TRUNK_CACHE):
        return None
    found = [_keys_and_values(layer) for layer in past_key_values.layers]
    shapes = {tensor.shape for pair in found for tensor in pair}
    if len(found) < layers.stop or len(shapes) != 1 or past_key_values.get_seq_length() != found[0][0].shape[-2]:
        raise _refused(
            "a prefix needs keys and values of the same heads, tokens and size for every layer, and the trunk keeps "
            "none of an earlier call"
        )
    of_trunk = {index: found[index] for index in layers}
    # Those of PEFT's encoder with a projection differ by rounding.
    repeated = [(tensor == tensor[:1]).all() for pair in of_trunk.values() for tensor in pair]
    if torch.stack(repeated).all():
        return {index: (keys[:1], values[:1]) for index, (keys, values) in of_trunk.items()}
    return of_trunk


def prefix_tokens(prefix: Prefix | None) -> int:
    """Return the number of tokens in front of each row."""
    return next(iter(prefix.values()))[0].shape[2] if prefix else 0


def _keys_and_values(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None:
        raise _refused("a prefix needs keys and values for every layer")
    return keys, values


def _refused(why: str) -> ModelError:
    return ModelError(
        f"past_key_values cannot cross to the trunk: {why}; give those of PEFT's PrefixTuningConfig, or none"
    )
