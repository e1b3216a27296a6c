"""The ecosystem's own trainers take a split model as it is, and train it as they train the whole local one.

One client alone, in float32: bit for bit where both compute the same shapes. A padded batch crosses without its padding
and so rounds otherwise; under autocast the trunk keeps to its own dtype.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, EarlyStoppingCallback, Trainer, TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

import zsl
from support.daemon import Daemon
from support.data import synthetic_rows
from support.models import VOCABULARY, local_model
from support.tokenizer import tiny_tokenizer, words
from zsl.cli.train import train as zsl_train
from zsl.client.trunk_client import TrunkClient

STEPS = 50
FEW_STEPS = 6
TARGETS = ["q_proj", "v_proj", "up_proj"]
OUTER_LAYERS = [0, 1, 4, 5]
DROPOUT = 0.1
# Of a loss near 5, in float32, after a few steps.
ROUNDING = 1e-6
# What one rounding to bfloat16, which has 8 bits, may change.
BFLOAT16_ROUNDING = 2**-8

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning"),  # TRL says it by its older name
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # torch's data loaders fork
]


@dataclass(frozen=True)
class Models:
    """A split model and the whole local one, made anew each time, with one and the same adapter at first."""

    path: str
    trunk: zsl.RemoteTrunk

    def bare(self) -> Any:
        return zsl.load_client(self.path, self.trunk, layers="client")

    def split(self) -> PeftModel:
        set_seed(0)
        return get_peft_model(self.bare(), lora())

    def local(self) -> PeftModel:
        model = get_peft_model(local_model(self.path), lora(layers_to_transform=OUTER_LAYERS, layers_pattern="layers"))
        return with_adapter(model, adapter_of(self.split()))


@dataclass(frozen=True)
class Trained:
    """Results of a training."""

    losses: list[float]
    evaluations: list[float]
    adapter: dict[str, torch.Tensor]


def lora(**more: Any) -> LoraConfig:
    """With dropout: whatever the way through the trunk drew of the random numbers would show."""
    return LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", lora_dropout=DROPOUT, **more)


def adapter_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}


def with_adapter(model: PeftModel, adapter: dict[str, torch.Tensor]) -> PeftModel:
    assert adapter_of(model).keys() == adapter.keys()
    model.load_state_dict(adapter, strict=False)
    return model


def trained(trainer: Trainer, **how: Any) -> Trained:
    trainer.train(**how)
    log = trainer.state.log_history
    losses, evaluations = ([entry[key] for entry in log if key in entry] for key in ("loss", "eval_loss"))
    return Trained(losses, evaluations, adapter_of(trainer.model))


def differing(one: Trained, other: Trained) -> list[str]:
    """The names of what is not the same, to the bit."""
    assert one.adapter.keys() == other.adapter.keys() and one.losses and one.adapter
    names = [name for name in ("losses", "evaluations") if getattr(one, name) != getattr(other, name)]
    return names + [name for name, tensor in one.adapter.items() if not torch.equal(tensor, other.adapter[name])]


def arguments(directory: Path, *, kind: Any = TrainingArguments, **changes: Any) -> Any:
    common = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 2,
        "max_steps": FEW_STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "seed": 0,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    return kind(**{**common, **changes})


# TRL's own defaults are bfloat16 and checkpointing.
sft_arguments = partial(arguments, kind=SFTConfig, bf16=False, gradient_checkpointing=False)


@pytest.fixture(scope="module")
def models(checkpoints: Callable[..., Path], serve: Callable[..., Daemon]) -> Iterator[Models]:
    trunk = zsl.RemoteTrunk(serve("llama").endpoint)
    yield Models(str(checkpoints("llama")), trunk)
    trunk.close()


def token_rows(samples: int = 100) -> list[list[int]]:
    return synthetic_rows(samples, 16, VOCABULARY, seed=0)


def full_rows(samples: int = 100) -> Dataset:
    rows = token_rows(samples)
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def ragged_rows() -> Dataset:
    """Rows of many lengths, so that their batches are padded."""
    return Dataset.from_dict({"input_ids": [row[: 3 + 5 * n % 13] for n, row in enumerate(token_rows(40))]})


# --- fifty steps, five ways ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fifty_steps(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """The same model, data and seed for each."""
    directory = tmp_path_factory.mktemp("fifty")
    data, plain = full_rows(), arguments(directory, max_steps=STEPS)
    sft: dict[str, Any] = {"args": sft_arguments(directory, max_steps=STEPS), "processing_class": tiny_tokenizer()}
    return {
        "local": trained(Trainer(model=models.local(), args=plain, train_dataset=data)),
        "split": trained(Trainer(model=models.split(), args=plain, train_dataset=data)),
        "local, trl": trained(SFTTrainer(model=models.local(), train_dataset=data, **sft)),
        "split, trl": trained(SFTTrainer(model=models.bare(), train_dataset=data, peft_config=lora(), **sft)),
        "split, trl with the model's loss": trained(WithTheModelsLoss(model=models.split(), train_dataset=data, **sft)),
    }


class WithTheModelsLoss(SFTTrainer):
    """TRL computes losses by a kernel of its own; this is all of it but that."""

    compute_loss = Trainer.compute_loss


def test_fifty_steps_of_trainer_on_the_split_model_are_those_on_the_local_one(fifty_steps: dict[str, Trained]) -> None:
    split, local = fifty_steps["split"], fifty_steps["local"]
    assert len(split.losses) == STEPS
    assert differing(split, local) == []
    assert split.losses[-1] < split.losses[0] - 0.1


def test_fifty_steps_of_sft_trainer_with_its_own_peft_config_are_those_on_the_local_one(
    fifty_steps: dict[str, Trained],
) -> None:
    assert len(fifty_steps["split, trl"].losses) == STEPS
    assert differing(fifty_steps["split, trl"], fifty_steps["local, trl"]) == []


def test_fifty_steps_of_sft_trainer_are_those_of_trainer_but_for_its_own_loss(fifty_steps: dict[str, Trained]) -> None:
    assert differing(fifty_steps["split, trl with the model's loss"], fifty_steps["local"]) == []
    assert fifty_steps["split, trl"].losses == pytest.approx(fifty_steps["local"].losses, rel=1e-5)


def test_fifty_steps_of_zsl_train_are_those_of_trainer_on_the_local_model(
    fifty_steps: dict[str, Trained], models: Models, tmp_path: Path
) -> None:
    settings = {
        "data.samples": 100,
        "data.max_length": 16,
        "peft.r": 4,
        "peft.lora_alpha": lora().lora_alpha,
        "peft.lora_dropout": DROPOUT,
        "peft.target_modules": TARGETS,
        "train.max_steps": STEPS,
        "train.learning_rate": 1e-2,
        "train.seed": 0,
        "train.use_cpu": True,
    }
    options = [option for key, value in settings.items() for option in ("--set", f"{key}={json.dumps(value)}")]
    command = ["--model", models.path, "--server", models.trunk.endpoint, "--save-dir", str(tmp_path), *options]
    result = CliRunner().invoke(zsl_train, command)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == fifty_steps["local"].losses
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    expected = {name.replace(".default", ""): tensor for name, tensor in fifty_steps["local"].adapter.items()}
    assert saved.keys() == expected.keys()
    assert [name for name in saved if not torch.equal(saved[name], expected[name])] == []


# --- Trainer -------------------------------------------------------------------------------------------------------

EVALUATED = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4}
ACCUMULATED = {"gradient_accumulation_steps": 4, "max_grad_norm": 0.1, "warmup_steps": 3, "lr_scheduler_type": "cosine"}


@pytest.mark.parametrize(
    "how",
    [
        {**ACCUMULATED, **EVALUATED},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"dataloader_num_workers": 1},
    ],
    ids=["accumulation, clipping, schedule, evaluation", "checkpointing", "reentrant checkpointing", "a worker"],
)
def test_trainer_does_with_the_split_model_what_it_does_with_the_local_one(
    how: dict[str, Any], models: Models, tmp_path: Path
) -> None:
    split, local = (
        trained(
            Trainer(
                model=model,
                args=arguments(tmp_path, **how),
                train_dataset=full_rows(),
                eval_dataset=full_rows(12) if "eval_strategy" in how else None,
            )
        )
        for model in (models.split(), models.local())
    )
    assert differing(split, local) == []
    assert len(split.losses) == FEW_STEPS
    assert len(split.evaluations) == (2 if "eval_strategy" in how else 0)


def test_padding_changes_losses_by_rounding_only(models: Models, tmp_path: Path) -> None:
    data = ragged_rows()
    split, local = (
        trained(
            Trainer(
                model=model,
                args=arguments(tmp_path, gradient_accumulation_steps=2, **EVALUATED),
                train_dataset=data,
                eval_dataset=data.select(range(10)),
                data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
            )
        )
        for model in (models.split(), models.local())
    )
    assert differing(split, local), "the padding crossed"
    assert split.losses == pytest.approx(local.losses, rel=ROUNDING)
    assert split.evaluations == pytest.approx(local.evaluations, rel=ROUNDING)
    assert len(split.losses) == FEW_STEPS and len(split.evaluations) == 2


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests that the trunk gets."""
    requests: list[str] = []

    def counted(way: str) -> Any:
        original = getattr(TrunkClient, way)
        return lambda *arguments, **options: (requests.append(way), original(*arguments, **options))[1]

    for way in ("forward", "backward"):
        monkeypatch.setattr(TrunkClient, way, counted(way))
    return requests


@pytest.mark.parametrize("make", ["Trainer", "SFTTrainer"])
def test_checkpointing_asks_the_trunk_once_each_way_for_a_micro_batch(
    make: str, models: Models, tmp_path: Path, asked: list[str]
) -> None:
    common = {"max_steps": 2, "gradient_accumulation_steps": 3, "gradient_checkpointing": True}
    trainer = (
        Trainer(model=models.split(), args=arguments(tmp_path, **common), train_dataset=full_rows())
        if make == "Trainer"
        else SFTTrainer(
            model=models.split(),
            args=sft_arguments(tmp_path, **common),
            train_dataset=full_rows(),
            processing_class=tiny_tokenizer(),
        )
    )
    trainer.train()
    assert asked == ["forward", "backward"] * 6


@pytest.mark.filterwarnings("ignore:autocast to:UserWarning")
def test_autocast_to_bfloat16_differs_from_the_local_one_by_its_precision(models: Models, tmp_path: Path) -> None:
    """The trunk's layers are not under the client's autocast: they are more precise than the local ones, not less."""
    full, split, local = (
        trained(Trainer(model=model, args=arguments(tmp_path, bf16=bf16), train_dataset=full_rows()))
        for model, bf16 in ((models.local(), False), (models.split(), True), (models.local(), True))
    )
    assert differing(split, full), "autocast did nothing"
    assert split.losses == pytest.approx(local.losses, rel=BFLOAT16_ROUNDING)
    assert split.losses == pytest.approx(full.losses, rel=BFLOAT16_ROUNDING)


def test_best_model_early_stopping_and_resuming_work_as_on_the_local_model(models: Models, tmp_path: Path) -> None:
    def train(model: PeftModel, name: str, *, start: Path | None = None, patience: int = 100) -> tuple[Any, Trained]:
        kept = {"save_strategy": "steps", "save_steps": 3, "load_best_model_at_end": True, **EVALUATED}
        trainer = Trainer(
            model=model,
            args=arguments(tmp_path / name, max_steps=9, **kept),
            train_dataset=full_rows(),
            eval_dataset=full_rows(12),
            callbacks=[EarlyStoppingCallback(patience, early_stopping_threshold=100)],  # nothing is better by so much
        )
        result = trained(trainer, resume_from_checkpoint=start and str(start))
        return trainer.state, result

    for patience, steps in ((100, 9), (1, 6)):
        ours, split = train(models.split(), f"split-{steps}", patience=patience)
        theirs, local = train(models.local(), f"local-{steps}", patience=patience)
        assert differing(split, local) == []
        assert ours.global_step == theirs.global_step == steps
        assert Path(ours.best_model_checkpoint).name == Path(theirs.best_model_checkpoint).name
        if steps == 9:
            _, resumed = train(models.split(), "resumed", start=tmp_path / "split-9" / "checkpoint-6")
            assert differing(resumed, split) == []


# --- SFTTrainer ----------------------------------------------------------------------------------------------------


def texts(longest: int = 31) -> Dataset:
    return Dataset.from_dict({"text": [words(*range(n, n + 3 + 7 * n % (longest - 2))) for n in range(40)]})


def short_texts() -> Dataset:
    return texts(24)


def prompts_and_completions() -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [words(*range(n, n + 2 + n % 7)) + " " for n in range(40)],
            "completion": [words(*range(3 * n, 3 * n + 1 + n % 4)) for n in range(40)],
        }
    )


def chats() -> Dataset:
    said = (("user", 1), ("assistant", 2), ("user", 3), ("assistant", 4))
    return Dataset.from_dict(
        {
            "messages": [
                [{"role": role, "content": words(*range(n * turn, n * turn + 1 + n % 4))} for role, turn in said]
                for n in range(40)
            ]
        }
    )


def both_by_sft(models: Models, data: Dataset, tmp_path: Path, **how: Any) -> tuple[Trained, Trained]:
    """The split and the local model, trained."""
    split, local = (
        trained(
            SFTTrainer(
                model=model,
                args=sft_arguments(tmp_path, **{"max_length": 32, **how}),
                train_dataset=data,
                eval_dataset=data.select(range(9)) if "eval_strategy" in how else None,
                processing_class=tiny_tokenizer(),
            )
        )
        for model in (models.split(), models.local())
    )
    assert len(split.losses) == FEW_STEPS
    return split, local


@pytest.mark.parametrize(
    ("data", "how"),
    [
        (texts, {"packing": True}),
        (short_texts, {"padding_free": True, "max_length": None}),
        (prompts_and_completions, {"packing": True, **EVALUATED, "per_device_eval_batch_size": 2}),
        (chats, {"packing": True, "assistant_only_loss": True, "gradient_checkpointing": True}),
    ],
    ids=["packing", "padding-free", "completions, packed", "what the assistant says, packed"],
)
def test_sft_trainer_with_packed_rows_is_the_local_one(
    data: Callable[[], Dataset], how: dict[str, Any], models: Models, tmp_path: Path
) -> None:
    assert differing(*both_by_sft(models, data(), tmp_path, **how)) == []


@pytest.mark.parametrize(
    ("data", "how"),
    [(prompts_and_completions, EVALUATED), (chats, {"assistant_only_loss": True})],
    ids=["completions", "what the assistant says"],
)
def test_sft_trainer_with_padded_rows_is_the_local_one_where_padding_is_sent(
    data: Callable[[], Dataset],
    how: dict[str, Any],
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models.trunk, "padding", "send")
    assert differing(*both_by_sft(models, data(), tmp_path, **how)) == []


def test_checkpoints_and_model_cards_of_sft_trainer_touch_no_network(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model is a directory, so that even with the hub allowed nobody asks it."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # PEFT looks at it at every save
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("CI", "1")  # TRL counts its users elsewhere
    called: list[Any] = []
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda self, address: called.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: called.append(address))
    trainer = SFTTrainer(
        model=models.bare(),
        args=sft_arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1),
        train_dataset=full_rows(),
        peft_config=lora(),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    trainer.create_model_card()
    assert called == []
    for directory in (tmp_path / "checkpoint-2", tmp_path / "saved"):
        assert load_file(directory / "adapter_model.safetensors").keys() == {
            name.replace(".default", "") for name in adapter_of(trainer.model)
        }
        assert not (directory / "model.safetensors").exists()
    assert "trl" in (tmp_path / "README.md").read_text()


# --- accelerate ----------------------------------------------------------------------------------------------------


def accelerated(model: PeftModel, **how: Any) -> Trained:
    """A loop as people write it around `Accelerator`."""
    AcceleratorState._reset_state(reset_partial_state=True)  # another one may have been made in this process
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **how)
    set_seed(0)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    loader = DataLoader(full_rows(32).with_format("torch"), batch_size=2, shuffle=True)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    wrapped.train()
    losses = []
    for batch in loader:
        with accelerator.accumulate(wrapped):
            loss = wrapped(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), 0.2)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert accelerator.unwrap_model(wrapped) is model
    assert len(losses) == 16
    return Trained(losses, [], adapter_of(model))


def test_a_loop_with_accelerate_is_the_local_one(models: Models) -> None:
    assert differing(accelerated(models.split()), accelerated(models.local())) == []


@pytest.mark.filterwarnings("ignore:autocast to:UserWarning")
def test_a_loop_with_accelerates_autocast_is_the_local_one_but_for_its_precision(models: Models) -> None:
    split, local = (accelerated(model, mixed_precision="bf16") for model in (models.split(), models.local()))
    assert split.losses == pytest.approx(local.losses, rel=BFLOAT16_ROUNDING)
