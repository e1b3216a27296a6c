"""Replace the modules that a side does not own by modules without weights.

Both sides keep the real transformers class, its configuration and its true layer indices. The client's model has
pass-throughs in place of the trunk's layers (`RemoteTrunk` replaces the first of them), which may have those layers'
modules, with ghosts for weights; the trunk's model has them in place of all other layers, and `Absent` in place of
embeddings and norm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from zsl.errors import ModelError
from zsl.split.ghosts import GhostWeight
from zsl.split.loaded_weights import note_loaded_weights
from zsl.split.no_weights import FOR_ALL_LAYERS, NoWeights, make_ghosts
from zsl.split.stack import Stack, embedding_rows, find_stack, layer_count
from zsl.wire.messages import Cut


class PassThrough(NoWeights):
    """Replace a layer that the other side holds: return the input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        copy_plain_attributes(layer, self)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


class Absent(nn.Module):
    """Replace an embedding, norm or projection that the trunk does not own.

    Activations pass through. Any other input (token ids, positions, a 2-D mask) is for an embedding. The embedding's
    output is overwritten before the trunk's first layer anyway, so it is zeros, for any number of tokens: a mask has
    those of a prefix too.
    """

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.dtype = dtype

    def forward(self, first: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if first.ndim == 3 and first.is_floating_point():
            return first  # [rows, tokens, hidden]
        ones = (1,) * first.ndim  # the shape of a mask behind a cache is not that of the activations
        return torch.zeros((), dtype=self.dtype, device=first.device).expand(*ones, self.hidden_size)


def copy_plain_attributes(source: nn.Module, target: nn.Module) -> None:
    """Copy the string and number attributes of a layer that a model may read, such as `attention_type`."""
    for name, value in vars(source).items():
        if isinstance(value, str | int | float) and name not in vars(target):
            setattr(target, name, value)


def with_hole(cls: type[PreTrainedModel], cut: Cut) -> type[PreTrainedModel]:
    """Return a subclass of `cls` whose instances have pass-throughs in place of the cut's layers.

    They refuse `save_pretrained`, as they lack the trunk.
    """

    def replace(model: PreTrainedModel, stack: Stack) -> None:
        built: Any = model
        built.layers_in_trunk = list(stack.layers[cut.start : cut.stop])  # a list, so that they are no modules of it
        _pass_through(stack, range(cut.start, cut.stop))
        built.embedding_rows = embedding_rows(model)  # resized embeddings are saved with an adapter
        built.loaded_weights = set()
        model.register_load_state_dict_pre_hook(note_loaded_weights)

    made: Any = _subclass(cls, range(cut.start, cut.stop), replace)
    made.save_pretrained = made.push_to_hub = _refuse_to_save
    made.init_continuous_batching = _refuse_continuous_batching
    made.load_adapter = _load_adapter
    # Read by DistributedDataParallel, which would send these to the other processes.
    made._ddp_params_and_buffers_to_ignore = property(_names_of_ghosts)
    split: type[PreTrainedModel] = made
    return split


def trunk_slots(stack: Stack) -> list[int]:
    """Return the indices of the layers that are in the trunk, of a client's model."""
    return [index for index, layer in enumerate(stack.layers) if isinstance(layer, NoWeights)]


def empty_slots(stack: Stack) -> list[int]:
    """Return the indices of the layers that are in the trunk, and whose modules are not in this model."""
    return [index for index in trunk_slots(stack) if not any(True for _ in stack.layers[index].parameters())]


def put_ghosts(model: PreTrainedModel) -> None:
    """Give the pass-throughs of a model of `with_hole` the modules of the trunk's layers, with ghosts for weights."""
    stack = find_stack(model)
    built: Any = model
    for index, layer in zip(trunk_slots(stack), built.layers_in_trunk, strict=True):
        make_ghosts(layer, f"{stack.name}.{index}", model.device)
        slot: Any = stack.layers[index]
        slot.adopt(layer.train(model.training))


def middle_only(cls: type[PreTrainedModel], config: PreTrainedConfig, cut: Cut) -> type[PreTrainedModel]:
    """Return a subclass of the base-model class `cls` whose instances have parameters in the cut's layers only."""
    outside = [index for index in range(layer_count(config)) if not cut.start <= index < cut.stop]
    hidden_size = config.get_text_config().hidden_size

    def replace(model: PreTrainedModel, stack: Stack) -> None:
        _pass_through(stack, outside)
        path = stack.name.split(".")
        for depth, name_on_path in enumerate(path):
            parent = model.get_submodule(".".join(path[:depth]))
            for name, child in list(parent.named_children()):
                if name != name_on_path and any(True for _ in child.parameters()):
                    setattr(parent, name, Absent(hidden_size, model.dtype))

    made = _subclass(cls, outside, replace)
    made._keys_to_ignore_on_load_unexpected = [".*"]  # missing keys are checked instead
    return made


def _subclass(cls: type[PreTrainedModel], indices: Iterable[int], replace: Any) -> type[PreTrainedModel]:
    """Return a subclass of `cls` with the same name, whose constructor calls `replace(model, stack)`.

    `from_pretrained` builds it on the meta device, so the replaced modules never have memory; their weights in the
    checkpoint are ignored.
    """

    def build(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        stack = find_stack(self)
        replace(self, stack)
        pattern = layers_pattern(stack.leaf_name, indices)
        self._keys_to_ignore_on_load_unexpected = {*(self._keys_to_ignore_on_load_unexpected or ()), pattern}

    return type(cls.__name__, (cls,), {"__init__": build, "__module__": cls.__module__, "__doc__": cls.__doc__})


def layers_pattern(leaf_name: str, indices: Iterable[int]) -> str:
    """Return a regular expression for the tensor names of these layers in a checkpoint, with any prefix."""
    return rf"(^|\.){re.escape(leaf_name)}\.({'|'.join(map(str, indices))})\."


def _refuse_to_save(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    raise ModelError(
        "a split model is not saved as a checkpoint: it lacks the trunk's layers, and loading it would put random ones "
        "in their places. Save its adapter with zsl.save_adapter, and convert that for use without zsl "
        "with `zsl export` or `zsl merge`. Without PEFT: save model.state_dict() with safetensors, and give a Trainer "
        "save_strategy='no'"
    )


def _names_of_ghosts(self: PreTrainedModel) -> list[str]:
    """Return the names of ghosts in this model, and in a PEFT model of it."""
    names = [name for name, parameter in self.named_parameters() if isinstance(parameter, GhostWeight)]
    return [*names, *(f"base_model.model.{name}" for name in names)]


def _load_adapter(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Load an adapter as transformers does, and raise `ModelError` for weights that match no module."""
    before = set(getattr(self, "peft_config", ()))
    loaded = super(type(self), self).load_adapter(*args, **kwargs)
    if lost := sorted(loaded.unexpected_keys):
        for name in set(getattr(self, "peft_config", ())) - before:
            self.delete_adapter(name)
        raise ModelError(
            f"{lost[0]} is of a layer that is not in this process, or matches no module, and would be dropped; "
            f"{FOR_ALL_LAYERS}"
        )
    return loaded


def _refuse_continuous_batching(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    raise ModelError(
        "continuous batching (generate_batch) is not supported by a split model, whose trunk has no pages of keys and "
        "values. Use generate; for TRL set use_transformers_continuous_batching=False"
    )


def _pass_through(stack: Stack, indices: Iterable[int]) -> None:
    for index in indices:
        stack.layers[index] = PassThrough(stack.layers[index])
