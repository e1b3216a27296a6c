"""Build a whole model without memory for its weights, for its modules, their names and their shapes."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from zsl.split.stack import BUILDING, whole_class


def meta_model(config: PreTrainedConfig, *, rows: int | None = None, loadable: Collection[str] = ()) -> PreTrainedModel:
    """Build the causal language model of a configuration, on the CPU, with zeros for weights.

    Each matrix is one number, expanded to the matrix's shape: PEFT adds real adapters to it, which it does not do on
    the meta device. Vectors have memory of their own, because some methods write into them, and so have the parameters
    named in `loadable`. `rows` overrides the vocabulary size.
    """
    config = copy.deepcopy(config)
    if rows is not None:
        config.get_text_config().vocab_size = rows
    with BUILDING, torch.device("meta"):
        model: PreTrainedModel = whole_class(config)._from_config(config, dtype=torch.float32)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            real = f"{path}.{name}" in loadable
            value = torch.zeros(parameter.shape) if real else _zeros(parameter)
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, _zeros(buffer))
    model.tie_weights()
    model.eval()
    return model


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim < 2:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
