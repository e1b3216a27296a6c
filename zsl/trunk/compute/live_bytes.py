"""Measure the peak memory of the tensors that a function allocates, on any device. Pure torch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Live(TorchDispatchMode):
    """Counts the bytes of storages that operations allocate, until each is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._now_bytes = 0
        self._sizes: dict[int, int] = {}  # by address of the storage

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        read = {tensor.untyped_storage()._cdata for tensor in _tensors(args)}
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors((result,)):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in read and key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self._now_bytes += storage.nbytes()
                weakref.finalize(storage, self._freed, key)
        self.peak_bytes = max(self.peak_bytes, self._now_bytes)
        return result

    def _freed(self, key: int) -> None:
        self._now_bytes -= self._sizes.pop(key, 0)


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
    return found


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak bytes of the tensors that `run` allocates, its result included."""
    live = _Live()
    with live:
        run()
    return live.peak_bytes
