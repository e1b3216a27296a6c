"""Merge adapters into the weights of the whole model, and write a checkpoint that is known to load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from zsl.adapters.export import whole_adapter, write_whole_adapter
from zsl.errors import ModelError, RunFailed
from zsl.files.durable import aside
from zsl.files.new_directory import new_directory
from zsl.models.identity import identify
from zsl.models.loading import load_whole
from zsl.models.reference import ModelReference, resolve, write_tokenizer
from zsl.models.tensor_files import TensorFiles
from zsl.text.first_line import first_line

PROBE_TOKENS = 8
# Largest allowed difference between the logits before and after merging, relative to the largest logit.
TOLERANCE = {torch.float16: 0.05, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Merged:
    """Result of a merge. `weights_digest` is that of the model before; `rows` the tokens of resized embeddings.

    `converted` is the number of floating-point tensors that had another dtype.
    """

    method: str
    dtype: torch.dtype
    weights_digest: str
    has_tokenizer: bool
    rows: int | None
    converted: int


def merge(
    places: Sequence[Path], reference: ModelReference, target: Path, *, dtype: torch.dtype | None = None
) -> Merged:
    """Write the whole model of `reference`, with the adapters in `places` merged into it, to `target`.

    The weights are merged and written in `dtype`, by default the checkpoint's own, or float32 for a `.gguf` file, which
    is dequantized to that, and for random weights. The result is loaded again, and every tensor compared, before it is
    moved to `target`.

    Raises `ModelError` for a part of a model, a quantized model, an adapter that does not match it or that PEFT cannot
    merge (or merges with other logits), and a tokenizer that cannot be loaded; `ConfigError` if `target` exists;
    `RunFailed` if the result cannot be written, or differs when read again.
    """
    if reference.part is not None:
        raise ModelError(f"{reference.part.described(reference.text)}: merging needs the whole; name it with --model")
    if hasattr(reference.config, "quantization_config"):
        raise ModelError(f"model {reference.text!r} is quantized; name one that is not with --model to merge into")
    adapter = whole_adapter(places, reference)
    method = adapter.method
    if adapter.config.is_prompt_learning:
        raise ModelError(f"{method} puts virtual tokens in front of the text: there are no weights to merge")
    dtype = dtype or _own_dtype(reference)
    with new_directory(target) as written:
        has_tokenizer = write_tokenizer(reference, written)
        with aside(written) as directory:
            write_whole_adapter(adapter, reference, directory)
            model = load_whole(reference, dtype)
            if adapter.rows is not None:
                model.resize_token_embeddings(adapter.rows, mean_resizing=False)  # the adapter has their values
            merged = _merged(model, directory, method)
        merged.save_pretrained(written)
        _check_same(load_whole(resolve(str(written)), dtype), merged)
        weights_digest = identify(reference).weights_digest
    converted = 0 if reference.location is None else TensorFiles(reference.location).count_of_other_dtype(dtype)
    return Merged(method, dtype, weights_digest, has_tokenizer, adapter.rows, converted)


def _own_dtype(reference: ModelReference) -> torch.dtype:
    dtype = getattr(reference.config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and reference.location is not None else torch.float32


def _untie(adapted: nn.Module, config: PreTrainedConfig) -> None:
    """Untie adapted weights, so that merging does not change tied layers."""
    holders = Counter(parameter for module in adapted.modules() for parameter in module.parameters(recurse=False))
    for layer in adapted.modules():
        if isinstance(layer, BaseTunerLayer):
            module = layer.get_base_layer()
            for name, parameter in list(module.named_parameters(recurse=False)):
                if holders[parameter] > 1:
                    module.register_parameter(name, nn.Parameter(parameter.detach().clone()))
                    _mark_untied(config)


def _mark_untied(config: PreTrainedConfig) -> None:
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False


def _merged(model: PreTrainedModel, directory: Path, method: str) -> PreTrainedModel:
    ids = torch.arange(PROBE_TOKENS).unsqueeze(0)  # [1, tokens]
    try:
        with torch.no_grad():
            adapted: Any = PeftModel.from_pretrained(model, str(directory)).eval()
            expected = adapted(input_ids=ids).logits.float()
            _untie(adapted, model.config)
            merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
            embeddings, head = merged.get_input_embeddings(), merged.get_output_embeddings()
            if head is not None and head.weight is not embeddings.weight:  # the adapter had a copy of a tied one
                _mark_untied(merged.config)
            difference = (merged(input_ids=ids).logits.float() - expected).abs().max() / expected.abs().max()
    except (NotImplementedError, AttributeError, LookupError, ValueError, TypeError, RuntimeError) as error:
        raise ModelError(f"PEFT cannot merge this {method} adapter: {first_line(error)}") from error
    if not difference <= TOLERANCE.get(model.dtype, 1e-3):
        raise ModelError(f"merged by PEFT, this {method} adapter gives logits that differ by {difference:.1%}")
    return merged


def _check_same(read: PreTrainedModel, written: PreTrainedModel) -> None:
    found, wanted = read.state_dict(), written.state_dict()
    differing = sorted(found.keys() ^ wanted.keys()) or [n for n in wanted if not torch.equal(found[n], wanted[n])]
    if differing:
        raise RunFailed(f"the checkpoint differs from the merged model when read again, in {differing[0]}")
