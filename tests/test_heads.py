"""Heads other than a language model's: classification of texts and tokens, question answering, TRL's reward models."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    set_seed,
)
from trl import RewardConfig, RewardTrainer

import zsl
from support import batches
from support.embedded import served
from support.models import CUT
from support.tokenizer import tiny_tokenizer, words
from support.trainer_settings import silent_settings
from zsl.adapters.export import export
from zsl.errors import ConfigError, ModelError, WrongModelError
from zsl.models.divide import divide
from zsl.models.identity import identify
from zsl.models.reference import resolve
from zsl.split.cut import parse_cut

LABELS = 3
IDS = batches.tokens(2, 16)
TEXTS = {"input_ids": IDS, "labels": torch.tensor([0, 2])}
TOKENS = {"input_ids": IDS, "labels": IDS % LABELS}
# The softmax is over all positions: padding has a share in it.
ANSWERS = {
    "input_ids": IDS,
    "attention_mask": torch.tensor([[1] * 16, [1] * 9 + [0] * 7]),
    "start_positions": torch.tensor([0, 2]),
    "end_positions": torch.tensor([5, 7]),
}
HEADS: dict[str, tuple[str, Any, str, dict[str, Any]]] = {
    "texts": ("llama", AutoModelForSequenceClassification, "SEQ_CLS", TEXTS),
    "tokens": ("gpt2", AutoModelForTokenClassification, "TOKEN_CLS", TOKENS),
    "answers": ("gpt2", AutoModelForQuestionAnswering, "QUESTION_ANS", ANSWERS),
}


@pytest.fixture(scope="module")
def trunk_of(checkpoints: Callable[..., Path]) -> Iterator[Callable[..., zsl.RemoteTrunk]]:
    """A connection to the daemon of a family, which serves the language model."""
    daemons = {family: served(str(checkpoints(family))) for family in ("llama", "gpt2")}
    endpoints = {family: daemon.__enter__() for family, daemon in daemons.items()}
    trunks: list[zsl.RemoteTrunk] = []

    def made(family: str, **how: Any) -> zsl.RemoteTrunk:
        trunks.append(zsl.RemoteTrunk(endpoints[family], **how))
        return trunks[-1]

    yield made
    for each in trunks:
        each.close()
    for daemon in daemons.values():
        daemon.__exit__(None, None, None)


def local(path: Path, auto_class: Any, **config: Any) -> Any:
    torch.manual_seed(5)
    model = auto_class.from_pretrained(path, **config)
    model.config.use_cache = False
    return model


def split(path: Path, trunk: zsl.RemoteTrunk, auto_class: Any, **config: Any) -> Any:
    torch.manual_seed(5)
    return zsl.load_client(str(path), trunk, auto_class=auto_class, **config)


def results(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All that a model returns for a batch, and the gradients of its trainable parameters."""
    torch.manual_seed(7)  # for the dropout in front of a head
    output = model.train()(**batch)
    output.loss.backward()
    found = {name: value.detach() for name, value in output.items() if isinstance(value, torch.Tensor)}
    return found | {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return sorted(
        name for name in one.keys() | other.keys() if name not in one or not torch.equal(one[name], other[name])
    )


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_the_checkpoint_lacks_is_the_local_models_and_so_is_all_that_it_computes(
    head: str, checkpoints: Callable[..., Path], trunk_of: Callable[..., zsl.RemoteTrunk], tmp_path: Path
) -> None:
    family, auto_class, task, batch = HEADS[head]
    path = checkpoints(family)
    labels = {} if head == "answers" else {"num_labels": LABELS}
    here = split(path, trunk_of(family), auto_class, **labels)
    there = local(path, auto_class, **labels)
    weights = there.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in here.state_dict().items())

    def adapted(model: Any) -> PeftModel:
        torch.manual_seed(3)
        targets = ["c_attn", "c_proj"] if family == "gpt2" else ["q_proj", "down_proj"]
        config = LoraConfig(r=4, task_type=task, target_modules=targets, fan_in_fan_out=family == "gpt2")
        return get_peft_model(model, config)

    mine, theirs = adapted(here), adapted(there)
    expected = results(theirs, batch)
    assert len(expected) > 24 and any("modules_to_save" in name for name in expected)
    assert differing(results(mine, batch), expected) == []
    # The adapter is saved with the head, as one of the whole model.
    with torch.no_grad():
        for name, parameter in mine.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_()
    zsl.save_adapter(mine, tmp_path / "adapter", base_model=str(path))
    loaded = PeftModel.from_pretrained(local(path, auto_class, **labels), str(tmp_path / "adapter"))
    for model in (mine.eval(), loaded.eval()):
        model.config.use_cache = False
    with torch.no_grad():
        assert torch.equal(mine(**batch).loss, loaded(**batch).loss)
    with pytest.raises(ModelError, match=task):
        export([tmp_path / "adapter"], resolve(str(path)), tmp_path / "exported")


def test_a_classifier_has_the_identity_of_its_base_model_but_not_with_other_weights(
    checkpoints: Callable[..., Path], trunk_of: Callable[..., zsl.RemoteTrunk], tmp_path: Path
) -> None:
    path = checkpoints("llama")
    classifier, base = tmp_path / "classifier", tmp_path / "base"
    there = local(path, AutoModelForSequenceClassification, num_labels=LABELS)
    there.save_pretrained(classifier)
    there.base_model.save_pretrained(base)
    answers = tmp_path / "answers"
    AutoModelForQuestionAnswering.from_pretrained(base).save_pretrained(answers)
    assert len({identify(resolve(str(each))) for each in (path, classifier, base, answers)}) == 1
    here = split(classifier, trunk_of("llama"), AutoModelForSequenceClassification)
    assert torch.equal(here.score.weight, there.score.weight)
    with torch.no_grad():
        assert torch.equal(here(**TEXTS).logits, there(**TEXTS).logits)
    with pytest.raises(ModelError, match=r"LlamaForSequenceClassification.*auto_class"):
        zsl.load_client(str(classifier), trunk_of("llama"))
    # And the other way round: the daemon has the classifier, the client the language model.
    with served(str(classifier)) as endpoint, zsl.RemoteTrunk(endpoint) as trunk:
        assert type(zsl.load_client(str(path), trunk)).__name__ == "LlamaForCausalLM"
    file = classifier / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WrongModelError, match="weights"):
        split(classifier, trunk_of("llama"), AutoModelForSequenceClassification)


def test_only_a_head_may_be_missing_and_only_its_configuration_may_differ(
    checkpoints: Callable[..., Path], trunk_of: Callable[..., zsl.RemoteTrunk], tmp_path: Path
) -> None:
    path, trunk = checkpoints("llama"), trunk_of("llama")
    shutil.copytree(path, tmp_path / "lacks")
    file = tmp_path / "lacks" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with served(str(tmp_path / "lacks")) as endpoint, zsl.RemoteTrunk(endpoint) as other:
        with pytest.raises(ModelError, match=r"model\.norm\.weight"):
            split(tmp_path / "lacks", other, AutoModelForSequenceClassification)
    # That class looks for the base model under another name than a language model's checkpoint has.
    with pytest.raises(ModelError, match=r"lacks transformer\."):
        split(path, trunk, AutoModelForQuestionAnswering)
    for wrong in ({"layer": "all"}, {"num_labels": "three"}, {"to_dict": {}}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            split(path, trunk, AutoModelForSequenceClassification, **wrong)
    for no_class in (torch.nn.Linear, "AutoModelForCausalLM"):
        with pytest.raises(ConfigError, match="auto_class"):
            zsl.load_client(str(path), trunk, auto_class=no_class)
    with pytest.raises(WrongModelError, match="configuration"):
        split(path, trunk_of("llama"), AutoModelForCausalLM, rms_norm_eps=0.1)


def test_a_part_of_a_language_model_takes_another_head(
    checkpoints: Callable[..., Path], trunk_of: Callable[..., zsl.RemoteTrunk], tmp_path: Path
) -> None:
    path = checkpoints("llama")
    divide(resolve(str(path)), parse_cut(CUT), tmp_path / "parts")
    here = split(tmp_path / "parts" / "client", trunk_of("llama"), AutoModelForSequenceClassification, num_labels=1)
    there = local(path, AutoModelForSequenceClassification, num_labels=1)
    with torch.no_grad():
        assert torch.equal(here(IDS).logits, there(IDS).logits)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # TRL says it by its older name
def test_a_reward_model_has_the_local_ones_losses(
    checkpoints: Callable[..., Path], trunk_of: Callable[..., zsl.RemoteTrunk], tmp_path: Path
) -> None:
    path = checkpoints("llama")
    pairs = {
        "prompt": [words(n, n + 1) for n in range(8)],
        "chosen": [" " + words(*range(n, n + 2 + n % 3)) for n in range(8)],
        "rejected": [" " + words(*range(3 * n, 3 * n + 1 + n % 4)) for n in range(8)],
    }

    def losses(model: Any) -> list[float]:
        set_seed(0)
        arguments = RewardConfig(**silent_settings(tmp_path / "reward", 3))
        trainer = RewardTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict(pairs),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"]),
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    expected = losses(local(path, AutoModelForSequenceClassification, num_labels=1))
    trunk = trunk_of("llama", padding="send")
    assert losses(split(path, trunk, AutoModelForSequenceClassification, num_labels=1)) == expected
    assert len(set(expected)) == 3
