"""Find embeddings and other base-model weights among the tensors of an adapter.

PEFT writes them for `save_embedding_layers`, `modules_to_save` and `trainable_token_indices`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from zsl.adapters.save import name_prefix

SAVE_BY_ZSL = "save it with zsl.save_adapter, which writes both"
# Names that PEFT may insert between a module's path and the name of its weight.
_WRAPPERS = {"base_layer", "modules_to_save", "original_module", "token_adapter"}


@dataclass(frozen=True)
class OwnWeights:
    """Base-model weights that an adapter's file replaces, by their names in the model.

    `names` has a tied weight under the first of its names. `rows` are the numbers of tokens in embeddings and head.
    `lacking` is the weight of the embedding or head that is missing while the other's is present.
    """

    names: frozenset[str]
    rows: frozenset[int]
    lacking: str | None


def own_weights(tensors: Mapping[str, torch.Tensor], config: Any, model: PreTrainedModel) -> OwnWeights:
    """Find the weights of `model`, which has no PEFT layers yet, among an adapter's tensors."""
    first: dict[torch.Tensor, str] = {}
    names = {name: first.setdefault(weight, name) for name, weight in model.named_parameters(remove_duplicate=False)}
    prefix, kept = name_prefix(config), tuple(getattr(config, "modules_to_save", None) or ())
    found: set[str] = set()
    copies: set[str] = set()
    sizes = {}
    for name, tensor in tensors.items():
        parts = name.removeprefix(prefix).split(".")
        plain = ".".join(part for part in parts if part not in _WRAPPERS)
        if not name.startswith(prefix) or plain not in names:
            continue
        sizes[plain] = len(tensor)
        # A trainable copy is not the weight that another module is tied to.
        if kept and "original_module" not in parts and plain.rpartition(".")[0].endswith(kept):
            copies.add(plain)
        else:
            found.add(names[plain])
    of_tokens = _token_weights(model)
    lacking = [name for name in of_tokens if name not in copies and names[name] not in found]
    rows = frozenset(sizes[name] for name in of_tokens if name in sizes)
    return OwnWeights(frozenset(found | copies), rows, lacking[0] if lacking and rows else None)


def _token_weights(model: PreTrainedModel) -> list[str]:
    """Return the names of the weights of embeddings and head, also if they are tied."""
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    return [f"{name}.weight" for name, module in model.named_modules() if any(module is layer for layer in layers)]


def without_copies(tensors: Mapping[str, torch.Tensor], own: Collection[str]) -> dict[str, torch.Tensor]:
    """Return the tensors without those that PEFT writes twice. `own` has the names of the adapter's weights.

    The file has a trained copy of an embedding under its name in `modules_to_save` too, and the trained tokens of tied
    embeddings under both names.
    """

    def is_copy(name: str) -> bool:
        firsts: list[str] = []
        if name not in own and ".modules_to_save." in name:
            firsts = [name.replace(".modules_to_save.", ".")]
        elif name not in own and ".token_adapter." in name:
            firsts = [other for other in own if ".token_adapter." in other]
        return any(first in tensors and torch.equal(tensors[first], tensors[name]) for first in firsts)

    return {name: tensor for name, tensor in tensors.items() if not is_copy(name)}
