"""A split model is not saved as if it were whole, and its adapter is saved as ever."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Trainer, TrainingArguments

import zsl
from support import batches
from support.compare import differing, numbers_of
from support.embedded import served
from support.models import with_lora
from zsl.errors import ModelError

INSTEAD = r"zsl\.save_adapter, .*`zsl export` or `zsl merge`"


@pytest.fixture(scope="module")
def model(checkpoints: Callable[..., Path]) -> Iterator[Any]:
    path = str(checkpoints("llama"))
    with served(path) as endpoint:
        trunk = zsl.RemoteTrunk(endpoint)
        yield zsl.load_client(path, trunk)
        trunk.close()


@pytest.fixture
def adapted(model: Any) -> Iterator[PeftModel]:
    made = with_lora(model)
    yield made
    made.unload()


def train(model: Any, directory: Path, **arguments: Any) -> None:
    ids = batches.tokens(4, 16).tolist()
    Trainer(
        model=model,
        args=TrainingArguments(
            str(directory), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, save_steps=1, **arguments
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
    ).train()


def test_the_base_model_is_not_saved_and_the_error_says_what_is(model: Any, tmp_path: Path) -> None:
    assert type(model).__name__ == "LlamaForCausalLM"
    with pytest.raises(ModelError, match=INSTEAD):
        model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ModelError, match=INSTEAD):
        model.push_to_hub("someone/model")
    with pytest.raises(ModelError, match=r"save_strategy='no'"):
        train(model, tmp_path / "trainer")
    train(model, tmp_path / "none", save_strategy="no")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_was_merged_in_this_process_is_not_saved_either(adapted: PeftModel, tmp_path: Path) -> None:
    merged: Any = copy.deepcopy(adapted).merge_and_unload()
    with pytest.raises(ModelError, match=INSTEAD):
        merged.save_pretrained(tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


def test_the_adapter_is_saved_by_peft_and_by_trainer_as_ever(adapted: PeftModel, tmp_path: Path) -> None:
    adapted.save_pretrained(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    train(adapted, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").exists()
    train(adapted, tmp_path / "run", save_strategy="no")


def test_a_copy_is_of_the_same_class_and_is_not_saved_either(adapted: PeftModel, tmp_path: Path) -> None:
    copied: Any = copy.deepcopy(adapted)
    assert type(copied.get_base_model()) is type(adapted.get_base_model())
    assert differing(numbers_of(copied, batches.plain()), numbers_of(adapted, batches.plain())) == []
    with torch.no_grad():
        copied.get_base_model().lm_head.weight.zero_()
    assert float(adapted.get_base_model().lm_head.weight.abs().sum()) > 0
    with pytest.raises(ModelError, match=INSTEAD):
        copied.get_base_model().save_pretrained(tmp_path / "checkpoint")
