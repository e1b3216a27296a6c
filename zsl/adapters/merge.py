"""A plain checkpoint with an adapter merged into its weights, known to load before it is there."""

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
# How far, of the largest logit, those of the merged model may be from the adapter's.
TOLERANCE = {torch.float16: 0.05, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Merged:
    """What was written. `weights_digest` is that of the model before; `rows` its tokens now, if it was resized.

    `converted` counts the tensors of floating point that had another dtype.
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

    `dtype` is that of the weights, in which they are merged too; if it is not given, the checkpoint's own, and float32
    for a `.gguf` file, whose numbers are dequantized to that, and for random weights. What was written is loaded again,
    and every tensor compared, before it is at `target`.

    Raises `ModelError` for a part of a model, a quantized one, an adapter that does not fit it or that PEFT cannot
    merge (or merges so that the logits are others), and a tokenizer that cannot be loaded; `ConfigError` if something
    is at `target`; `RunFailed` if it cannot be written, or comes back otherwise.
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
                model.resize_token_embeddings(adapter.rows, mean_resizing=False)  # theirs are in the adapter
            merged = _merged(model, directory, method)
        merged.save_pretrained(written)
        _check_same(load_whole(resolve(str(written)), dtype), merged)
        weights_digest = identify(reference).weights_digest
    return Merged(method, dtype, weights_digest, has_tokenizer, adapter.rows, _converted(reference, dtype))


def _own_dtype(reference: ModelReference) -> torch.dtype:
    dtype = getattr(reference.config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and reference.location is not None else torch.float32


def _converted(reference: ModelReference, dtype: torch.dtype) -> int:
    if reference.location is None:
        return 0
    files = TensorFiles(reference.location)
    outlines = map(files.outline, files.names)
    return sum(tensor.is_floating_point() and tensor.dtype != dtype for tensor in outlines)


def _untie(adapted: nn.Module, config: PreTrainedConfig) -> None:
    """Give what is adapted weights of its own: what is merged into them must not reach what was tied to them."""
    holders = Counter(parameter for module in adapted.modules() for parameter in module.parameters(recurse=False))
    for layer in adapted.modules():
        if isinstance(layer, BaseTunerLayer):
            module = layer.get_base_layer()
            for name, parameter in list(module.named_parameters(recurse=False)):
                if holders[parameter] > 1:
                    module.register_parameter(name, nn.Parameter(parameter.detach().clone()))
                    _say_untied(config)


def _say_untied(config: PreTrainedConfig) -> None:
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
            if head is not None and head.weight is not embeddings.weight:  # one of two that were tied was a copy
                _say_untied(merged.config)
            difference = (merged(input_ids=ids).logits.float() - expected).abs().max() / expected.abs().max()
    except (NotImplementedError, AttributeError, LookupError, ValueError, TypeError, RuntimeError) as error:
        raise ModelError(f"PEFT cannot merge this {method} adapter: {first_line(error)}") from error
    if not difference <= TOLERANCE.get(model.dtype, 1e-3):
        raise ModelError(f"merged by PEFT, this {method} adapter gives logits that differ by {difference:.1%}")
    return merged


def _check_same(read: PreTrainedModel, written: PreTrainedModel) -> None:
    there, here = read.state_dict(), written.state_dict()
    differing = sorted(there.keys() ^ here.keys()) or [n for n in here if not torch.equal(there[n], here[n])]
    if differing:
        raise RunFailed(f"what was written is not what was merged: {differing[0]} came back otherwise")
