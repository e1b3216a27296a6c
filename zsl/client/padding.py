"""Leave the padding at home: of a padded batch only the real tokens cross, as one row of sequences.

What the layers behind the trunk compute of a padded position is not used (its attention weights are zero, its
label is ignored), so zeros stand there. A batch with labels on its padding crosses whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from zsl.errors import PaddingGradientError

NO_LABEL = -100  # what transformers' losses leave out


@dataclass(frozen=True, slots=True)
class RealTokens:
    """Where the real tokens of a batch `[rows, tokens]` are, and how they stand in the row that crosses."""

    index: torch.Tensor  # [real tokens], into the flattened batch
    lengths: torch.Tensor  # [sequences], int32
    position_ids: torch.Tensor  # [1, real tokens], int32

    def gather(self, batch: torch.Tensor) -> torch.Tensor:
        """`[rows, tokens, hidden]` to `[1, real tokens, hidden]`."""
        return batch.flatten(0, 1)[self.index].unsqueeze(0)

    def scatter(self, row: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """`[1, real tokens, hidden]` to the shape and device of `batch`, with zeros for the padding."""
        flat = torch.zeros_like(batch).flatten(0, 1)
        flat[self.index] = row[0].to(batch.device, batch.dtype)
        return flat.view(batch.shape)

    def check_padding_has_no_gradient(self, gradients: torch.Tensor) -> None:
        """Raises `PaddingGradientError` if the loss depends on padded positions."""
        padding = torch.ones(gradients.shape[:2].numel(), dtype=torch.bool, device=gradients.device)
        padding[self.index] = False
        if gradients.flatten(0, 1)[padding].any():
            raise PaddingGradientError()


def find_real_tokens(attention_mask: torch.Tensor, position_ids: torch.Tensor | None) -> RealTokens | None:
    """The real tokens of a batch `[rows, tokens]`, or None if it has no padding behind them.

    None too for padding in front of real tokens: a causal language model's loss predicts the first real token at the
    padded position before it, so what the layers make of that position counts. And for a mask with holes: there the
    distance of two tokens is not what is between them.
    """
    mask = attention_mask.detach().bool().cpu()
    rows, tokens = mask.shape
    lengths = mask.sum(1)  # [rows]
    at = torch.arange(tokens)
    if not lengths.any() or lengths.min() == tokens or not torch.equal(mask, at < lengths[:, None]):
        return None
    positions = (at if position_ids is None else position_ids.detach().cpu()).expand(rows, -1)
    # Rows of equal length side by side: the trunk attends to them at once.
    order = [row for row in lengths.argsort(stable=True).tolist() if lengths[row]]
    index = torch.cat([row * tokens + torch.arange(int(lengths[row])) for row in order])
    return RealTokens(index, lengths[order].int(), positions.flatten()[index].int().unsqueeze(0))


def has_labels_on_padding(labels: Iterable[torch.Tensor], attention_mask: torch.Tensor) -> bool:
    """Whether a loss on these labels, each `[rows, tokens]`, may depend on padded positions."""
    padding = attention_mask.detach() == 0
    return any(
        each.shape != padding.shape or bool((padding & (each != NO_LABEL).to(padding.device)).any()) for each in labels
    )
