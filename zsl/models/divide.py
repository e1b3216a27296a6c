"""Divide a checkpoint into the client's part and the trunk's part, each without the other's weights.

The source is read tensor by tensor, and at most one shard to be written is in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers.utils.hub import cached_file

from zsl.errors import ModelError, RunFailed
from zsl.files.durable import aside
from zsl.files.new_directory import new_directory
from zsl.models.identity import base_digest, identify, part_digest
from zsl.models.loading import check_part_loads, load_whole
from zsl.models.reference import ModelReference, resolve, write_tokenizer
from zsl.models.tensor_files import TensorFiles, weight_files
from zsl.split.cut import check_cut
from zsl.split.meta_model import meta_model
from zsl.split.parts import RECORD, VARIANT, Part, PartName
from zsl.split.slots import layers_pattern
from zsl.split.stack import check_can_be_split, find_stack, layer_count
from zsl.wire.messages import Cut, ModelIdentity

MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Divided:
    """Result of a division: identity of the whole model, and whether the client's part has a tokenizer."""

    model: ModelIdentity
    has_tokenizer: bool


def divide(
    reference: ModelReference,
    cut: Cut,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> Divided:
    """Write `target/client` and `target/trunk`, both or none.

    `dtype` converts the weights; the identity is then that of the converted model.
    Raises `ModelError`, `ConfigError` if something is at `target`, `RunFailed` if it cannot be written.
    """
    if reference.part is not None:
        raise ModelError(f"{reference.part.described(reference.text)}: the whole model is needed here")
    check_cut(cut, layer_count(reference.config))
    check_can_be_split(reference.config)
    if dtype is not None and hasattr(reference.config, "quantization_config"):
        raise ModelError(f"model {reference.text!r} is quantized, and can be split only as it is: leave out the dtype")
    with new_directory(target) as written, _as_checkpoint(reference, written) as location:
        source = TensorFiles(location, dtype)
        model = identify(reference)
        if dtype is not None and TensorFiles(location).count_of_other_dtype(dtype):
            model = model.model_copy(update={"weights_digest": base_digest(source, reference.config)})
        pattern = re.compile(
            layers_pattern(find_stack(meta_model(reference.config)).leaf_name, range(cut.start, cut.stop))
        )
        names: dict[PartName, list[str]] = {
            "client": [name for name in source.names if not pattern.search(name)],
            "trunk": [name for name in source.names if pattern.search(name)],
        }
        (written / "client").mkdir()
        has_tokenizer = write_tokenizer(reference, written / "client")
        _copy(location, "generation_config.json", written / "client")
        for part in names:
            directory = written / part
            directory.mkdir(exist_ok=True)
            _write_config(location, directory, dtype)
            _write_tensors(source, names[part], directory, max_shard_size)
            record = Part(part=part, cut=cut, model=model, hub_id=reference.hub_id, digest="0" * 64)
            config = (directory / "config.json").read_bytes()
            digest = part_digest(record, config, source.digest(names[part]))
            record = record.model_copy(update={"digest": digest})
            (directory / RECORD).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
            _check(directory, model)
    return Divided(model, has_tokenizer)


@contextmanager
def _as_checkpoint(reference: ModelReference, directory: Path) -> Iterator[str]:
    """Yield the location of the model's files. Random weights are written to temporary files in `directory`."""
    if reference.location is not None:
        yield reference.location
        return
    with aside(directory) as made:
        load_whole(reference).save_pretrained(made)
        yield str(made)


def _write_config(location: str, directory: Path, dtype: torch.dtype | None) -> None:
    """Copy the configuration, with no change but the dtype: the handshake compares a digest of it."""
    file = _copy(location, "config.json", directory)
    if dtype is not None and file is not None:
        fields = json.loads(file.read_bytes())
        fields.pop("torch_dtype", None)
        fields["dtype"] = str(dtype).removeprefix("torch.")
        file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy(location: str, name: str, directory: Path) -> Path | None:
    file = cached_file(location, name, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    copy = directory / name
    copy.write_bytes(Path(file).read_bytes())
    return copy


def _write_tensors(source: TensorFiles, names: Sequence[str], directory: Path, max_shard_size: str) -> None:
    outlines = {name: source.outline(name) for name in names}
    shards = split_torch_state_dict_into_shards(
        outlines, max_shard_size=max_shard_size, filename_pattern=f"model.{VARIANT}{{suffix}}.safetensors"
    )
    for file, in_it in shards.filename_to_tensors.items():
        tensors = {name: source.read(name) for name in in_it}
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (directory / weight_files(VARIANT)[1]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _check(directory: Path, model: ModelIdentity) -> None:
    """Read the part again. Raises `RunFailed` if it is of another model, `ModelError` if it lacks a tensor."""
    part = resolve(str(directory))
    if identify(part) != model:
        raise RunFailed(f"what was written to {directory.parent.name} is not of the model that was read")
    check_part_loads(part)
