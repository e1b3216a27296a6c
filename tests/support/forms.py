"""Batches in every form that trainers send: padded, packed, with positions of their own; each made from a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .batches import tokens

Batch = dict[str, Any]

# Few lengths, so that a trunk that only stacks finds rows of equal length, and no more than 3 x 12 tokens, so that
# every batch is small enough to be merged.
LENGTHS = (8, 12)
MOST_ROWS = 3
# How far a gradient may be from the whole local model's (see `largest_difference`).
TOLERANCE = 1e-5
# Rounding is as large as a step's largest gradients make it. So parts that nearly cancel, as in gradients of queries,
# or that cancel, as where there is one token, are compared with this share of the largest.
LEAST_SHARE = 1e-2


def plain(seed: int) -> Batch:
    ids = _ids(seed)
    return {"input_ids": ids, "labels": ids}


def left_padded(seed: int) -> Batch:
    ids = _ids(seed)
    return _masked(ids, _at(ids) >= ids.shape[1] - _lengths(ids, seed))


def left_padded_with_positions(seed: int) -> Batch:
    """As generation counts: from the first real token."""
    batch = left_padded(seed)
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(0)}


def right_padded(seed: int) -> Batch:
    ids = _ids(seed)
    return _masked(ids, _at(ids) < _lengths(ids, seed))


def ragged(seed: int) -> Batch:
    """Padded in front and behind."""
    ids = _ids(seed)
    lengths = _lengths(ids, seed)
    starts = (ids.shape[1] - lengths) // 2
    return _masked(ids, (_at(ids) >= starts) & (_at(ids) < starts + lengths))


def with_holes(seed: int) -> Batch:
    ids = _ids(seed)
    mask = torch.rand(ids.shape, generator=_random(seed)) < 0.7
    mask[:, -1] = True
    return _masked(ids, mask)


def packed_by_trl(seed: int) -> Batch:
    ids = tokens(1, _length(seed), seed)[0].tolist()
    cuts = _cuts(len(ids), _random(seed))
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch: Batch = collator(
        [{"input_ids": ids[start:end]} for start, end in zip([0, *cuts], [*cuts, None], strict=True)]
    )
    return batch


def restarting_in_rows(seed: int) -> Batch:
    """Several sequences in each of several rows, told apart by their positions."""
    ids, random = _ids(seed), _random(seed)
    return _with_positions(ids, torch.stack([_restarting(ids.shape[1], random) for _ in ids]))


def restarting_alike(seed: int) -> Batch:
    """One row of positions for all rows."""
    ids = _ids(seed)
    return _with_positions(ids, _restarting(ids.shape[1], _random(seed)).unsqueeze(0))


def shifted(seed: int) -> Batch:
    """Positions that begin anywhere, other for each row."""
    ids = _ids(seed)
    return _with_positions(ids, _at(ids) + torch.randint(1, 40, (len(ids), 1), generator=_random(seed)))


def one_token(seed: int) -> Batch:
    """Each row a sequence of one token, with nothing behind it that were to be predicted."""
    ids = tokens(1 + seed % MOST_ROWS, 1, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if seed % 2 else {"input_ids": ids}


FORMS: dict[str, Callable[[int], Batch]] = {
    form.__name__: form
    for form in (
        plain,
        left_padded,
        left_padded_with_positions,
        right_padded,
        ragged,
        with_holes,
        packed_by_trl,
        restarting_in_rows,
        restarting_alike,
        shifted,
        one_token,
    )
}


def gradients_of(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The gradient of each trainable parameter for one batch; without labels each token is to predict itself."""
    model.zero_grad(set_to_none=True)
    output = model(**batch)
    loss = (
        output.loss if "labels" in batch else F.cross_entropy(output.logits.flatten(0, 1), batch["input_ids"].flatten())
    )
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of two steps' gradients; NaN if one is not finite.

    Each is relative to the largest value of its own gradient, and at least to `LEAST_SHARE` of the step's largest.
    """
    assert ours.keys() == theirs.keys() and ours
    largest = torch.stack([gradient.abs().max() for gradient in theirs.values()])
    differences = torch.stack([(ours[name] - gradient).abs().max() for name, gradient in theirs.items()])
    return float((differences / largest.clamp_min(LEAST_SHARE * float(largest.max()))).max())


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _length(seed: int) -> int:
    return LENGTHS[seed % len(LENGTHS)]


def _ids(seed: int) -> torch.Tensor:  # [rows, tokens]
    return tokens(1 + seed // len(LENGTHS) % MOST_ROWS, _length(seed), seed)


def _at(ids: torch.Tensor) -> torch.Tensor:  # [1, tokens]
    return torch.arange(ids.shape[1]).unsqueeze(0)


def _lengths(ids: torch.Tensor, seed: int) -> torch.Tensor:  # [rows, 1]
    """Real tokens of each row; two at least, so that one is to be predicted."""
    return torch.randint(2, ids.shape[1], (len(ids), 1), generator=_random(seed))


def _masked(ids: torch.Tensor, real: torch.Tensor) -> Batch:
    return {
        "input_ids": ids.masked_fill(~real, 0),
        "attention_mask": real.long(),
        "labels": ids.masked_fill(~real, -100),
    }


def _with_positions(ids: torch.Tensor, positions: torch.Tensor) -> Batch:
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}


def _cuts(length: int, random: torch.Generator) -> list[int]:
    """One or two places at which a sequence ends and another begins."""
    places = torch.randint(1, length // 2, (2,), generator=random)
    return sorted({2 * int(place) for place in places})


def _restarting(length: int, random: torch.Generator) -> torch.Tensor:
    ends = torch.tensor([*_cuts(length, random), length])
    return torch.cat([torch.arange(n) for n in ends.diff(prepend=torch.zeros(1, dtype=torch.long)).tolist()])
