"""The torch side of the daemon: runs passes of the trunk, alone or merged. Knows no asyncio and no socket.

A pass that fails is run again request by request, so that one bad request fails alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zsl.errors import InternalError, OutOfMemoryError
from zsl.trunk.middle import Graph, Middle
from zsl.trunk.work import Buffers, Done, Keep, Kind, Outcome, Work
from zsl.wire.messages import Role
from zsl.wire.tensors import TORCH_DTYPES, decode_tensor, encode_tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a forward is a function of, on the trunk's device."""

    activations: torch.Tensor  # [rows, tokens, hidden], in the trunk's dtype
    attention_mask: torch.Tensor | None  # [rows, tokens]
    position_ids: torch.Tensor | None  # [rows or 1, tokens]
    reply_dtype: torch.dtype

    @property
    def rows(self) -> int:
        return self.activations.shape[0]

    @property
    def nbytes(self) -> int:
        tensors = (self.activations, self.attention_mask, self.position_ids)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True, slots=True)
class TorchStash:
    """The inputs of a step, and its graph if that is kept too."""

    inputs: Inputs
    graph: Graph | None

    @property
    def nbytes(self) -> int:
        return self.inputs.nbytes + (self.graph.nbytes if self.graph else 0)

    @property
    def has_graph(self) -> bool:
        return self.graph is not None

    def without_graph(self) -> TorchStash:
        return TorchStash(self.inputs, None)


class TorchCompute:
    """Computes forwards and backwards of one trunk, in the one thread that calls it."""

    def __init__(self, middle: Middle) -> None:
        self._middle = middle
        self.parameter_count = middle.parameter_count

    def run(self, works: Sequence[Work]) -> list[Outcome]:
        if len(works) > 1:
            try:
                return list(self._run_merged(works))
            except Exception:
                logger.exception("a merged pass of %d requests failed; running them one by one", len(works))
        return [self._run_alone(work) for work in works]

    def _run_alone(self, work: Work) -> Outcome:
        try:
            return self._forward(work) if work.kind is Kind.FORWARD else self._backward(work)
        except torch.OutOfMemoryError:
            return OutOfMemoryError("the trunk's device has no memory for this request; send fewer tokens at once")
        except Exception as error:
            if isinstance(error, RuntimeError) and "allocate memory" in str(error):
                return OutOfMemoryError("the trunk has no memory for this request; send fewer tokens at once")
            logger.exception("a %s failed", work.kind.value)
            return InternalError(f"the trunk failed in this {work.kind.value}; its log says why")

    def _forward(self, work: Work) -> Done:
        inputs = self._inputs(work.buffers)
        graph = None
        if work.keep is Keep.GRAPH:
            graph = self._graph(inputs)
            output = graph.output
        else:
            with torch.no_grad():
                output = self._middle(inputs.activations, inputs.attention_mask, inputs.position_ids)
        stash = None if work.keep is Keep.NOTHING else TorchStash(inputs, graph)
        return Done(_reply("activations", output, inputs.reply_dtype), stash)

    def _backward(self, work: Work) -> Done:
        inputs, graph = self._held(work)
        gradients = self._tensor(work.buffers, "gradients").to(self._middle.dtype)
        result = (graph or self._graph(inputs)).gradients(gradients)
        return Done(_reply("gradients", result, inputs.reply_dtype))

    def _run_merged(self, works: Sequence[Work]) -> list[Done]:
        """One pass for requests of equal row shape. Only the inputs are kept: a graph would belong to them all."""
        if works[0].kind is Kind.FORWARD:
            parts = [self._inputs(work.buffers) for work in works]
            merged = _stack(parts)
            with torch.no_grad():
                output = self._middle(merged.activations, merged.attention_mask, merged.position_ids)
            return [
                Done(
                    _reply("activations", rows, part.reply_dtype),
                    TorchStash(part, None) if work.keep is not Keep.NOTHING else None,
                )
                for work, part, rows in zip(works, parts, output.split([p.rows for p in parts]), strict=True)
            ]
        parts = [self._held(work)[0] for work in works]
        gradients = torch.cat([self._tensor(work.buffers, "gradients").to(self._middle.dtype) for work in works])
        result = self._graph(_stack(parts)).gradients(gradients)
        return [
            Done(_reply("gradients", rows, part.reply_dtype))
            for part, rows in zip(parts, result.split([p.rows for p in parts]), strict=True)
        ]

    def _graph(self, inputs: Inputs) -> Graph:
        return self._middle.graph(inputs.activations, inputs.attention_mask, inputs.position_ids)

    def _held(self, work: Work) -> tuple[Inputs, Graph | None]:
        if work.stash is None:
            return self._inputs(work.buffers), None
        assert isinstance(work.stash, TorchStash)
        return work.stash.inputs, work.stash.graph

    def _inputs(self, buffers: Buffers) -> Inputs:
        return Inputs(
            activations=self._tensor(buffers, "activations").to(self._middle.dtype),
            attention_mask=self._tensor(buffers, "attention_mask") if "attention_mask" in buffers else None,
            position_ids=self._tensor(buffers, "position_ids").long() if "position_ids" in buffers else None,
            reply_dtype=TORCH_DTYPES[buffers["activations"][0].dtype],
        )

    def _tensor(self, buffers: Buffers, role: Role) -> torch.Tensor:
        return decode_tensor(*buffers[role]).to(self._middle.device)


def _stack(parts: Sequence[Inputs]) -> Inputs:
    """The inputs of a merged pass: equal tokens, rows on rows."""

    def rows(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        present = [t.expand(part.rows, -1) for t, part in zip(tensors, parts, strict=True) if t is not None]
        return torch.cat(present) if present else None

    return Inputs(
        activations=torch.cat([part.activations for part in parts]),
        attention_mask=rows([part.attention_mask for part in parts]),
        position_ids=rows([part.position_ids for part in parts]),
        reply_dtype=parts[0].reply_dtype,
    )


def _reply(role: Role, tensor: torch.Tensor, dtype: torch.dtype) -> Buffers:
    return {role: encode_tensor(role, tensor.detach().to(dtype))}
