"""Bottom and top in fewer bits, by bitsandbytes through transformers. Knows no cut."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from zsl.errors import ModelError
from zsl.models.reference import ModelReference

Quantization = Literal["4bit", "8bit"]


def quantization_config(reference: ModelReference, bits: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What `from_pretrained` takes to load linear layers, but not the head, in 4 bits (NF4, as QLoRA has it) or 8.

    They compute in `dtype`. Raises `ModelError` if this model cannot be quantized, or nothing is there to do it.
    """
    if reference.location is None:
        raise ModelError(f"{reference.text} has random weights, which are made and not loaded; quantize a checkpoint")
    if hasattr(reference.config, "quantization_config"):
        raise ModelError(f"model {reference.text!r} is quantized already; leave out quantize")
    if find_spec("bitsandbytes") is None:
        raise ModelError(f"quantize = {bits!r} needs bitsandbytes: pip install bitsandbytes")
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def keep_as_loaded(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew in the first evaluation on a CPU that has AVX512-BF16.

    From then on they would compute in bfloat16 and without gradient, in training too.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            linear: Any = module
            linear.support_avx512bf16_for_cpu = False
