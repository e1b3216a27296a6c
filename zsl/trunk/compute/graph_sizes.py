"""Measure the bytes that the autograd graph of a pass keeps, once for each form of input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import torch

from zsl.trunk.compute.adapters import PassAdapters
from zsl.trunk.compute.passes import Pass, Sequences

# Bounds of the remembered sizes: forms of input, and distinct kinds of sequences in each.
MAX_SIZES_REMEMBERED, MAX_KINDS_REMEMBERED = 1024, 16
# Overhead of an autograd node and its saved tensors, beside their elements: 850 to 990 bytes on Linux.
NODE_BYTES = 1024


class GraphSizes:
    """Sizes of graphs by form of input. Saved tensors that are `weights` or adapters do not count."""

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._nbytes: dict[tuple[object, ...], int] = {}

    def __len__(self) -> int:
        """Return the number of remembered forms."""
        return len(self._nbytes)

    def of(
        self, inputs: Pass, adapters: PassAdapters | None, run: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, int]:
        """Return the result of `run`, which computes a pass of these inputs, and the bytes that its graph keeps."""
        # Measured once per form of input, because hooks on saved tensors slow small passes down.
        form = _form(inputs)
        if form is not None and adapters is not None:
            form = (*form, adapters.form)
        if form in self._nbytes:
            return run(), self._nbytes[form]
        output, nbytes = self._measured(adapters, run)
        if form is not None:
            if len(self._nbytes) == MAX_SIZES_REMEMBERED:
                del self._nbytes[next(iter(self._nbytes))]
            self._nbytes[form] = nbytes
        return output, nbytes

    def _measured(self, adapters: PassAdapters | None, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
        kept: dict[int, int] = {}
        weights = self._weights if adapters is None else self._weights.union(adapters.storages)

        def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            # Detached: a saved output that refers to its own graph would never be freed.
            return tensor.detach(), tensor._version

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            output = run()
        return output, sum(kept.values()) + NODE_BYTES * nodes_in(output)


def nodes_in(output: torch.Tensor) -> int:
    """Count the nodes in the graph of a tensor."""
    waiting, found = [output.grad_fn], {output.grad_fn}
    while waiting:
        node = waiting.pop()
        assert node is not None
        following = {after for after, _ in node.next_functions if after is not None} - found
        found |= following
        waiting += following
    return len(found)


def _form(inputs: Pass) -> tuple[object, ...] | None:
    """Return the form of a pass, whose graph has one size; None for too many kinds of sequences."""
    if isinstance(inputs, Sequences):
        kinds = Counter((length, index in inputs.masked) for index, length in enumerate(inputs.lengths))
        return None if len(kinds) > MAX_KINDS_REMEMBERED else (inputs.tokens, *sorted(kinds.items()))
    return (inputs.rows, inputs.tokens, inputs.attention_mask is None, inputs.position_ids is None)


def _unpack(packed: tuple[torch.Tensor, int]) -> torch.Tensor:
    """Return a saved tensor. Raises `RuntimeError` if modified in place, as autograd does without hooks."""
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError("a tensor that the backward needs was modified in place by the model's forward")
    return tensor
