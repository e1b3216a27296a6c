"""Padding stays at home: only real tokens cross, and what comes back is what the whole model gives them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zsl
from support import batches
from support.compare import differing, numbers_of, within
from support.daemon import Daemon
from support.models import local_model, with_lora
from support.relay import Relay
from zsl.client.padding import find_real_tokens, has_labels_on_padding
from zsl.errors import ModelError, PaddingGradientError
from zsl.wire.frames import KIND, MAGIC, MAJOR, decode
from zsl.wire.messages import TO_DAEMON, Forward, MessageType


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_real_tokens_come_back_to_their_places_and_padding_is_zero(rows: list[int]) -> None:
    tokens = max(rows) + 1
    mask = torch.zeros(len(rows), tokens, dtype=torch.long)
    for row, length in enumerate(rows):
        mask[row, :length] = 1
    real = find_real_tokens(mask, None)
    if not mask.any():
        assert real is None
        return
    assert real is not None
    batch = torch.randn(len(rows), tokens, 3)
    crossed = real.gather(batch)
    assert crossed.shape == (1, int(mask.sum()), 3)
    assert real.lengths.tolist() == sorted(length for length in rows if length)
    assert torch.equal(real.scatter(crossed, batch), batch * mask.unsqueeze(-1))
    columns = torch.arange(tokens).expand(len(rows), -1)
    assert torch.equal(real.gather(columns.unsqueeze(-1))[..., 0], real.position_ids)


def test_a_batch_without_padding_crosses_as_it_is() -> None:
    assert find_real_tokens(torch.ones(2, 4), None) is None


@pytest.mark.parametrize("row", [[1, 0, 1, 1], [0, 0, 1, 1], [0, 1, 1, 0]])
def test_a_mask_with_holes_or_padding_in_front_crosses_whole(row: list[int]) -> None:
    assert find_real_tokens(torch.tensor([row]), None) is None


def test_no_padding_behind_real_tokens_is_sent(serve: Callable[..., Daemon], checkpoints: Callable[..., Path]) -> None:
    with Relay(serve("llama").endpoint) as relay:
        trunk = zsl.RemoteTrunk(relay.endpoint)
        model = zsl.load_client(str(checkpoints("llama")), trunk)
        batch = batches.padded("right")
        with torch.no_grad():
            model(**batch)
        trunk.close()
        frames = relay.from_client
    forward = KIND.pack(MAGIC, MAJOR, MessageType.FORWARD, 0)
    sent = [
        decode(frames[i : i + 5], TO_DAEMON).header for i, frame in enumerate(frames) if frame[: KIND.size] == forward
    ]
    (header,) = sent
    assert isinstance(header, Forward)
    shapes = {descriptor.role: descriptor.shape for descriptor in header.tensors}
    assert shapes == {"activations": (1, 30, 32), "position_ids": (1, 30), "lengths": (3,)}


def differing_from_the_whole_model(path: Path, daemon: Daemon, batch: dict[str, Any]) -> list[str]:
    trunk = zsl.RemoteTrunk(daemon.endpoint)
    split, whole = with_lora(zsl.load_client(str(path), trunk)), with_lora(local_model(str(path)))
    found = differing(numbers_of(split, batch), numbers_of(whole, batch), within(1e-6))
    trunk.close()
    return found


def test_a_mask_with_holes_gives_what_the_whole_model_gives(
    serve: Callable[..., Daemon], checkpoints: Callable[..., Path]
) -> None:
    batch = batches.padded("right")
    batch["attention_mask"][0, 4:7] = 0
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    assert differing_from_the_whole_model(checkpoints("mistral"), serve("mistral"), batch) == []


def test_a_mask_of_ones_beside_positions_that_start_again_is_kept(
    serve: Callable[..., Daemon], checkpoints: Callable[..., Path]
) -> None:
    """With a mask transformers does not take such positions for several sequences; nor must the trunk."""
    batch = batches.packed()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert differing_from_the_whole_model(checkpoints("llama"), serve("llama"), batch) == []


@pytest.mark.parametrize("mode", ["exact", "straight-through"])
def test_a_loss_that_depends_on_padding_is_an_error_not_a_wrong_gradient(
    mode: Any, serve: Callable[..., Daemon], checkpoints: Callable[..., Path]
) -> None:
    trunk = zsl.RemoteTrunk(serve("llama").endpoint, mode=mode)
    model = with_lora(zsl.load_client(str(checkpoints("llama")), trunk))
    batch = batches.padded("right")
    del batch["labels"]
    with pytest.raises(PaddingGradientError):
        model(**batch).logits.sum().backward()
    trunk.close()


def padded_with_labels() -> dict[str, Any]:
    """The last row has no real token at all."""
    batch = batches.padded("right")
    batch["attention_mask"][2] = 0
    return {**batch, "labels": batches.tokens(3, 16)}


@pytest.mark.filterwarnings("ignore:mode is 'none'")
@pytest.mark.parametrize("mode", ["exact", "straight-through", "none"])
def test_labels_on_padding_count_as_on_the_whole_model(
    mode: Any, serve: Callable[..., Daemon], checkpoints: Callable[..., Path]
) -> None:
    path, batch = str(checkpoints("llama")), padded_with_labels()
    with zsl.RemoteTrunk(serve("llama").endpoint, mode=mode) as trunk:
        split, whole = with_lora(zsl.load_client(path, trunk)), with_lora(local_model(path))
        with torch.no_grad():
            assert torch.equal(split(**batch).loss, whole(**batch).loss)
        different = differing(numbers_of(split, batch), numbers_of(whole, batch))
    if mode == "exact":
        assert different == []
    assert [name for name in different if not re.search(r"layers\.[01]\.", name)] == [], "the top's numbers are exact"


def test_labels_on_real_tokens_only_let_padding_stay_at_home() -> None:
    batch = batches.padded("right")
    mask = batch["attention_mask"]
    assert not has_labels_on_padding([batch["labels"]], mask)
    assert has_labels_on_padding([batch["labels"], batches.tokens(3, 16)], mask)
    assert has_labels_on_padding([batch["labels"][:, 1:]], mask), "labels of another shape may stand anywhere"


def test_padding_that_is_sent_gives_the_local_bits_at_every_position(
    serve: Callable[..., Daemon], checkpoints: Callable[..., Path]
) -> None:
    path, batch = str(checkpoints("llama")), batches.padded("right")
    with zsl.RemoteTrunk(serve("llama").endpoint, padding="send") as trunk:
        split, whole = with_lora(zsl.load_client(path, trunk)), with_lora(local_model(path))
        assert differing(numbers_of(split, batch), numbers_of(whole, batch)) == []
        with torch.no_grad():
            assert torch.equal(split(**batch).logits, whole(**batch).logits)
            trunk.padding = "drop"
            assert not torch.equal(split(**batch).logits, whole(**batch).logits)


def test_a_mask_or_positions_of_another_shape_than_the_batch_are_refused(
    serve: Callable[..., Daemon], checkpoints: Callable[..., Path]
) -> None:
    with zsl.RemoteTrunk(serve("llama").endpoint) as trunk:
        trunk.connect()
        batch = torch.zeros(2, 8, 32)
        for mask, positions in (
            (torch.ones(2, 6), None),
            (torch.ones(1, 8), None),
            ({"full_attention": None}, None),
            (None, torch.arange(6).unsqueeze(0)),
        ):
            trunk.observe_inputs(mask, positions)  # type: ignore[arg-type]
            with pytest.raises(ModelError, match="cannot cross"):
                trunk(batch)
