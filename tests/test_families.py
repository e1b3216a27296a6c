"""Every architecture that the finder recognises is split exactly, with no code of its own; the others are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

import zsl
from support import batches
from support.compare import differing, numbers_of, within
from support.embedded import served
from support.models import CONFIGS, LAYERS, POSITIONS, local_model, with_lora
from zsl.errors import ModelError
from zsl.split.stack import check_can_be_split
from zsl.trunk.daemon.load import plan_trunk


def with_mask(batch: dict[str, Any]) -> dict[str, Any]:
    """With it the row is one sequence, whose positions start again: the limit is on them, not on the row."""
    assert batch["input_ids"].shape[1] > POSITIONS
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


BATCHES = {
    "plain": batches.plain(),
    "right padding": batches.padded("right"),
    "left padding": batches.padded("left"),
    "packed": batches.packed(),
    "packed, longer than the positions": batches.packed((40, 30)),
    "the same with a mask": with_mask(batches.packed((40, 30))),
}
# With its padding, each has the local model's bits.
OWN_SHAPE = {name: BATCHES[name] for name in ("plain", "right padding", "left padding", "packed")}
RESHAPED = ("right padding", "packed, longer than the positions")


def text(model: Any) -> torch.Tensor:
    """Tokens generated for a left-padded batch, with keys and values on both sides of the cut."""
    padded = {key: value for key, value in BATCHES["left padding"].items() if key != "labels"}
    found: torch.Tensor = model.generate(**padded, do_sample=False, max_new_tokens=6, eos_token_id=None)
    assert found.shape == (3, 22)
    return found


@pytest.mark.parametrize("family", CONFIGS)
def test_the_split_model_is_the_local_model(family: str, checkpoints: Callable[..., Path]) -> None:
    path = str(checkpoints(family))
    with served(path) as endpoint:
        trunk = zsl.RemoteTrunk(endpoint)
        split, whole = with_lora(zsl.load_client(path, trunk)), with_lora(local_model(path))
        results = {
            # Without its padding a batch is computed in another shape, and rounds otherwise; a long packed row too.
            name: differing(numbers_of(split, b), numbers_of(whole, b), within(1e-5 if name in RESHAPED else 1e-6))
            for name, b in BATCHES.items()
        }
        assert results == {key: [] for key in BATCHES}
        trunk.padding = "send"
        exact = {name: differing(numbers_of(split, b), numbers_of(whole, b)) for name, b in OWN_SHAPE.items()}
        assert exact == {key: [] for key in OWN_SHAPE}
        with torch.no_grad():
            padded = {key: value for key, value in BATCHES["right padding"].items() if key != "labels"}
            assert torch.equal(split(**padded).logits, whole(**padded).logits), "at padding too"
        texts = [text(model.eval()) for model in (split, whole)]
        assert torch.equal(*texts)
        trunk.close()


@pytest.mark.parametrize("cut", ["0:3", "3:6", "0:6", "2:3"])
def test_a_cut_may_begin_and_end_anywhere(cut: str, checkpoints: Callable[..., Path]) -> None:
    path = str(checkpoints("llama"))
    outside = tuple(i for i in range(LAYERS) if not int(cut[0]) <= i < int(cut[2]))
    with served(path, cut=cut) as endpoint:
        trunk = zsl.RemoteTrunk(endpoint)
        split, whole = zsl.load_client(path, trunk), local_model(path)
        if outside:
            split, whole = with_lora(split, layers=outside), with_lora(whole, layers=outside)
        else:
            for model in (split, whole):
                model.requires_grad_(False).lm_head.requires_grad_(True)
        ours, theirs = numbers_of(split, batches.plain()), numbers_of(whole, batches.plain())
        assert differing(ours, theirs) == []
        trunk.close()


@pytest.mark.parametrize("family", ["bloom", "falcon", "gptj", "gpt_neo"])
def test_layers_that_return_tuples_are_refused_by_name(family: str) -> None:
    with pytest.raises(ModelError, match=f"^{family}: .*tuple"):
        check_can_be_split(CONFIG_MAPPING[family]())


def test_layers_that_need_more_than_crosses_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match="gemma3n_text"):
        check_can_be_split(CONFIG_MAPPING["gemma3n_text"]())


def test_a_model_with_two_stacks_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"t5: 2 module lists"):
        check_can_be_split(CONFIG_MAPPING["t5"]())


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_is_refused_by_name_before_anything_is_read(family: str) -> None:
    for refuse in (
        lambda: check_can_be_split(CONFIG_MAPPING[family]()),
        lambda: plan_trunk(f"random:{family}", None, torch.float32, "cpu", forward_only=False),
    ):
        with pytest.raises(ModelError, match=f"^{family}: .*causal"):
            refuse()


@pytest.mark.parametrize(("family", "reason"), [("dbrx", "cannot make this model"), ("blt", "no number of hidden")])
def test_a_configuration_that_makes_no_model_is_refused_by_name(family: str, reason: str) -> None:
    with pytest.raises(ModelError, match=f"^{family}: .*{reason}"):
        check_can_be_split(CONFIG_MAPPING[family]())


def test_a_decoder_whose_layers_get_no_2d_mask_is_refused() -> None:
    with pytest.raises(ModelError, match="BertEncoder"):
        check_can_be_split(CONFIG_MAPPING["bert"](is_decoder=True, num_hidden_layers=LAYERS))


def test_layers_that_are_left_out_at_random_are_refused_with_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"layerdrop = 0\.1"):
        check_can_be_split(CONFIG_MAPPING["opt"](**CONFIGS["opt"], layerdrop=0.1))


def test_a_model_that_fails_on_the_meta_device_without_a_reason_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError  # as a bare `assert` of a family's code

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaModel.forward", fail)
    with pytest.raises(ModelError, match=r"^llama: .*meta device \(AssertionError"):
        check_can_be_split(CONFIG_MAPPING["llama"](**CONFIGS["llama"]))
