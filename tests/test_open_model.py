"""Models of several adapters share base weights and connection; adapters that would change those are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

from support import batches
from support.models import CUT, local_model, with_lora, write_checkpoint
from zsl.errors import ConfigError, ModelError
from zsl.models.reference import resolve
from zsl.serving.open_model import OpenModel, open_model
from zsl.training.config.config import TrunkTable
from zsl.training.directory.trained import Trained

IDS = batches.tokens(1, 9)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "gpt2")


@pytest.fixture(scope="module")
def opened(path: Path) -> Iterator[OpenModel]:
    with open_model(resolve(str(path)), TrunkTable(cut=CUT), dtype="float32") as model:
        yield model


def test_models_of_two_adapters_and_of_none_are_right_side_by_side(
    path: Path, opened: OpenModel, tmp_path: Path
) -> None:
    places = {"all": tmp_path / "all", "own": tmp_path / "own"}
    for seed, (place, layers) in enumerate(zip(places.values(), (range(6), (0, 1, 4, 5)), strict=True)):
        with_lora(local_model(str(path)), seed=seed, layers=layers).save_pretrained(str(place))
    models = opened.copies({name: Trained([place]) for name, place in places.items()})
    weights = {parameter.data_ptr() for parameter in opened.base.parameters()}
    with torch.no_grad():
        assert torch.equal(opened.base(IDS).logits, local_model(str(path))(IDS).logits)
        for name, place in places.items():
            expected = PeftModel.from_pretrained(local_model(str(path)), place)(IDS).logits
            assert torch.equal(models[name](IDS).logits, expected), name
            frozen = [p for key, p in models[name].named_parameters() if "lora_" not in key]
            assert {parameter.data_ptr() for parameter in frozen} == weights


@pytest.mark.parametrize("kind", ["virtual tokens", "base weights"])
def test_an_adapter_that_cannot_have_neighbours_is_refused(
    kind: str, path: Path, opened: OpenModel, tmp_path: Path
) -> None:
    before = opened.base(IDS).logits
    if kind == "virtual tokens":
        adapted = get_peft_model(
            local_model(str(path)), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        )
    else:
        config = LoraConfig(
            target_modules=["c_fc"],
            layers_to_transform=[0, 5],
            layers_pattern="h",
            bias="lora_only",
            fan_in_fan_out=True,
        )
        adapted = get_peft_model(local_model(str(path)), config)
        for name, parameter in adapted.named_parameters():
            if name.endswith("c_fc.base_layer.bias"):
                parameter.data += 1
    adapted.save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match="virtual" if kind == "virtual tokens" else "zsl merge"):
        opened.copies({"x": Trained([tmp_path])})
    if kind == "virtual tokens":
        assert torch.equal(opened.base(IDS).logits, before)


def test_an_adapter_of_other_weights_or_in_parts_is_refused(opened: OpenModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="other weights"):
        opened.with_adapter(Trained([tmp_path], weights_digest="0" * 32))
    with pytest.raises(ConfigError, match="zsl export"):
        opened.with_adapter(Trained([tmp_path, tmp_path]))
