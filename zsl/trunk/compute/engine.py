"""Torch engine of the daemon: runs forward and backward passes, merged or alone.

A request that runs alone keeps its own shape: its numbers are those of the client's whole model. A failed merged pass
is run again request by request, so that only the bad request fails. Imports no asyncio and no sockets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch

from zsl.errors import InternalError, OutOfMemoryError, UnknownSumError, WireError
from zsl.trunk.compute.adapters import FlatGradients, PassAdapters, SeparateAdapters, Span, request_adapter
from zsl.trunk.compute.gradient_sums import add_to_sums
from zsl.trunk.compute.keys_and_values import KeysAndValues, packed_caches
from zsl.trunk.compute.loaded_adapter import loaded
from zsl.trunk.compute.merged_adapters import MergedAdapters
from zsl.trunk.compute.packing import MergedPass, alone, packed, packed_behind_caches, stacked
from zsl.trunk.compute.passes import Pass, Rows, Sequences, as_rows, sequences_of
from zsl.trunk.compute.stacked_adapters import Companies
from zsl.trunk.compute.stash import (
    TorchStash,
    gradients_of_common_graph,
    stashes_of,
    take_linear_outputs,
    with_common_graphs,
)
from zsl.trunk.compute.transfer import Transfer
from zsl.trunk.compute.trunk_model import Revealed, TrunkModel
from zsl.trunk.malloc import give_back_freed_memory, resident_bytes
from zsl.trunk.settings import TrunkTraits
from zsl.trunk.work import Batch, BehindCache, Buffers, Done, Keep, Kind, Outcome, Packed, Stacked, Work
from zsl.wire.messages import GRADIENTS_OF, Reveal, Role
from zsl.wire.tensors import TORCH_DTYPES, decode_tensor, encode_tensor

logger = logging.getLogger(__name__)

_WITH_LINEAR_OUTPUTS = (Keep.LINEAR_OUTPUTS, Keep.GRAPH_AND_LINEAR_OUTPUTS)


class TorchCompute:
    """Computes forwards and backwards of one trunk. For one thread.

    Requests that share a pass are packed into one row or stacked as rows, by their `sharing`. If the trunk is
    deterministic, every pass that may be shared is padded with zeros to exactly `max_batch_tokens` tokens, so that a
    request's numbers do not depend on the other requests; longer requests run alone. A backward whose graph would take
    more than `pass_memory_bytes`, or has no room (`Batch.by_layers`), is computed layer by layer, with one
    or two more forwards of each layer.
    """

    def __init__(self, trunk: TrunkModel, traits: TrunkTraits, *, pass_memory_bytes: int | None = None) -> None:
        self._pass_memory_bytes = pass_memory_bytes
        self._resident_at_start = resident_bytes() if trunk.device.type == "cpu" else 0
        self.traits = traits
        self.trunk = trunk
        self._pass_tokens = traits.batch_limits.max_batch_tokens if traits.deterministic else 0
        self._transfer = Transfer(trunk.device)
        self._companies = Companies()

    def run(self, batch: Batch) -> list[Outcome]:
        outcomes = self._outcomes(batch)
        if not self._fits(batch.works):
            self._trim_over_budget()
        return outcomes

    def _outcomes(self, batch: Batch) -> list[Outcome]:
        if len(batch.works) > 1:
            try:
                return list(self._run(batch))
            except Exception:
                logger.exception("a merged pass of %d requests failed; running them one by one", len(batch.works))
        return [self._run_alone(Batch((work,), batch.by_layers)) for work in batch.works]

    def _run_alone(self, batch: Batch) -> Outcome:
        (work,) = batch.works
        try:
            return self._run(batch)[0]
        except WireError as error:
            return error
        except torch.OutOfMemoryError:
            return OutOfMemoryError("the trunk's device has no memory for this request; send fewer tokens at once")
        except Exception as error:
            if isinstance(error, RuntimeError) and "allocate memory" in str(error):
                return OutOfMemoryError("the trunk has no memory for this request; send fewer tokens at once")
            logger.exception("a %s failed", work.kind.value)
            return InternalError(f"the trunk failed in this {work.kind.value}; its log says why")

    def _run(self, batch: Batch) -> list[Outcome]:
        # In the order in which merged adapters are stacked, so that the tokens of equal requests need no reordering.
        order = sorted(range(len(batch.works)), key=lambda index: self._serial(batch.works[index]))
        works = [batch.works[index] for index in order]
        is_backward = batch.kind is Kind.BACKWARD
        done: Sequence[Outcome] = self._backward(works, batch.by_layers) if is_backward else self._forward(works)
        by_index = dict(zip(order, done, strict=True))
        return [by_index[index] for index in range(len(order))]

    def _serial(self, work: Work) -> int:
        if work.adapter is None:
            return -1
        return loaded(work.adapter.version, self.trunk.linear_layers, self.trunk.device).serial

    def _forward(self, works: Sequence[Work]) -> list[Done]:
        parts = [self._inputs(work) for work in works]
        merged = self._merged(works, parts)
        keeps = [work.keep for work in works]
        with_linear_outputs = not set(keeps).isdisjoint(_WITH_LINEAR_OUTPUTS)
        graph = linear_outputs = None
        # The backward of a kept graph says whether it needs gradients of adapters.
        adapters, reveals = self._adapters(works, merged, trained=range(len(works))), works[0].reveals
        caches = [self._cache(work) for work in works]
        behind = caches[0] if len(works) == 1 else packed_caches(caches, parts)
        with self.trunk.adapted(adapters), self.trunk.behind(behind), self.trunk.revealing(reveals) as revealed:
            if all(keep.has_graph for keep in keeps):
                graph, linear_outputs = self.trunk.graph_to_keep(merged.inputs, with_linear_outputs=with_linear_outputs)
                output = graph.output.detach()
            elif with_linear_outputs:
                output, linear_outputs = self.trunk.forward_with_linear_outputs(merged.inputs)
            else:
                output = self.trunk.forward(merged.inputs)
        dtypes = [_reply_dtype(work) for work in works]
        replies = self._replies("activations", merged.split(output), dtypes)
        for name in reveals:  # of one request, which runs alone
            replies[0].update(self._replies(name, [_stacked(name, revealed, works[0])], dtypes)[0])
        stashes = stashes_of(merged, parts, [work.shape for work in works], dtypes, keeps, graph, linear_outputs)
        return [Done(*parts) for parts in zip(replies, stashes, caches, strict=True)]

    def _cache(self, work: Work) -> KeysAndValues | None:
        """Return the keys and values that a request runs behind, to be added to. Raises `UnknownCacheError`."""
        use = work.cache
        if use is None:
            return None
        if use.kept is None:
            return self.trunk.no_keys_and_values()
        assert isinstance(use.kept, KeysAndValues)
        return use.kept.behind(use.length, use.rows)

    def _backward(self, works: Sequence[Work], by_layers: bool) -> list[Outcome]:
        stashes = [self._stash(work) for work in works]
        tensors = self._transfer.to_device([decode_tensor(*work.buffers["gradients"]) for work in works])
        tensors = [tensor.to(self.trunk.dtype) for tensor in tensors]
        at_revealed = self._at_revealed(works)
        results: dict[int, torch.Tensor] = {}  # by index of the request
        of_adapters: FlatGradients = {}

        def compute(places: list[int], gradients: Callable[..., tuple[list[torch.Tensor], FlatGradients]]) -> None:
            chosen = ([values[p] for p in places] for values in (works, stashes, tensors))
            at_inputs, flat = gradients(*chosen, at_revealed)
            results.update(zip(places, at_inputs, strict=True))
            of_adapters.update({places[index]: gradient for index, gradient in flat.items()})

        for group in self._groups_by_graph(works, stashes):
            compute(group, _from_common_graph)
        rest = [place for place in range(len(works)) if place not in results]
        if rest:
            compute(rest, partial(self._recomputed, by_layers=by_layers))
        ordered = [results[place] for place in range(len(works))]
        replies = self._replies("gradients", ordered, [stash.reply_dtype for stash in stashes])
        answers = add_to_sums([work.adapter for work in works], of_adapters)
        sums = {place: answer for place, answer in answers.items() if isinstance(answer, torch.Tensor)}
        dtypes = [_adapter_dtype(works[place]) for place in sums]
        flat = self._replies("adapter_gradients", list(sums.values()), dtypes)
        for place, reply in zip(sums, flat, strict=True):
            replies[place].update(reply)
        unknown = {place: answer for place, answer in answers.items() if isinstance(answer, UnknownSumError)}
        return [unknown.get(place) or Done(reply) for place, reply in enumerate(replies)]

    def _recomputed(
        self,
        works: Sequence[Work],
        stashes: Sequence[TorchStash],
        tensors: Sequence[torch.Tensor],
        at_revealed: Mapping[Reveal, torch.Tensor],
        *,
        by_layers: bool,
    ) -> tuple[list[torch.Tensor], FlatGradients]:
        """Return gradients from linear outputs, or from inputs alone, and those of adapters by index of the request."""
        merged = self._merged(works, [stash.inputs for stash in stashes])
        linear_outputs = take_linear_outputs(stashes)
        at_output, trained = merged.join(tensors), _trained(works)
        adapters = self._adapters(works, merged, trained=trained)
        with self.trunk.adapted(adapters), self.trunk.revealing(at_revealed):
            fits = self._fits(works)
            if fits and (at_revealed or not by_layers):
                graph = self.trunk.graph(
                    merged.inputs, None if linear_outputs is None else merged.join_linear_outputs(linear_outputs)
                )
                at_input, of_adapters = graph.all_gradients(at_output, trained, at_revealed)
            elif at_revealed:
                raise OutOfMemoryError(
                    "the trunk has no memory for the gradients of what it reveals; send fewer tokens at once, or start "
                    "the daemon with more --stash-memory"
                )
            else:
                del linear_outputs
                at_input, of_adapters = self.trunk.gradients_by_layers(
                    merged.inputs, at_output, trained, keeps_inputs=fits, after_layer=self._trim_over_budget
                )
        return merged.split(at_input), of_adapters

    def _adapters(self, works: Sequence[Work], merged: MergedPass, *, trained: Collection[int]) -> PassAdapters | None:
        """Load the adapters of a pass. `trained`: indices of the requests whose adapters need gradients."""
        if all(work.adapter is None for work in works):
            return None
        spans = []
        for member, size in zip(merged.order, merged.sizes, strict=True):
            use = works[member].adapter
            adapter = None
            if use is not None:
                layers, device = self.trunk.linear_layers, self.trunk.device
                adapter = request_adapter(use, layers, device, trains=member in trained)
            spans.append(Span(size, member, adapter))
        if merged.filling:
            spans.append(Span(merged.filling, None, None))
        if len(works) == 1 or self.traits.deterministic:
            return SeparateAdapters(spans)
        return MergedAdapters(spans, self._companies, trains=bool(trained))

    def _trim_over_budget(self) -> None:
        """Trim the heap within and after a pass over the budget, where fragmentation would add up."""
        most = self._pass_memory_bytes
        if most is not None and self._resident_at_start and resident_bytes() - self._resident_at_start > most:
            give_back_freed_memory()

    def _fits(self, works: Sequence[Work]) -> bool:
        if self._pass_memory_bytes is None:
            return True
        memory, _ = self.traits.memory_of(work.adapter for work in works)
        return memory.nbytes([length for work in works for length in work.shape.lengths]) <= self._pass_memory_bytes

    def _groups_by_graph(self, works: Sequence[Work], stashes: Sequence[TorchStash]) -> list[list[int]]:
        """Return indices of backwards to run on the kept graphs of their forwards, one group per graph.

        Empty if one pass for all from linear outputs is cheaper: it reads the weights once, but computes more.
        """
        groups = with_common_graphs(stashes)
        tokens = [sum(works[place].shape.total_tokens for place in group) for group in groups]
        all_tokens = sum(work.shape.total_tokens for work in works)
        others = all_tokens - sum(tokens)
        if len(groups) == 1 and not others:
            return groups
        by_graph, from_linear_outputs = self.traits.costs.backward, self.traits.costs.backward_from_linear_outputs
        seconds = sum(by_graph.seconds(of_group) for of_group in tokens)
        if others:
            seconds += from_linear_outputs.seconds(others)
        return groups if seconds <= from_linear_outputs.seconds(all_tokens) else []

    def _merged(self, works: Sequence[Work], parts: Sequence[Pass]) -> MergedPass:
        """Build the pass of these requests: packed, stacked, or one alone (all have the same `sharing`)."""
        sharing, shared = works[0].sharing, len(works) > 1
        if (isinstance(sharing, Packed) and (shared or self._pass_tokens)) or self._is_long_row(works[0]):
            sequences = [_sequences(part, work) for part, work in zip(parts, works, strict=True)]
            shapes = [(work.shape.rows, work.shape.tokens) for work in works]
            return packed(sequences, shapes, pass_tokens=self._pass_tokens)
        if isinstance(sharing, BehindCache) and shared:
            lengths = [0 if work.cache is None else work.cache.length for work in works]
            return packed_behind_caches([as_rows(part) for part in parts], lengths)
        if isinstance(sharing, Stacked) and shared:
            return stacked([as_rows(part) for part in parts])
        (part,) = parts
        return alone(part)

    def _is_long_row(self, work: Work) -> bool:
        """Return whether to pack a request even alone: the mask of its long rows would be quadratic in their length."""
        shape = work.shape
        return not shape.fits_rows and len(shape.lengths) > shape.rows and self.traits.packs_restarts

    def _stash(self, work: Work) -> TorchStash:
        """Return the stash of a backward, or make one from its own activations."""
        if work.stash is None:
            inputs = self._inputs(work)
            return TorchStash(inputs, _reply_dtype(work), inputs.nbytes, inputs.nbytes)
        assert isinstance(work.stash, TorchStash)
        return work.stash

    def _at_revealed(self, works: Sequence[Work]) -> dict[Reveal, torch.Tensor]:
        """Return the gradients of revealed tensors, which only a request that runs alone has."""
        found = works[0].reveals
        sent = [decode_tensor(*works[0].buffers[GRADIENTS_OF[name]]) for name in found]
        moved = self._transfer.to_device(sent)
        return {name: tensor.to(self.trunk.dtype) for name, tensor in zip(found, moved, strict=True)}

    def _inputs(self, work: Work) -> Pass:
        buffers, shape = work.buffers, work.shape
        roles: list[Role] = [role for role in ("activations", "attention_mask", "position_ids") if role in buffers]
        moved = self._transfer.to_device([decode_tensor(*buffers[role]) for role in roles])
        tensors = dict(zip(roles, moved, strict=True))
        activations, positions = tensors["activations"].to(self.trunk.dtype), tensors.get("position_ids")
        rows = Rows(activations, tensors.get("attention_mask"), None if positions is None else positions.long())
        return sequences_of(rows, shape) if "lengths" in buffers else rows

    def _replies(self, role: Role, tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> list[Buffers]:
        replies = [_own(tensor.to(dtype)) for tensor, dtype in zip(tensors, dtypes, strict=True)]
        return [{role: encode_tensor(role, tensor)} for tensor in self._transfer.to_host(replies)]


def _from_common_graph(
    works: Sequence[Work],
    stashes: Sequence[TorchStash],
    tensors: Sequence[torch.Tensor],
    at_revealed: Mapping[Reveal, torch.Tensor],
) -> tuple[list[torch.Tensor], FlatGradients]:
    return gradients_of_common_graph(stashes, tensors, _trained(works), at_revealed)


def _stacked(name: Reveal, revealed: Revealed, work: Work) -> torch.Tensor:
    """Return the revealed tensors of one name as they are answered."""
    tensors = [tensor.detach() for tensor in revealed[name]]
    if name == "router_logits":
        return torch.stack(tensors)
    if not tensors:  # of a cut of one layer
        descriptor, _ = work.buffers["activations"]
        return torch.empty(0, *descriptor.shape)
    return torch.stack(tensors).view(len(tensors), work.shape.rows, work.shape.tokens, -1)


def _trained(works: Sequence[Work]) -> list[int]:
    """Return the indices of backwards that ask for the gradients of their adapters."""
    return [index for index, work in enumerate(works) if work.adapter is not None and work.adapter.trains]


def _sequences(part: Pass, work: Work) -> Sequences:
    return part if isinstance(part, Sequences) else sequences_of(part, work.shape)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a view to its own memory: a cached answer must not keep the memory of its whole pass."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _adapter_dtype(work: Work) -> torch.dtype:
    assert work.adapter is not None
    return TORCH_DTYPES[work.adapter.version.dtype]


def _reply_dtype(work: Work) -> torch.dtype:
    return TORCH_DTYPES[work.buffers["activations"][0].dtype]
