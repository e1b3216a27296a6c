"""Load linear layers in 4 or 8 bits by bitsandbytes, and differentiate them."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_tie_weights
from transformers.quantizers.base import get_keys_to_not_convert

from zsl.errors import ModelError
from zsl.models.reference import ModelReference
from zsl.split.stack import BUILDING, whole_class
from zsl.wire.messages import Quantization

_LAYERS: dict[str, Quantization] = {"Linear4bit": "4bit", "Linear8bitLt": "8bit"}


def quantization_config(
    reference: ModelReference, bits: Quantization, dtype: torch.dtype, auto_class: Any = AutoModelForCausalLM
) -> BitsAndBytesConfig:
    """Return the `quantization_config` that loads linear layers, but not the head, in 4 bits (NF4, as in QLoRA) or 8.

    `auto_class` picks the whole model, which decides what is the head. The layers compute in `dtype`. Raises
    `ModelError` if this model cannot be quantized, or bitsandbytes is missing.
    """
    check_can_be_quantized(reference, bits)
    kept = _kept_modules(reference.config, auto_class)
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def check_can_be_quantized(reference: ModelReference, bits: Quantization) -> None:
    """Raise `ModelError` if this model cannot be quantized, or bitsandbytes is missing. Reads no weights."""
    if reference.location is None:
        raise ModelError(f"{reference.text} has random weights, which are not quantized; name a checkpoint")
    if hasattr(reference.config, "quantization_config"):
        raise ModelError(f"model {reference.text!r} is already quantized; leave out quantize")
    if find_spec("bitsandbytes") is None:
        raise ModelError(f"quantize = {bits!r} needs bitsandbytes: pip install bitsandbytes")


def _kept_modules(config: PreTrainedConfig, auto_class: Any) -> list[str]:
    """Return the modules of a model, and of its base model, that transformers quantizes in no case.

    Found in the whole model as `from_pretrained` builds it, before weights are tied: transformers keeps the module of
    the last parameter too, which for a part of the model is another.
    """
    with BUILDING, no_tie_weights(), torch.device("meta"):
        model: PreTrainedModel = whole_class(config, auto_class)._from_config(copy.deepcopy(config))
    names: list[str] = sorted(get_keys_to_not_convert(model))
    return [*names, *(name.removeprefix(f"{model.base_model_prefix}.") for name in names)]


def keep_as_loaded(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in the first evaluation on a CPU with AVX512-BF16.

    Repacked weights compute in bfloat16 and without gradient, in training too.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            linear: Any = module
            linear.support_avx512bf16_for_cpu = False


def compute_as_in_training(model: nn.Module) -> None:
    """Let 8-bit layers on a CPU multiply with dequantized weights in eval mode too, as they do while they train.

    In eval mode bitsandbytes quantizes their inputs, and does so differently for a token in other company.
    """
    for module in model.modules():
        if bits_of(module) == "8bit":
            module.train()


def bits_of(module: nn.Module) -> Quantization | None:
    """Return the bits of a quantized linear layer; None for another module."""
    return _LAYERS.get(type(module).__name__)


def dequantized(layer: nn.Module) -> torch.Tensor:
    """Return the weight `[out, in]` of a quantized linear layer, as PEFT dequantizes it."""
    from peft.utils.integrations import dequantize_bnb_weight  # imports bitsandbytes, and torch's compiler with it

    linear: Any = layer
    weight: torch.Tensor = dequantize_bnb_weight(linear.weight, state=getattr(linear, "state", None))
    return weight


def gradient_at_input(layer: nn.Module, gradient: torch.Tensor) -> torch.Tensor:
    """Return the vector-Jacobian product of a quantized linear layer `[..., in]`, as bitsandbytes computes it.

    The layer has computed an output before.
    """
    linear: Any = layer
    if bits_of(layer) == "8bit":
        dtype, scale = gradient.dtype, linear.state.SCB.unsqueeze(1).mul(1.0 / 127.0)
        weight: torch.Tensor = linear.state.CB.to(dtype, copy=True).mul_(scale)
    else:
        from bitsandbytes.functional import dequantize_4bit

        dtype = linear.compute_dtype or gradient.dtype
        weight = dequantize_4bit(linear.weight.data.view(-1, 1), linear.weight.quant_state).to(dtype)
    return (gradient.to(dtype) @ weight).to(gradient.dtype)
