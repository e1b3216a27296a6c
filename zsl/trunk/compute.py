"""The torch side of the daemon: runs passes of the trunk, alone or merged. Knows no asyncio and no socket.

A request that runs alone runs in its own shape: its numbers are those of the client's whole model. A pass that
fails is run again request by request, so that one bad request fails alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from zsl.errors import InternalError, OutOfMemoryError, WireError
from zsl.trunk.attention import grouped
from zsl.trunk.joining import Joined, alone, packed, stacked
from zsl.trunk.middle import Middle, Pass
from zsl.trunk.settings import TrunkTraits
from zsl.trunk.stash import TorchStash, gradients_of_common_graph, stashes_of, take_products, with_common_graphs
from zsl.trunk.transfer import Transfer
from zsl.trunk.work import Buffers, Done, Keep, Kind, Outcome, Work
from zsl.wire.messages import Role
from zsl.wire.tensors import TORCH_DTYPES, decode_tensor, encode_tensor

logger = logging.getLogger(__name__)

_WITH_PRODUCTS = (Keep.PRODUCTS, Keep.GRAPH_AND_PRODUCTS)
_WITH_GRAPH = (Keep.GRAPH, Keep.GRAPH_AND_PRODUCTS)


class TorchCompute:
    """Computes forwards and backwards of one trunk, in the one thread that calls it.

    Requests that share a pass are packed into one row, where the trunk packs, else stacked row on row. If it is
    deterministic, every pass that may be shared has just `max_batch_tokens` tokens, filled with zeros, so that a
    request's numbers do not depend on who shares it; longer requests run alone.
    """

    def __init__(self, middle: Middle, traits: TrunkTraits) -> None:
        self.traits = traits
        self._middle = middle
        self._pass_tokens = traits.batch_limits.max_batch_tokens if traits.deterministic else 0
        self._transfer = Transfer(middle.device)

    def run(self, works: Sequence[Work]) -> list[Outcome]:
        if len(works) > 1:
            try:
                return list(self._run(works))
            except Exception:
                logger.exception("a merged pass of %d requests failed; running them one by one", len(works))
        return [self._run_alone(work) for work in works]

    def _run_alone(self, work: Work) -> Outcome:
        try:
            return self._run([work])[0]
        except WireError as error:
            return error
        except torch.OutOfMemoryError:
            return OutOfMemoryError("the trunk's device has no memory for this request; send fewer tokens at once")
        except Exception as error:
            if isinstance(error, RuntimeError) and "allocate memory" in str(error):
                return OutOfMemoryError("the trunk has no memory for this request; send fewer tokens at once")
            logger.exception("a %s failed", work.kind.value)
            return InternalError(f"the trunk failed in this {work.kind.value}; its log says why")

    def _run(self, works: Sequence[Work]) -> list[Done]:
        return self._forward(works) if works[0].kind is Kind.FORWARD else self._backward(works)

    def _forward(self, works: Sequence[Work]) -> list[Done]:
        parts = [self._inputs(work) for work in works]
        joined = self._joined(works, parts)
        keeps = [work.keep for work in works]
        with_products = not set(keeps).isdisjoint(_WITH_PRODUCTS)
        graph = products = None
        if set(keeps) <= set(_WITH_GRAPH):
            graph, products = self._middle.graph_to_keep(joined.inputs, with_products=with_products)
            output = graph.output.detach()
        elif with_products:
            output, products = self._middle.forward_with_products(joined.inputs)
        else:
            output = self._middle.forward(joined.inputs)
        dtypes = [_reply_dtype(work) for work in works]
        replies = self._replies("activations", joined.split(output), dtypes)
        stashes = stashes_of(joined, parts, dtypes, keeps, graph, products)
        return [Done(reply, stash) for reply, stash in zip(replies, stashes, strict=True)]

    def _backward(self, works: Sequence[Work]) -> list[Done]:
        stashes = [self._stash(work) for work in works]
        tensors = self._transfer.to_device([decode_tensor(*work.buffers["gradients"]) for work in works])
        tensors = [tensor.to(self._middle.dtype) for tensor in tensors]
        results: dict[int, torch.Tensor] = {}  # by the place of a request
        for group in self._groups_by_graph(works, stashes):
            gradients = gradients_of_common_graph([stashes[p] for p in group], [tensors[p] for p in group])
            results.update(zip(group, gradients, strict=True))
        rest = [place for place in range(len(works)) if place not in results]
        if rest:
            of_rest = [stashes[place] for place in rest]
            joined = self._joined([works[place] for place in rest], [stash.inputs for stash in of_rest])
            products = take_products(of_rest)
            graph = self._middle.graph(joined.inputs, None if products is None else joined.join_products(products))
            gradients = joined.split(graph.gradients(joined.join([tensors[place] for place in rest])))
            results.update(zip(rest, gradients, strict=True))
        ordered = [results[place] for place in range(len(works))]
        return [Done(reply) for reply in self._replies("gradients", ordered, [stash.reply_dtype for stash in stashes])]

    def _groups_by_graph(self, works: Sequence[Work], stashes: Sequence[TorchStash]) -> list[list[int]]:
        """Which of these backwards go by the graphs of their forwards, one pass for each, if that is cheaper than one
        pass for all from products: that one reads the weights once, but computes more."""
        groups = with_common_graphs(stashes)
        tokens = [sum(works[place].shape.total_tokens for place in group) for group in groups]
        all_tokens = sum(work.shape.total_tokens for work in works)
        others = all_tokens - sum(tokens)
        if len(groups) == 1 and not others:
            return groups
        by_graph, from_products = self.traits.costs.backward, self.traits.costs.backward_from_products
        seconds = sum(by_graph.seconds(of_group) for of_group in tokens)
        if others:
            seconds += from_products.seconds(others)
        return groups if seconds <= from_products.seconds(all_tokens) else []

    def _joined(self, works: Sequence[Work], parts: Sequence[Pass]) -> Joined:
        shared = self._pass_tokens and works[0].shape.packable and works[0].shape.total_tokens <= self._pass_tokens
        if shared or (self.traits.packs and len(parts) > 1):
            return packed(parts, pass_tokens=self._pass_tokens)
        return alone(parts[0]) if len(parts) == 1 else stacked(parts)

    def _stash(self, work: Work) -> TorchStash:
        """What was kept for a backward, or what it brings along."""
        if work.stash is None:
            inputs = self._inputs(work)
            return TorchStash(inputs, _reply_dtype(work), inputs.nbytes)
        assert isinstance(work.stash, TorchStash)
        return work.stash

    def _inputs(self, work: Work) -> Pass:
        buffers, shape = work.buffers, work.shape
        roles: list[Role] = [role for role in ("activations", "attention_mask", "position_ids") if role in buffers]
        moved = self._transfer.to_device([decode_tensor(*buffers[role]) for role in roles])
        tensors = dict(zip(roles, moved, strict=True))
        positions = tensors.get("position_ids")
        return Pass(
            activations=tensors["activations"].to(self._middle.dtype),
            attention_mask=tensors.get("attention_mask"),
            position_ids=None if positions is None else positions.long(),
            groups=grouped(shape.lengths) if "lengths" in buffers else None,
        )

    def _replies(self, role: Role, tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> list[Buffers]:
        replies = [_own(tensor.to(dtype)) for tensor, dtype in zip(tensors, dtypes, strict=True)]
        return [{role: encode_tensor(role, tensor)} for tensor in self._transfer.to_host(replies)]


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory of its own: an answer is kept for a while, and must not keep all of its pass."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _reply_dtype(work: Work) -> torch.dtype:
    return TORCH_DTYPES[work.buffers["activations"][0].dtype]
