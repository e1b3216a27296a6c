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
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

import zsl
from support.embedded import served
from support.models import CUT, local_model, with_lora
from support.tokenizer import tiny_tokenizer, words
from support.trainer_settings import silent_settings
from zsl.client.crossing import PaddingMode
from zsl.models.divide import divide
from zsl.models.reference import resolve
from zsl.split.cut import parse_cut

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
def split(path: str) -> Iterator[Callable[..., PreTrainedModel]]:
    """A split model, made anew each time."""

    def made(source: str = path, padding: PaddingMode = "drop") -> PreTrainedModel:
        trunk.padding = padding
        return zsl.load_client(source, trunk, layers="client")

    with served(path) as endpoint, zsl.RemoteTrunk(endpoint) as trunk:
        yield made


def losses(
    kind: Any,
    config: Any,
    directory: Path,
    rows: dict[str, Any],
    how: dict[str, Any],
    *,
    log: str = "loss",
    **models: Any,
) -> Any:
    """Train, and return what is logged under `log`, a number a step."""
    set_seed(0)
    arguments = config(**silent_settings(directory, STEPS), **how)
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    trainer = kind(args=arguments, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer, **models)
    trainer.train()
    found = [entry[log] for entry in trainer.state.log_history if log in entry]
    assert len(found) == STEPS and len(set(found)) == STEPS
    return found


def prompts() -> list[str]:
    return [words(*range(n, n + 2 + n % 3)) + " " for n in range(6)]


def preferences() -> dict[str, Any]:
    chosen, rejected = ([words(*range(k * n, k * n + 2 + n % k)) for n in range(6)] for k in (3, 5))
    return {"prompt": prompts(), "chosen": chosen, "rejected": rejected}


def with_outer_layers_to_train(model: PreTrainedModel) -> PreTrainedModel:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers.2." not in name and ".layers.3." not in name)
    return model


def test_dpo_without_peft_loads_the_whole_model_as_its_reference_and_takes_no_part_for_it(
    path: str, split: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    def trained(model: PreTrainedModel, **how: Any) -> Any:
        return losses(DPOTrainer, DPOConfig, tmp_path, preferences(), how, model=with_outer_layers_to_train(model))

    assert trained(split(padding="send")) == trained(local_model(path))
    # A split model has fewer parameters than such a reference: it is not brought into step, and TRL says so.
    with pytest.raises((RuntimeError, ValueError), match=r"size of tensor|zip"):
        trained(split(), sync_ref_model=True, ref_model_sync_steps=1)
    divide(resolve(path), parse_cut(CUT), tmp_path / "parts")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        trained(split(str(tmp_path / "parts" / "client")))


def test_metrics_of_all_positions_are_the_local_ones_where_padding_is_sent(
    path: str, split: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    def trained(model: PreTrainedModel) -> Any:
        how = {"max_length": 32, "remove_unused_columns": False}
        return losses(
            ORPOTrainer, ORPOConfig, tmp_path, preferences(), how, log="logits/chosen", model=with_lora(model)
        )

    local = trained(local_model(path))
    assert trained(split(padding="send")) == local
    assert trained(split()) != pytest.approx(local, rel=0.01)


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
        reference = copy.deepcopy(with_outer_layers_to_train(model))
        before = copy.deepcopy(reference.lm_head.weight)
        found.append(losses(KTOTrainer, KTOConfig, tmp_path, rows, how, model=model, ref_model=reference))
        assert not torch.equal(reference.lm_head.weight, before), "nothing was brought into step"
    assert found[0] == pytest.approx(found[1], rel=ROUNDING)


def test_a2po_samples_and_learns_as_on_the_local_model_with_a_cache_and_without(
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

    without, with_one = (trained(local_model(path), cache=cache) for cache in (False, True))
    assert trained(split(), cache=False) == pytest.approx(without, rel=ROUNDING)
    assert trained(split(), cache=True) == pytest.approx(with_one, rel=ROUNDING)
    assert with_one != pytest.approx(without, rel=1e-2)
