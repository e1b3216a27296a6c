"""Tiny models of many families, written to disk as a user's checkpoint would be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from zsl.models.loading import load_whole
from zsl.models.reference import resolve
from zsl.split.stack import find_stack

LAYERS = 6
CUT = "2:4"
VOCABULARY = 211
POSITIONS = 64

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8, "sliding_window": 8}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CONFIGS: dict[str, dict[str, object]] = {
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": POSITIONS,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 8},
    "qwen3": {**_GROUPED, "head_dim": 8},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": _GROUPED,
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "dropout": 0.0,
    },
    "gpt_neox": _SIZES,
    "xglm": {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "num_layers": LAYERS,
        "attention_heads": 4,
        "ffn_dim": 64,
        "max_position_embeddings": POSITIONS,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "biogpt": {**_SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "llama4_text": {
        **_GROUPED,
        "head_dim": 8,
        "intermediate_size_mlp": 64,
        "num_local_experts": 2,
        "attention_chunk_size": 8,
    },
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        **_GROUPED,
        "head_dim": 8,
        "sliding_window": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "olmo2": _GROUPED,
    "smollm3": _GROUPED,
}


def tiny_model(family: str, *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A whole model of a family, a few kilobytes large. `changes` replace fields of its configuration."""
    config = CONFIG_MAPPING[family](**{**CONFIGS[family], **_TOKENS, **changes})
    torch.manual_seed(seed)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


def write_checkpoint(directory: Path, family: str, **how: object) -> Path:
    """The same, saved under `directory`; returned is the checkpoint's own directory."""
    # Short enough for a name, whatever the values are.
    path = directory / "-".join([family, *(f"{key}-{crc32(repr(value).encode()):x}" for key, value in how.items())])
    if not path.exists():
        tiny_model(family, **how).save_pretrained(path)  # type: ignore[arg-type]
    return path


def local_model(reference: str) -> PreTrainedModel:
    """The whole model, as Trainer runs it: without a cache, which would hide packed positions from the mask."""
    model = load_whole(resolve(reference))
    model.config.use_cache = False
    return model


def with_lora(
    model: PreTrainedModel, *, seed: int = 1, layers: Sequence[int] = (0, 1, 4, 5), rank: int = 4
) -> PeftModel:
    """Unmodified PEFT on all linear modules of these layers, with nothing at zero."""
    stack = find_stack(model)
    linear = sorted(
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
        and any(name.startswith(f"{stack.name}.{layer}.") for layer in layers)
    )
    torch.manual_seed(seed)
    peft_model = get_peft_model(
        model, LoraConfig(r=rank, target_modules=linear, fan_in_fan_out=model.config.model_type == "gpt2")
    )
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return peft_model
