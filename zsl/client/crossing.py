"""Convert one batch to its form on the wire and back: dtype, padding, mask, positions. No autograd."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import torch

from zsl.client.padding import RealTokens, find_real_tokens, has_labels_on_padding
from zsl.client.replayable_step import CallAdapter, Step
from zsl.client.trunk_client import TrunkClient
from zsl.errors import InternalError, ModelError
from zsl.wire.frames import Message
from zsl.wire.messages import Reveal

PaddingMode = Literal["drop", "send"]


@dataclass(frozen=True, slots=True)
class CallInputs:
    """Arguments of the model's call that are not passed to its layers."""

    attention_mask: torch.Tensor | None = None  # [rows, prefix tokens + tokens]
    position_ids: torch.Tensor | None = None  # [rows or 1, tokens]
    labels: tuple[torch.Tensor, ...] = ()  # each [rows, tokens]

    def check(self, rows: int, tokens: int, past: int = 0) -> None:
        """Check that mask and positions fit a batch `[rows, tokens, hidden]` behind `past` tokens.

        Raises `ModelError`.
        """
        mask, positions = self.attention_mask, self.position_ids
        if mask is not None and not isinstance(mask, torch.Tensor):
            raise ModelError(
                f"an attention mask of type {type(mask).__name__} cannot cross to the trunk; "
                "give a tensor of shape [rows, tokens]"
            )
        keys = past + tokens
        if mask is not None and tuple(mask.shape) != (rows, keys):
            raise ModelError(
                f"an attention mask of shape {tuple(mask.shape)} cannot cross to the trunk; "
                f"give the one of shape [rows, {'past + ' if past else ''}tokens], here ({rows}, {keys})"
            )
        if positions is not None and tuple(positions.shape) not in {(rows, tokens), (1, tokens)}:
            raise ModelError(
                f"position_ids of shape {tuple(positions.shape)} cannot cross to the trunk; "
                f"give them as [rows, tokens], here ({rows}, {tokens})"
            )


@dataclass(frozen=True, slots=True)
class Crossing:
    """Form in which one batch is sent to the trunk and received. `real`: its real tokens, if padding is left out."""

    wire_dtype: torch.dtype
    attention_mask: torch.Tensor | None  # [rows, tokens], with those of a prefix or a cache
    position_ids: torch.Tensor | None  # [rows or 1, tokens]
    real: RealTokens | None

    def sent(self, batch: torch.Tensor) -> torch.Tensor:
        """Return a tensor `[rows, tokens, hidden]` as it is sent, on the CPU. Waits for a GPU that computes it."""
        return (batch if self.real is None else self.real.gather(batch)).to(self.wire_dtype).cpu()

    def received(self, tensor: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """Return a received tensor as one like `batch`. Raises `InternalError` for a wrong shape."""
        rows, tokens, hidden = batch.shape
        expected = (rows, tokens, hidden) if self.real is None else (1, len(self.real.index), hidden)
        if tuple(tensor.shape) != expected:
            raise InternalError(f"the trunk answered with a tensor of {tuple(tensor.shape)}, {expected} is due")
        if self.real is None:
            return tensor.to(batch.device, batch.dtype)
        return self.real.scatter(tensor, batch)

    def check_gradients(self, gradients: torch.Tensor) -> None:
        """Check that padding left out has no gradient. Raises `PaddingGradientError`."""
        if self.real is not None:
            self.real.check_padding_has_no_gradient(gradients)

    @property
    def _beside(self) -> dict[str, Any]:
        """Tensors that are sent with the activations."""
        return {
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "lengths": None if self.real is None else self.real.lengths,
        }

    def submit_forward(
        self, client: TrunkClient, activations: torch.Tensor, *, keep: bool, adapter: CallAdapter | None
    ) -> tuple[Step, Future[Message]]:
        return client.submit_forward(activations, keep=keep, adapter=adapter, **self._beside)

    def forward(
        self,
        client: TrunkClient,
        activations: torch.Tensor,
        *,
        keep: bool,
        adapter: CallAdapter | None,
        reveal: Sequence[Reveal] = (),
    ) -> Step:
        return client.forward(activations, keep=keep, adapter=adapter, reveal=reveal, **self._beside)


def crossing_of(
    inputs: CallInputs,
    batch: torch.Tensor,
    wire_dtype: torch.dtype,
    *,
    packs: bool,
    padding: PaddingMode,
    prefix_tokens: int = 0,
) -> Crossing:
    """Choose how a batch `[rows, tokens, hidden]` is sent: without padding, if the trunk `packs` and no label is on it.

    Padding crosses with a prefix in front of the rows, which are not packed then. Raises `ModelError` for a mask or
    positions that cannot cross.
    """
    rows, tokens, _ = batch.shape
    inputs.check(rows, tokens, prefix_tokens)
    mask, positions = inputs.attention_mask, inputs.position_ids
    if mask is not None and mask.is_floating_point():
        mask = (mask != 0).long()  # PEFT prepends ones of float32 for virtual tokens
    if mask is None or not packs:
        return Crossing(wire_dtype, mask, positions, None)
    if padding == "drop" and not prefix_tokens and not has_labels_on_padding(inputs.labels, mask):
        real = find_real_tokens(mask, positions)
        if real is not None:
            return Crossing(wire_dtype, None, real.position_ids, real)
    if positions is None and bool(mask.all()):
        mask = None  # masks nothing
    return Crossing(wire_dtype, mask, positions, None)


def crossing_behind(inputs: CallInputs, batch: torch.Tensor, wire_dtype: torch.dtype, *, past: int) -> Crossing:
    """Choose how a batch `[rows, tokens, hidden]` is sent behind `past` tokens of a cache: with its padding.

    Raises `ModelError` for a mask or positions that cannot cross.
    """
    rows, tokens = batch.shape[:2]
    inputs.check(rows, tokens, past)
    mask = None if inputs.attention_mask is None else inputs.attention_mask != 0
    if mask is not None and bool(mask.all()):
        mask = None  # masks nothing
    return Crossing(wire_dtype, mask, inputs.position_ids, None)
