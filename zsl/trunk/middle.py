"""The trunk as a function: activations in, activations out, differentiable, with no state.

The family's own base-model `forward` runs, so masks, rotary embeddings and per-layer attention types are those of
transformers. The activations are put in front of the first layer of the cut, where whatever the model computed
until there (of an empty placeholder) is thrown away; what leaves the last layer of the cut is the result.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from zsl.split.stack import find_stack
from zsl.wire.messages import Cut


@dataclass(frozen=True, slots=True)
class Graph:
    """A forward that can be differentiated: `gradients` uses it up."""

    leaf: torch.Tensor  # [rows, tokens, hidden]
    output: torch.Tensor  # [rows, tokens, hidden]
    nbytes: int  # what it keeps, beside the weights

    def gradients(self, at_output: torch.Tensor) -> torch.Tensor:
        """The vector-Jacobian product `[rows, tokens, hidden]`."""
        (result,) = torch.autograd.grad(self.output, self.leaf, at_output)
        return result


class Middle:
    """Calls a model made by `zsl.split.loading.load_trunk_part`. Not for two threads at once."""

    def __init__(self, model: PreTrainedModel, cut: Cut) -> None:
        self._model = model
        layers = find_stack(model).layers
        first = layers[cut.start]
        self._first_parameter = next(iter(inspect.signature(first.forward).parameters))
        first.register_forward_pre_hook(self._enter, with_kwargs=True)
        layers[cut.stop - 1].register_forward_hook(self._leave)
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._entering: torch.Tensor | None = None
        self._leaving: torch.Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self._model.dtype

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self._model.parameters())

    def __call__(
        self, activations: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """Activations `[rows, tokens, hidden]` to the same; mask `[rows, tokens]`, positions `[rows or 1, tokens]`."""
        placeholder = torch.zeros((), dtype=self.dtype, device=self.device).expand(activations.shape)
        self._entering = activations
        try:
            self._model(
                inputs_embeds=placeholder, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            )
            assert self._leaving is not None
            return self._leaving
        finally:
            self._entering = self._leaving = None

    def graph(
        self, activations: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> Graph:
        """The same, with the autograd graph from input to output, and the memory that the graph keeps."""
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._weights:
                kept[storage.data_ptr()] = storage.nbytes()
            # Detached: a saved output that kept its own history would never be freed.
            return tensor.detach(), tensor._version

        leaf = activations.detach().requires_grad_()
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            output = self(leaf, attention_mask, position_ids)
        return Graph(leaf, output, sum(kept.values()))

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (self._entering, *args[1:]), kwargs
        return args, {**kwargs, self._first_parameter: self._entering}

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self._leaving = output


def _unpack(packed: tuple[torch.Tensor, int]) -> torch.Tensor:
    """Autograd's own check, which its hooks switch off: a tensor that was written since is no basis for a gradient."""
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError("a tensor that the backward needs was modified in place by the model's forward")
    return tensor
