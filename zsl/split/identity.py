"""The identity of a model: two digests that both sides compute from their own copy and compare in the handshake.

The weights' digest is over every tensor of the checkpoint by name, whatever files they lie in, and is read from
the files: neither side loads the other's part for it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from zsl.errors import ModelError
from zsl.split.reference import ModelReference, first_line
from zsl.split.stack import layer_count
from zsl.wire.messages import ModelIdentity

RANDOM_SEED = 0

# What two copies of one model may differ in without the trunk's numbers changing.
_NOT_OF_THE_TRUNK = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


def identify(reference: ModelReference) -> ModelIdentity:
    """The identity of the model that a reference stands for. Raises `ModelError` without safetensors weights."""
    config = reference.config
    weights = _random_digest(config) if reference.location is None else _checkpoint_digest(reference.location)
    return ModelIdentity(
        model_type=config.model_type,
        layers=layer_count(config),
        hidden_size=config.get_text_config().hidden_size,
        config_digest=_config_digest(config),
        weights_digest=weights,
    )


def _config_digest(config: PreTrainedConfig) -> str:
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


def _checkpoint_digest(location: str) -> str:
    """Over (name, dtype, shape, bytes) of every tensor of the checkpoint, in order of names."""
    digest = hashlib.sha256()
    file_of: dict[str, Path] = {}
    try:
        for file in _safetensors_files(location):
            with safe_open(file, framework="pt") as weights:
                file_of.update(dict.fromkeys(weights.keys(), file))
        for name in sorted(file_of):
            with safe_open(file_of[name], framework="pt") as weights:
                tensor = weights.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            if tensor.numel():
                digest.update(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"model {location!r}: its weights cannot be read: {first_line(error)}") from error
    return digest.hexdigest()


def _safetensors_files(location: str) -> list[Path]:
    single = cached_file(location, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if single is not None:
        return [Path(single)]
    index = cached_file(location, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is None:
        raise ModelError(f"model {location!r} has no safetensors weights; zsl reads no pickled ones")
    shards, _ = get_checkpoint_shard_files(location, index)
    return [Path(shard) for shard in shards]
