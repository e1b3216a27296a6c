"""The trunk as a function: activations in, activations out, differentiable, with no state.

The family's own base-model `forward` runs, so masks, rotary embeddings and per-layer attention types are those of
transformers. The activations are put in front of the first layer of the cut, where whatever the model computed
until there (of an empty placeholder) is thrown away; what leaves the last layer of the cut is the result.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from zsl.split.stack import find_stack
from zsl.wire.messages import Cut


class Middle:
    """Calls a model made by `zsl.split.loading.load_trunk_part`. Not for two threads at once."""

    def __init__(self, model: PreTrainedModel, cut: Cut) -> None:
        self._model = model
        layers = find_stack(model).layers
        first = layers[cut.start]
        self._first_parameter = next(iter(inspect.signature(first.forward).parameters))
        first.register_forward_pre_hook(self._enter, with_kwargs=True)
        layers[cut.stop - 1].register_forward_hook(self._leave)
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

    def graph_bytes_per_token(self) -> int:
        """The memory that autograd keeps for one token of a forward, measured on a short one."""
        tokens = 32
        weights = {parameter.untyped_storage().data_ptr() for parameter in self._model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        hidden = self._model.config.get_text_config().hidden_size
        activations = torch.zeros(1, tokens, hidden, dtype=self.dtype, device=self.device, requires_grad=True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = self(activations, None, None)
        total = sum(kept.values())
        del output
        return -(-total // tokens)

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (self._entering, *args[1:]), kwargs
        return args, {**kwargs, self._first_parameter: self._entering}

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self._leaving = output
