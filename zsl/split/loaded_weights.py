"""Record which weights of a split model `load_state_dict` changes. Imports no PEFT, which a daemon never needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from zsl.split.ghosts import GhostWeight


def note_loaded_weights(model: Any, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    """Record the names of a split model's weights that `load_state_dict` is going to change.

    A pre-hook of `load_state_dict`, which PEFT calls with an adapter file that may hold weights of the base model.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        new: Any = state_dict.get(prefix + name)
        known = not isinstance(parameter, GhostWeight) and not parameter.is_meta  # adapters are loaded on meta
        fits = isinstance(new, torch.Tensor) and new.shape == parameter.shape
        if known and fits and not torch.equal(new.to(parameter), parameter.detach()):
            model.loaded_weights.add(plain_name(name))


def plain_name(name: str) -> str:
    """Return the name of a weight without the `base_layer` that PEFT inserts."""
    return ".".join(part for part in name.split(".") if part != "base_layer")
