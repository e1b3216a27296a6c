"""Stash of a forward for its backward: inputs, and the shared graph and linear outputs.

Requests that shared a forward share its graph and linear outputs. If all of them are in one backward batch, the graph
serves them together. If only some are, the graph is useless and is dropped: those use their linear outputs, and the
others get copies of theirs. So a request that is late cannot hold more memory than is counted for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from zsl.trunk.compute.adapters import FlatGradients
from zsl.trunk.compute.linear_outputs import LinearOutputs
from zsl.trunk.compute.packing import MergedPass
from zsl.trunk.compute.passes import Pass
from zsl.trunk.compute.trunk_model import Graph
from zsl.trunk.work import Keep, Shape
from zsl.wire.messages import Reveal


@dataclass(slots=True, eq=False)
class Shared:
    """Graph and linear outputs shared by the requests of a forward. A member is a request's index in that pass."""

    merged: MergedPass | None  # None when nothing of the whole pass is kept
    graph: Graph | None
    _linear_outputs: LinearOutputs | None  # of the whole pass
    _own: dict[int, LinearOutputs] = field(default_factory=dict)  # copies of members whose backward is still pending

    def linear_outputs_of(self, member: int) -> LinearOutputs | None:
        """Return a member's linear outputs, or None if dropped."""
        merged, linear_outputs = self.merged, self._linear_outputs
        if merged is None or linear_outputs is None:
            return self._own.get(member)
        return merged.split_linear_outputs(linear_outputs)[member]

    def part_with(self, leaving: Collection[int]) -> None:
        """Drop the graph, and copy the linear outputs of members that are not `leaving`."""
        merged, linear_outputs = self.merged, self._linear_outputs
        if merged is not None and linear_outputs is not None:
            parts = enumerate(merged.split_linear_outputs(linear_outputs))
            self._own = {member: part.copied() for member, part in parts if member not in leaving}
        self.merged = self.graph = self._linear_outputs = None
        for member in leaving:
            self._own.pop(member, None)

    def drop(self) -> None:
        """Drop everything: the backwards recompute their forward."""
        self.merged = self.graph = self._linear_outputs = None
        self._own = {}


# Overhead of a held step beside the elements of its tensors: 2,400 bytes on Linux, and some per sequence.
STEP_BYTES, SEQUENCE_BYTES = 2560, 64


@dataclass(frozen=True, slots=True)
class TorchStash:
    """Inputs of a step, and its share of the graph and linear outputs of its forward. `nbytes`: bytes of all;
    `inputs_bytes`: of the inputs only."""

    inputs: Pass
    reply_dtype: torch.dtype
    nbytes: int
    inputs_bytes: int
    keep: Keep = Keep.INPUT
    shared: Shared | None = None
    member: int = 0

    def demoted(self) -> TorchStash | None:
        if self.shared is None:
            return None
        if self.keep is Keep.GRAPH_AND_LINEAR_OUTPUTS:
            self.shared.graph = None
            linear_outputs = self.shared.linear_outputs_of(self.member)
            if linear_outputs is not None:
                return replace(self, keep=Keep.LINEAR_OUTPUTS, nbytes=self.inputs_bytes + linear_outputs.nbytes)
        self.drop()
        return replace(self, keep=Keep.INPUT, nbytes=self.inputs_bytes, shared=None)

    def drop(self) -> None:
        if self.shared is not None:
            self.shared.drop()


def stashes_of(
    merged: MergedPass,
    parts: list[Pass],
    shapes: list[Shape],
    reply_dtypes: list[torch.dtype],
    keeps: list[Keep],
    graph: Graph | None,
    linear_outputs: LinearOutputs | None,
) -> list[TorchStash | None]:
    """Make the stashes of the requests of a forward, each with the parts in its `keeps`; None for `NOTHING`."""
    shared = None if graph is None and linear_outputs is None else Shared(merged, graph, linear_outputs)
    all_tokens = sum(merged.sizes)
    stashes: list[TorchStash | None] = []
    for member, (part, shape, dtype, asked) in enumerate(zip(parts, shapes, reply_dtypes, keeps, strict=True)):
        share = part.rows * part.tokens / all_tokens
        inputs_bytes = inputs_bytes_of(part, shape)
        nbytes, keep = inputs_bytes, Keep.INPUT
        if shared is not None and asked.value >= Keep.LINEAR_OUTPUTS.value:
            keep = (
                Keep.LINEAR_OUTPUTS
                if graph is None
                else Keep.GRAPH
                if linear_outputs is None
                else Keep.GRAPH_AND_LINEAR_OUTPUTS
            )
            if graph is not None:
                nbytes += round(share * graph.nbytes)
            if linear_outputs is not None:
                overhead = linear_outputs.overhead_bytes
                nbytes += round(share * (linear_outputs.nbytes - overhead)) + overhead
        own = shared if keep is not Keep.INPUT else None
        stash = TorchStash(part, dtype, nbytes, inputs_bytes, keep, own, member)
        stashes.append(None if asked is Keep.NOTHING else stash)
    if shared is not None and any(stash is None or stash.shared is None for stash in stashes):
        # A member that keeps less cannot join a common backward.
        shared.part_with([member for member, stash in enumerate(stashes) if stash is None or stash.shared is None])
    return stashes


def inputs_bytes_of(part: Pass, shape: Shape) -> int:
    """Return the bytes of a step with only its inputs kept."""
    return part.nbytes + STEP_BYTES + SEQUENCE_BYTES * len(shape.lengths)


def with_common_graphs(stashes: Sequence[TorchStash]) -> list[list[int]]:
    """Return indices of requests, grouped by forward, where the whole group is present and its graph still exists."""
    places: dict[int, list[int]] = {}
    for place, stash in enumerate(stashes):
        places.setdefault(id(stash.shared), []).append(place)
    groups = []
    for group in places.values():
        shared = stashes[group[0]].shared
        if shared is None or shared.graph is None or shared.merged is None:
            continue
        if len(group) == len(shared.merged.order):
            groups.append(group)
    return groups


def gradients_of_common_graph(
    stashes: Sequence[TorchStash],
    gradients: Sequence[torch.Tensor],
    trained: Collection[int],
    at_revealed: Mapping[Reveal, torch.Tensor],
) -> tuple[list[torch.Tensor], FlatGradients]:
    """Return the gradients of one such group, and of the adapters of those in `trained` (indices in the group).

    `at_revealed`: gradients at what the forward of a single request revealed. Consumes its graph.
    """
    shared = stashes[0].shared
    assert shared is not None and shared.graph is not None and shared.merged is not None
    graph, merged = shared.graph, shared.merged
    shared.graph = None
    by_member = {stash.member: gradient for stash, gradient in zip(stashes, gradients, strict=True)}
    at_output = merged.join([by_member[member] for member in range(len(stashes))])
    at_input, of_adapters = graph.all_gradients(at_output, [stashes[index].member for index in trained], at_revealed)
    results = merged.split(at_input)
    return [results[stash.member] for stash in stashes], {
        index: of_adapters[stashes[index].member] for index in trained
    }


def take_linear_outputs(stashes: Sequence[TorchStash]) -> list[LinearOutputs] | None:
    """Return the linear outputs of all requests of a backward, or None if one has none. Absent members get copies."""
    found = [None if stash.shared is None else stash.shared.linear_outputs_of(stash.member) for stash in stashes]
    leaving: dict[int, tuple[Shared, list[int]]] = {}
    for stash in stashes:
        if stash.shared is not None:
            leaving.setdefault(id(stash.shared), (stash.shared, []))[1].append(stash.member)
    for shared, members in leaving.values():
        shared.part_with(members)
    linear_outputs = [one for one in found if one is not None]
    return linear_outputs if len(linear_outputs) == len(stashes) else None
