"""Attention by an explicit matrix of scores, whose rounding does not depend on the other rows of a pass. Pure torch."""

from __future__ import annotations

import torch

Biases = dict[tuple[object, ...], torch.Tensor]


def attend_by_scores(
    query: torch.Tensor,  # [rows, heads, length, dim]
    key: torch.Tensor,  # [rows, key heads, length, dim]
    value: torch.Tensor,
    mask: torch.Tensor | None,  # [rows or 1, 1, length, length], bool
    scale: float,
    causal: bool,
    biases: Biases,
) -> torch.Tensor:
    """Compute `scaled_dot_product_attention` by an explicit matrix of scores: `[rows, heads, length, dim]`.

    `biases`: those without a mask that layers of one pass share; a missing one is added.
    """
    rows, heads, length, dim = query.shape
    key_heads = key.shape[1]
    shared = heads // key_heads  # query heads per key head: stacked as rows of one matrix product
    # [rows * key heads, shared * length, dim]
    query = query.reshape(rows * key_heads, shared * length, dim)
    key = key.reshape(rows * key_heads, length, dim)
    value = value.reshape(rows * key_heads, length, value.shape[-1])
    blind = None
    if mask is None:
        form = (length, shared, causal, query.dtype, query.device)
        bias = biases.get(form)
        if bias is None:
            bias = biases[form] = _bias_without_mask(length, shared, causal, query.dtype, query.device)
    else:
        blind = ~mask.any(-1, keepdim=True)  # [rows or 1, 1, length, 1]: tokens with all keys masked
        bias = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device)
        bias = bias.masked_fill(~(mask | blind), float("-inf"))[:, 0].repeat(1, shared, 1)
        if bias.shape[0] > 1:
            bias = bias.repeat_interleave(key_heads, 0)
    scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    attended = torch.bmm(weights, value).view(rows, heads, length, -1)
    # As in sdpa, a token with all keys masked gets zeros.
    return attended if blind is None else attended.masked_fill(blind, 0)


def _bias_without_mask(
    length: int, shared: int, causal: bool, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return the additive mask, 0 for visible and -inf for hidden keys: `[1, shared * length, length]`."""
    bias = torch.zeros(length, length, dtype=dtype, device=device)
    if causal:
        bias.masked_fill_(torch.ones_like(bias, dtype=torch.bool).triu(1), float("-inf"))
    return bias.repeat(shared, 1).unsqueeze(0)
