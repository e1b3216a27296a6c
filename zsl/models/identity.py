"""Compute the identity of a model: digests of configuration and weights, compared in the handshake.

Each side computes them from its own copy. The weights' digest covers every tensor of the base model by name,
independent of the division into files, and is read from the files, so neither side loads the other's part for it. A
head, and its fields of the configuration, belong to the client alone: a classifier has the identity of the language
model that it was made from, as long as its base model has the same weights.
A part that `zsl split` wrote lacks tensors; it records the whole model's digest, and has one of its own, which is
checked.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file

from zsl.errors import ModelError
from zsl.models.reference import ModelReference
from zsl.models.tensor_files import TensorFiles
from zsl.split.parts import RECORD, Part
from zsl.split.stack import base_class, layer_count
from zsl.wire.messages import ModelIdentity

RANDOM_SEED = 0

# Fields in which two copies of one model may differ without a change of the trunk's results.
_NOT_OF_THE_TRUNK = (
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("classifier_dropout", "id2label", "label2id", "problem_type"),  # of a head
)


def identify(reference: ModelReference) -> ModelIdentity:
    """Return the identity of a referenced model; for a part, that of the whole model.

    Raises `ModelError` without safetensors weights, and for a damaged part.
    """
    config = reference.config
    if reference.location is None:
        weights = _random_digest(config)
    elif reference.part is None:
        weights = base_digest(TensorFiles(reference.location), config)
    else:
        _check_not_damaged(reference.text, reference.part, reference.location)
        weights = reference.part.model.weights_digest
    return ModelIdentity(
        model_type=config.model_type,
        layers=layer_count(config),
        hidden_size=config.get_text_config().hidden_size,
        config_digest=config_digest(config),
        weights_digest=weights,
    )


def base_digest(files: TensorFiles, config: PreTrainedConfig) -> str:
    """Return a SHA-256 digest of the tensors of the base model in a checkpoint, without those of a head."""
    # The class of a head may have a prefix of its own for the base model, as Llama's for question answering.
    classes = (getattr(transformers, name, None) for name in config.architectures or ())
    for cls in (base_class(config), *classes):
        prefix = f"{getattr(cls, 'base_model_prefix', '')}."
        of_base = [name for name in files.names if name.startswith(prefix)]
        others = set(files.names).difference(of_base)
        if of_base and not any(re.search(r"\.\d+\.", name) for name in others):
            return files.digest(of_base, without_prefix=prefix)
    return files.digest()  # a checkpoint of the base model itself, or one with layers beside it


def config_digest(config: PreTrainedConfig) -> str:
    """Return a SHA-256 digest of the fields of a configuration that the trunk's results depend on."""
    fields = {
        name: value
        for name, value in config.to_diff_dict().items()
        if name not in _NOT_OF_THE_TRUNK and not name.endswith("_token_id")
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def _random_digest(config: PreTrainedConfig) -> str:
    """Return a digest of all that seeded weights depend on: type, seed, and library versions."""
    torch_version = torch.__version__.partition("+")[0]
    made_by = ("random", config.model_type, RANDOM_SEED, torch_version, transformers.__version__)
    return hashlib.sha256(repr(made_by).encode()).hexdigest()


def part_digest(part: Part, config: bytes, tensors_digest: str) -> str:
    """Return the value for `part.digest` from the content of `config.json` and the digest of the tensors."""
    said = part.model_dump(mode="json", exclude={"digest"})
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    digest.update(config)
    digest.update(tensors_digest.encode())
    return digest.hexdigest()


def _check_not_damaged(text: str, part: Part, location: str) -> None:
    config = Path(str(cached_file(location, "config.json"))).read_bytes()
    if part_digest(part, config, TensorFiles(location, variant=part.variant).digest()) != part.digest:
        raise ModelError(
            f"{part.described(text)}, but damaged: its tensors, config.json and {RECORD} are not together what "
            "zsl split wrote; split the model again, or copy the part again"
        )
