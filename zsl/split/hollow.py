"""A whole model that takes no memory: for what asks for its modules, their names and shapes, and for no weights."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from zsl.split.stack import causal_lm_class


def hollow_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model of a configuration, on the CPU, with zeros for weights.

    Each matrix is one number, seen as often as there are elements: PEFT puts real adapters beside it, as it does not
    on the meta device. Vectors have memory of their own, as some methods write into them.
    """
    with torch.device("meta"):
        model: PreTrainedModel = causal_lm_class(config)._from_config(copy.deepcopy(config), dtype=torch.float32)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(_zeros(parameter), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, _zeros(buffer))
    model.tie_weights()
    model.eval()
    return model


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim < 2:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
