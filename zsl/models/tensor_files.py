"""Read tensors of a safetensors checkpoint by name, one at a time, from one file or several."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from zsl.errors import ModelError
from zsl.text.first_line import first_line


class TensorFiles:
    """Tensors of the checkpoint at `location`, a directory or a hub id. `names` are sorted.

    `variant` is that of `from_pretrained`. `dtype` converts floating-point tensors.
    Raises `ModelError` if the weights are missing or cannot be read.
    """

    def __init__(self, location: str, dtype: torch.dtype | None = None, *, variant: str | None = None) -> None:
        self._location = location
        self._dtype = dtype
        self._file_of: dict[str, Path] = {}
        with self._readable():
            for file in _files(location, variant):
                with safe_open(file, framework="pt") as weights:
                    self._file_of.update(dict.fromkeys(weights.keys(), file))
        self.names = sorted(self._file_of)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor. Raises `ModelError`."""
        with self._readable(), safe_open(self._file_of[name], framework="pt") as weights:
            return self._cast(weights.get_tensor(name))

    def outline(self, name: str) -> torch.Tensor:
        """Return a tensor on the meta device with the shape and dtype of the named tensor. Raises `ModelError`."""
        with self._readable(), safe_open(self._file_of[name], framework="pt") as weights:
            found = weights.get_slice(name)
            dtype = weights.get_tensor(name).dtype if not found.get_shape() else found[:0].dtype
            return self._cast(torch.empty(found.get_shape(), dtype=dtype, device="meta"))

    def count_of_other_dtype(self, dtype: torch.dtype) -> int:
        """Count the floating-point tensors that are not of this dtype. Raises `ModelError`."""
        outlines = map(self.outline, self.names)
        return sum(tensor.is_floating_point() and tensor.dtype != dtype for tensor in outlines)

    def digest(self, names: Iterable[str] | None = None, *, without_prefix: str = "") -> str:
        """Return a SHA-256 digest of name, dtype, shape and bytes of these tensors, or all. Raises `ModelError`.

        `without_prefix` is removed from the names in the digest.
        """
        digest = hashlib.sha256()
        for name in self.names if names is None else sorted(names):
            tensor: Any = self.read(name)
            digest.update(f"{name.removeprefix(without_prefix)} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            if tensor.numel():
                digest.update(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
        return digest.hexdigest()

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._dtype) if self._dtype and tensor.is_floating_point() else tensor

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise ModelError(f"model {self._location!r}: its weights cannot be read: {first_line(error)}") from error


def weight_files(variant: str | None) -> tuple[str, str]:
    """Return the name of a single weight file, and of the index of several."""
    inserted = f".{variant}" if variant else ""
    return f"model{inserted}.safetensors", f"model.safetensors.index{inserted}.json"


def _files(location: str, variant: str | None) -> list[Path]:
    single, index = (
        cached_file(location, name, _raise_exceptions_for_missing_entries=False) for name in weight_files(variant)
    )
    if single is not None:
        return [Path(single)]
    if index is None:
        raise ModelError(f"model {location!r} has no safetensors weights; zsl reads no pickled ones")
    shards, _ = get_checkpoint_shard_files(location, index)
    return [Path(shard) for shard in shards]
