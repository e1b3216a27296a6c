"""Module in the slot of a layer whose weights are not in this process, and the refusal of those weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zsl.errors import ModelError
from zsl.split.ghosts import GhostWeight

MERGE_FIRST = "merge the adapter into the whole model with `zsl merge`, and split that"
FOR_ALL_LAYERS = f'for an adapter of all layers: set layers="all" (of load_client, or in [peft]), or {MERGE_FIRST}'


class NoWeights(nn.Module):
    """Module that raises `ModelError` for any weight given to `load_state_dict`, even with PEFT's `strict=False`.

    It may have the submodules of the layer, with ghosts for weights, so that PEFT finds them at their paths: adapters
    on them are loaded.
    """

    def __init__(self) -> None:
        super().__init__()
        _register_hooks(self)

    def adopt(self, layer: nn.Module) -> None:
        """Take over the submodules and parameters of a layer with ghosts for weights."""
        for name, parameter in layer.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, child in layer.named_children():
            self.add_module(name, child)


def make_ghosts(layer: nn.Module, path: str, device: torch.device) -> None:
    """Replace the parameters of a layer by ghosts on `device`, and drop its buffers."""
    for name, module in layer.named_modules(prefix=path):
        for key, parameter in module.named_parameters(recurse=False):
            element = torch.empty((), dtype=parameter.dtype, device=device)
            module.register_parameter(key, GhostWeight.like(element, parameter.shape, f"{name}.{key}"))
        module._buffers.update(dict.fromkeys(module._buffers))
        _register_hooks(module)


def _register_hooks(module: nn.Module) -> None:
    module.register_state_dict_post_hook(_leave_out_ghosts)
    module.register_load_state_dict_pre_hook(_refuse_weights)


def _leave_out_ghosts(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Remove a module's ghosts from its state dict. A hook of `state_dict`."""
    for name, parameter in module.named_parameters(recurse=False):
        if isinstance(parameter, GhostWeight):
            state_dict.pop(prefix + name, None)


def _refuse_weights(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Raise `ModelError` for weights of the module itself, and for those that no submodule has.

    A pre-hook of `load_state_dict`. Ghosts are added, so that they are not reported as missing.
    """
    for name in state_dict:
        if name.startswith(prefix) and name[len(prefix) :].partition(".")[0] not in module._modules:
            instead = FOR_ALL_LAYERS
            if any(True for _ in module.parameters()):
                instead = "leave out the base model's weights, and give those of an adapter after get_peft_model"
            raise ModelError(f"{name} is of a layer that is not in this process, and would be dropped; {instead}")
    ghosts = module.named_parameters(recurse=False)
    state_dict.update((prefix + name, ghost) for name, ghost in ghosts if isinstance(ghost, GhostWeight))
