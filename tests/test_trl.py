"""TRL's trainers that keep a reference model, or sample as they train, have the local model's losses on a split one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, set_seed
from trl import KTOConfig, KTOTrainer

import zsl
from support.embedded import served
from support.models import local_model, with_lora
from support.tokenizer import tiny_tokenizer, words

STEPS = 3
# Of a loss near 0.5: padding does not cross, so that sums round otherwise.
ROUNDING = 1e-6
DROPOUT = 0.1

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning"),  # TRL says it by its older name
    pytest.mark.filterwarnings("ignore::trl.experimental.TRLExperimentalWarning"),
]


@pytest.fixture(scope="module")
def path(checkpoints: Callable[..., Path]) -> str:
    return str(checkpoints("llama"))


@pytest.fixture(scope="module")
def split(path: str) -> Iterator[Callable[[], PreTrainedModel]]:
    """A split model, made anew each time."""
    with served(path) as endpoint, zsl.RemoteTrunk(endpoint) as trunk:
        yield lambda: zsl.load_client(path, trunk)


def losses(kind: Any, config: Any, directory: Path, rows: dict[str, Any], how: dict[str, Any], **models: Any) -> Any:
    set_seed(0)
    arguments = config(
        output_dir=str(directory),
        per_device_train_batch_size=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        **how,
    )
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    trainer = kind(args=arguments, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer, **models)
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == STEPS and len(set(found)) == STEPS
    return found


def prompts() -> list[str]:
    return [words(*range(n, n + 2 + n % 3)) + " " for n in range(6)]


def test_kto_keeps_a_copy_of_the_split_model_in_step_as_its_reference(
    path: str, split: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    rows = {
        "prompt": prompts(),
        "completion": [words(*range(3 * n, 3 * n + 2 + n % 3)) for n in range(6)],
        "label": [bool(n % 2) for n in range(6)],
    }
    how = {"sync_ref_model": True, "ref_model_sync_steps": 1}
    found = []
    for model in (split(), local_model(path)):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".layers.2." not in name and ".layers.3." not in name)
        reference = copy.deepcopy(model)
        before = copy.deepcopy(reference.lm_head.weight)
        found.append(losses(KTOTrainer, KTOConfig, tmp_path, rows, how, model=model, ref_model=reference))
        assert not torch.equal(reference.lm_head.weight, before), "nothing was brought into step"
    assert found[0] == pytest.approx(found[1], rel=ROUNDING)


def test_a2po_samples_and_learns_as_on_the_local_model_without_a_cache(
    path: str, split: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    """It samples in training mode, so that dropout draws for each token that is computed: a cache draws fewer."""
    from trl.experimental.a2po import A2POConfig, A2POTrainer

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]

    how = {"max_completion_length": 4, "num_value_samples": 2, "beta2": 1.0, "filter_all_incorrect": False}

    def trained(model: PreTrainedModel, *, cache: bool) -> Any:
        model.generation_config.use_cache = cache
        adapted = with_lora(model)
        for module in adapted.modules():
            if isinstance(module, nn.ModuleDict) and isinstance(
                module.__dict__["_modules"].get("default"), nn.Identity
            ):
                module["default"] = nn.Dropout(DROPOUT)
        return losses(A2POTrainer, A2POConfig, tmp_path, {"prompt": prompts()}, how, model=adapted, reward_funcs=reward)

    expected = trained(local_model(path), cache=False)
    assert trained(split(), cache=False) == pytest.approx(expected, rel=ROUNDING)
    assert trained(local_model(path), cache=True) != pytest.approx(expected, rel=1e-2)
