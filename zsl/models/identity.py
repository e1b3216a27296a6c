"""The identity of a model: two digests that both sides compute from their own copy and compare in the handshake.

The weights' digest is over every tensor of the checkpoint by name, whatever files they lie in, and is read from
the files: neither side loads the other's part for it. A part that `zsl split` wrote lacks tensors; it says what the
whole's digest is, and has one of its own, which is checked.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file

from zsl.errors import ModelError
from zsl.models.reference import ModelReference
from zsl.models.tensor_files import TensorFiles
from zsl.split.parts import RECORD, Part
from zsl.split.stack import layer_count
from zsl.wire.messages import ModelIdentity

RANDOM_SEED = 0

# What two copies of one model may differ in without the trunk's numbers changing.
_NOT_OF_THE_TRUNK = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


def identify(reference: ModelReference) -> ModelIdentity:
    """The identity of the model that a reference stands for; of a part, that of the whole.

    Raises `ModelError` without safetensors weights, and for a part that is damaged.
    """
    config = reference.config
    if reference.location is None:
        weights = _random_digest(config)
    elif reference.part is None:
        weights = TensorFiles(reference.location).digest()
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


def config_digest(config: PreTrainedConfig) -> str:
    """A digest of the fields of a configuration that the trunk's numbers depend on."""
    fields = {
        name: value
        for name, value in config.to_diff_dict().items()
        if name not in _NOT_OF_THE_TRUNK and not name.endswith("_token_id")
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def _random_digest(config: PreTrainedConfig) -> str:
    """Seeded weights are equal where the draws are: same library versions, same seed."""
    torch_version = torch.__version__.partition("+")[0]
    made_by = ("random", config.model_type, RANDOM_SEED, torch_version, transformers.__version__)
    return hashlib.sha256(repr(made_by).encode()).hexdigest()


def part_digest(part: Part, config: bytes, tensors_digest: str) -> str:
    """What `part.digest` is to be, for the content of its `config.json` and the digest of its tensors."""
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
