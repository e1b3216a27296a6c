"""Initialize random weights that are equal on both sides, each of which builds only its own part.

Each module is initialized from a seed of its own, derived from the module's name. So a layer's weights do not depend
on which other layers are built.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from transformers import PreTrainedModel


def initialize_by_name(model: PreTrainedModel, seed: int) -> None:
    """Initialize every module not marked as initialized, as its model class does, seeded by the module's name.

    The names are those within the base model, so that models with and without a head have equal weights.
    """
    names = {id(module): name for name, module in model.base_model.named_modules()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        _initialize(model, model, "", names, seed)


def _initialize(module: nn.Module, owner: PreTrainedModel, path: str, names: dict[int, str], seed: int) -> None:
    # Children first, as in transformers: a layer may initialize the weights of a child again, with its own scale.
    for name, child in module.named_children():
        child_owner = child if isinstance(child, PreTrainedModel) else owner
        _initialize(child, child_owner, f"{path}.{name}", names, seed)
    name = names.get(id(module), path)
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") % 2**63)
    owner._initialize_weights(module)
