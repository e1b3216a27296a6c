"""Leave padding out of the traffic: send only real tokens, as one row of sequences, and refuse gradients on padding.

The layers behind the trunk get zeros at padded positions: their outputs there are not used, because attention weights
are zero and labels are ignored. A batch with labels on its padding is sent whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from zsl.errors import PaddingGradientError

NO_LABEL = -100  # ignored by the losses of transformers


@dataclass(frozen=True, slots=True)
class RealTokens:
    """Indices of the real tokens of a batch `[rows, tokens]`, and lengths and positions in the row that is sent."""

    index: torch.Tensor  # [real tokens], into the flattened batch
    lengths: torch.Tensor  # [sequences], int32
    position_ids: torch.Tensor  # [1, real tokens], int32

    def gather(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the real tokens of `[rows, tokens, hidden]` as `[1, real tokens, hidden]`."""
        return batch.flatten(0, 1)[self.index].unsqueeze(0)

    def scatter(self, row: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """Return `[1, real tokens, hidden]` in shape, dtype and device of `batch`, with zeros for the padding."""
        flat = torch.zeros_like(batch).flatten(0, 1)
        flat[self.index] = row[0].to(batch.device, batch.dtype)
        return flat.view(batch.shape)

    def check_padding_has_no_gradient(self, gradients: torch.Tensor) -> None:
        """Check that gradients `[rows, tokens, hidden]` are zero on padding. Raises `PaddingGradientError`."""
        padding = torch.ones(gradients.shape[:2].numel(), dtype=torch.bool, device=gradients.device)
        padding[self.index] = False
        if gradients.flatten(0, 1)[padding].any():
            raise PaddingGradientError()


def find_real_tokens(attention_mask: torch.Tensor, position_ids: torch.Tensor | None) -> RealTokens | None:
    """Find the real tokens of a batch `[rows, tokens]`. Return None if no row is padded at its end.

    None also for padding in front of real tokens: a causal language model's loss predicts the first real token at the
    padded position before it, so the layers' output there counts. None also for a mask with gaps: dropping those would
    change the distance between tokens.
    """
    mask = attention_mask.detach().bool().cpu()
    rows, tokens = mask.shape
    lengths = mask.sum(1)  # [rows]
    at = torch.arange(tokens)
    if not lengths.any() or lengths.min() == tokens or not torch.equal(mask, at < lengths[:, None]):
        return None
    positions = (at if position_ids is None else position_ids.detach().cpu()).expand(rows, -1)
    # Rows of equal length side by side, so that the trunk computes their attention at once.
    order = [row for row in lengths.argsort(stable=True).tolist() if lengths[row]]
    index = torch.cat([row * tokens + torch.arange(int(lengths[row])) for row in order])
    return RealTokens(index, lengths[order].int(), positions.flatten()[index].int().unsqueeze(0))


def has_labels_on_padding(labels: Iterable[torch.Tensor], attention_mask: torch.Tensor) -> bool:
    """Return whether a loss on these labels, each `[rows, tokens]`, may depend on padded positions."""
    padding = attention_mask.detach() == 0
    return any(
        each.shape != padding.shape or bool((padding & (each != NO_LABEL).to(padding.device)).any()) for each in labels
    )
