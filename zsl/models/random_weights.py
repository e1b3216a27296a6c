"""Random weights that both sides of a split build alike, each only its own part.

Each module's draws start from a seed of its own, made from the module's name. So a layer has the same weights
whichever of its neighbours are built.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from transformers import PreTrainedModel


def initialize_by_name(model: PreTrainedModel, seed: int) -> None:
    """Give every module that is not marked as initialized its model's own initialization, seeded by its name.

    The names are those within the base model, so that a model with and one without a head agree.
    """
    names = {id(module): name for name, module in model.base_model.named_modules()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        _initialize(model, model, "", names, seed)


def _initialize(module: nn.Module, owner: PreTrainedModel, path: str, names: dict[int, str], seed: int) -> None:
    # Children first, as transformers does it: a layer may draw the weights of a child again, with its own scale.
    for name, child in module.named_children():
        child_owner = child if isinstance(child, PreTrainedModel) else owner
        _initialize(child, child_owner, f"{path}.{name}", names, seed)
    name = names.get(id(module), path)
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") % 2**63)
    owner._initialize_weights(module)
