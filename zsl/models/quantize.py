"""Configure bitsandbytes quantization of the client's layers. Independent of the cut."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from zsl.errors import ModelError
from zsl.models.reference import ModelReference

Quantization = Literal["4bit", "8bit"]


def quantization_config(reference: ModelReference, bits: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the `quantization_config` that loads linear layers, but not the head, in 4 bits (NF4, as in QLoRA) or 8.

    They compute in `dtype`. Raises `ModelError` if this model cannot be quantized, or bitsandbytes is missing.
    """
    if reference.location is None:
        raise ModelError(f"{reference.text} has random weights, which are not quantized; name a checkpoint")
    if hasattr(reference.config, "quantization_config"):
        raise ModelError(f"model {reference.text!r} is already quantized; leave out quantize")
    if find_spec("bitsandbytes") is None:
        raise ModelError(f"quantize = {bits!r} needs bitsandbytes: pip install bitsandbytes")
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def keep_as_loaded(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in the first evaluation on a CPU with AVX512-BF16.

    Repacked weights compute in bfloat16 and without gradient, in training too.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            linear: Any = module
            linear.support_avx512bf16_for_cpu = False
