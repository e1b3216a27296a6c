"""Through a daemon in another process, a split model computes what the whole local model computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zsl
from support import batches
from support.compare import differing, numbers_of, within
from support.daemon import Daemon
from support.models import local_model, with_lora

FAMILIES = ["gpt2", "llama", "qwen2"]


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, serve: Callable[..., Daemon], checkpoints: Callable[..., Path]) -> Any:
    """A split model and the whole local one, with the same LoRA weights."""
    path = str(checkpoints(request.param))
    trunk = zsl.RemoteTrunk(serve(request.param).endpoint)
    yield with_lora(zsl.load_client(path, trunk)), with_lora(local_model(path))
    trunk.close()


@pytest.mark.parametrize("batch", [batches.plain(), batches.plain(rows=4, length=31)], ids=["2x16", "4x31"])
def test_logits_loss_and_every_gradient_are_bit_equal(pair: Any, batch: dict[str, Any]) -> None:
    split, whole = pair
    assert differing(numbers_of(split, batch), numbers_of(whole, batch)) == []


@pytest.mark.parametrize(
    "batch",
    [batches.padded("left"), batches.padded("right"), batches.packed()],
    ids=["left padding", "right padding", "packed"],
)
def test_padding_and_packed_positions_are_equal_within_a_millionth(pair: Any, batch: dict[str, Any]) -> None:
    split, whole = pair
    assert differing(numbers_of(split, batch), numbers_of(whole, batch), within(1e-6)) == []


def test_the_mask_matters(pair: Any) -> None:
    """So that the test before this one could fail: the same tokens without the mask give other logits."""
    split, _ = pair
    batch = batches.padded("left")
    masked = numbers_of(split, batch)
    unmasked = numbers_of(split, {key: value for key, value in batch.items() if key != "attention_mask"})
    assert not torch.equal(masked.logits, unmasked.logits)


def test_a_changed_trunk_input_changes_the_gradient(pair: Any) -> None:
    """So that bit-equality could fail: it is a comparison of numbers that depend on the batch."""
    split, whole = pair
    assert differing(numbers_of(split, batches.plain(seed=1)), numbers_of(whole, batches.plain(seed=2))) != []


def test_ten_optimizer_steps_give_the_same_ten_losses(pair: Any) -> None:
    losses = [_train(model, steps=10) for model in pair]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 10


def test_evaluation_without_gradients_is_bit_equal(pair: Any) -> None:
    split, whole = pair
    ids = batches.tokens(2, 16)
    with torch.no_grad():
        assert torch.equal(split(input_ids=ids).logits, whole(input_ids=ids).logits)


def _train(model: torch.nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        losses.append(float(numbers_of(model, batches.plain(seed=step)).loss))
        optimizer.step()
    return losses
