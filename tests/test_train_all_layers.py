"""`zsl-train --adapt all`: adapters on the trunk's layers too, with the numbers of a local training of all layers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, default_data_collator, set_seed

from support.models import local_model
from zsl.cli.export import export as export_command
from zsl.cli.merge import merge as merge_command
from zsl.cli.train import train as train_command
from zsl.errors import EXIT_USAGE, ConfigError
from zsl.models.reference import resolve
from zsl.training.config.arguments import trainer_arguments
from zsl.training.config.config import read_config
from zsl.training.config.peft_table import peft_config
from zsl.training.data.load import load_data
from zsl.training.directory.record import RECORD, as_bytes, configuration_of, read_record
from zsl.trunk.settings import ServerSettings
from zsl.wire.messages import AdapterLimits

STEPS = 50
LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
CONFIG = f"""
[model]
name = "{{model}}"
[trunk]
cut = "2:4"
[data]
samples = {4 * STEPS}
max_length = 16
[peft]
r = 4
lora_alpha = 16
target_modules = "all-linear"
layers = "all"
[train]
learning_rate = 1e-2
lr_scheduler_type = "cosine"
gradient_accumulation_steps = 2
save_steps = 20
seed = 0
"""


def run(command: Any, *arguments: str | Path) -> Result:
    return CliRunner().invoke(command, [str(word) for word in arguments])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[..., Path]) -> Path:
    file = tmp_path_factory.mktemp("all") / "all.toml"
    file.write_text(CONFIG.format(model=checkpoints("llama")))
    return file


@dataclass(frozen=True)
class Run:
    directory: Path
    shown: str


@pytest.fixture(scope="module")
def finished(config: Path) -> Run:
    """One whole run; several tests look at it."""
    result = run(train_command, config, "--save-dir", config.parent / "out")
    assert result.exit_code == 0, result.output
    return Run(config.parent / "out", result.stdout)


class Local(Trainer):
    """Plain Trainer that notes the losses of its micro-batches."""

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **options)
        self.__dict__.setdefault("losses", []).append(loss.detach())
        return loss


@pytest.fixture(scope="module")
def local(config: Path) -> Local:
    """The same training of the whole local model by transformers and PEFT alone."""
    return local_training(config)


def local_training(config: Path, *settings: str, **lora: Any) -> Local:
    quiet = ["train.save_strategy='no'", "train.disable_tqdm=true"]
    checked = read_config(config, settings=[*quiet, *settings], overrides={})
    data = load_data(checked.data, resolve(checked.model.name)).train
    set_seed(0)
    model = get_peft_model(local_model(checked.model.name), LoraConfig(**{**LORA, **lora}))
    arguments = trainer_arguments(checked, "local")
    trainer = Local(model, arguments, train_dataset=data, data_collator=default_data_collator)
    trainer.train()
    return trainer


def lines_in(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def weights_in(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_losses_and_weights_are_those_of_a_local_training_of_all_layers(finished: Run, local: Local) -> None:
    losses = check_same_training(finished.directory, local)
    assert len(losses) == STEPS and losses[-1] < losses[0]


def check_same_training(directory: Path, local: Local) -> list[float]:
    """Compare losses and weights, and return the losses."""
    losses = [float(sum(pair)) for pair in zip(local.losses[::2], local.losses[1::2], strict=True)]  # type: ignore[attr-defined]
    assert [line["loss"] for line in lines_in(directory)] == losses
    assert same(weights_in(directory / "adapter"), get_peft_model_state_dict(local.model))
    return losses


@pytest.mark.long
def test_dora_on_all_layers_is_trained_as_locally_and_goes_on_from_its_checkpoint(config: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "out", ["data.samples=16", "train.save_steps=2", "peft.use_dora=true"]
    command = [config, "--save-dir", out, *(word for setting in settings for word in ("--set", setting))]
    result = run(train_command, *command)
    assert result.exit_code == 0, result.output
    local = local_training(config, *settings, use_dora=True)
    assert len(check_same_training(out, local)) == 4
    assert sum("magnitude" in name for name in weights_in(out / "trunk_lora")) == 2 * 7
    shutil.rmtree(out / "checkpoint-4")
    unfinish(out)
    again = run(train_command, *command)
    assert again.exit_code == 0 and "checkpoint-2, step 2 of 4" in again.stdout, again.output
    check_same_training(out, local)


def unfinish(directory: Path) -> None:
    """Let a run go on from its last checkpoint."""
    record = read_record(directory)
    assert record is not None
    (directory / RECORD).write_bytes(as_bytes(record.model_copy(update={"finished": False})))


def test_what_is_saved_of_each_side_is_exported_and_merged_as_the_whole(
    finished: Run, local: Local, tmp_path: Path
) -> None:
    out = finished.directory
    whole = weights_in(out / "adapter")
    sides = {side: weights_in(out / f"{side}_lora") for side in ("bottom", "trunk", "top")}
    assert sum(map(len, sides.values())) == len(whole)
    assert {name.split(".layers.")[1][0] for name in sides["trunk"]} == {"2", "3"}
    exported = run(export_command, *(out / f"{side}_lora" for side in sides), "--out", tmp_path / "exported")
    assert exported.exit_code == 0, exported.output
    assert same(weights_in(tmp_path / "exported"), whole)
    merged = run(merge_command, tmp_path / "exported", "--model", local_path(out), "--out", tmp_path / "merged")
    assert merged.exit_code == 0, merged.output
    expected = PeftModel.from_pretrained(local_model(local_path(out)), str(out / "adapter")).merge_and_unload()
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict(), expected.state_dict())


def local_path(directory: Path) -> str:
    record = read_record(directory)
    assert record is not None
    return str(record.configuration["model.name"])


def test_the_trunks_parameters_and_bytes_are_reported_by_themselves(finished: Run, local: Local) -> None:
    trained = [p for name, p in local.model.named_parameters() if p.requires_grad and re.search(r"\.[23]\.", name)]
    parameters = sum(p.numel() for p in trained)
    assert re.search(rf"^  trunk +{parameters:,} of 18,560 ", finished.shown, re.M), finished.shown
    assert re.search(r"^    adapters on the trunk +1[68]\.\d kB +\d", finished.shown, re.M), finished.shown
    lines = lines_in(finished.directory)
    assert all(0 < line["adapter_bytes_up"] - 4 * parameters < 4000 for line in lines), (
        "a version a step, and its layout"
    )
    assert all(line["adapter_bytes_down"] % (4 * parameters) == 0 < line["adapter_bytes_down"] for line in lines)


def test_a_run_goes_on_from_its_checkpoint_to_the_same_weights(finished: Run, config: Path, tmp_path: Path) -> None:
    killed = tmp_path / "out"
    shutil.copytree(
        finished.directory, killed, ignore=shutil.ignore_patterns(f"checkpoint-{STEPS}", "adapter", "*_lora")
    )
    unfinish(killed)
    other = run(train_command, config, "--save-dir", killed, "--adapt", "client")
    assert other.exit_code == EXIT_USAGE and "peft.layers (all there, not set here)" in other.stderr, other.output
    again = run(train_command, config, "--save-dir", killed)
    assert again.exit_code == 0 and "checkpoint-40, step 40 of 50" in again.stdout, again.output
    assert [line["loss"] for line in lines_in(killed)] == [line["loss"] for line in lines_in(finished.directory)]
    for name in ("adapter", "bottom_lora", "trunk_lora", "top_lora"):
        assert same(weights_in(killed / name), weights_in(finished.directory / name))


def test_a_training_goes_on_from_an_adapter_of_all_layers_and_keeps_the_best(
    finished: Run, config: Path, tmp_path: Path
) -> None:
    earlier, out = finished.directory / "adapter", tmp_path / "out"
    small = ["--model", local_path(finished.directory), "--cut", "2:4", "--max-length", "16", "--samples", "8"]
    settings = ["train.early_stopping_patience=1", "train.save_steps=2", "data.validation=0.25"]
    command = [*small, *(word for setting in settings for word in ("--set", setting)), "--lr", "0.3", "--epochs", "4"]
    result = run(train_command, *command, "--adapter", earlier, "--adapt", "all", "--save-dir", out)
    assert result.exit_code == 0, result.output
    best = re.search(r"The adapters are those of step (\d+)", result.stdout)
    assert best is not None, result.stdout
    kept, before = weights_in(out / "adapter"), weights_in(earlier)
    assert kept.keys() == before.keys() and not any(torch.equal(kept[name], before[name]) for name in kept)
    assert same(kept, weights_in(out / f"checkpoint-{best[1]}"))
    refused = run(train_command, *small, "--adapter", earlier, "--save-dir", tmp_path / "other")
    assert refused.exit_code != 0 and 'layers="all"' in refused.stderr, refused.output


@pytest.mark.parametrize(
    ("limits", "setting", "words"),
    [
        (None, "peft.r=4", ["no adapters", "--no-adapters"]),
        (AdapterLimits(max_rank=3, max_bytes=1 << 20), "peft.r=4", ["rank 4", " 3", "--max-adapter-rank"]),
        (AdapterLimits(max_rank=8, max_bytes=1 << 10), "peft.r=4", ["1,024", "adapter_wire_dtype"]),
        (AdapterLimits(max_rank=8, max_bytes=1 << 20), "trunk.mode=straight-through", ["straight-through"]),
        (AdapterLimits(max_rank=8, max_bytes=1 << 20), "peft.init_lora_weights='pissa'", ["init_lora_weights"]),
    ],
    ids=["none", "rank", "bytes", "mode", "pissa"],
)
def test_what_the_daemon_would_not_train_is_said_before_the_first_step(
    limits: AdapterLimits | None,
    setting: str,
    words: list[str],
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ServerSettings, "adapter_limits", lambda *_: limits)
    result = run(train_command, config, "--set", setting, "--save-dir", tmp_path / "out")
    assert result.exit_code == EXIT_USAGE, result.output
    line = result.stderr.strip().splitlines()[-1]
    assert all(word in line for word in [*words, "[peft]" if "pissa" in setting else "peft.layers"]), line
    assert not (tmp_path / "out").exists()


def test_layers_is_a_key_of_its_own(config: Path) -> None:
    assert [read_config(None, settings=settings, overrides={}).layers for settings in ([], ["peft.layers=all"])] == [
        "client",
        "all",
    ]
    with pytest.raises(ConfigError, match=r"peft\.layers = 'some': client or all"):
        read_config(None, settings=["peft.layers=some"], overrides={})
    with pytest.raises(ConfigError, match=r"peft\.layer; did you mean peft\.layers\?"):
        peft_config("run.toml", {"layer": "all"})
    named, unnamed = (
        configuration_of(read_config(None, settings=settings, overrides={}))
        for settings in (["peft.layers=client"], [])
    )
    assert named == unnamed
    both = read_config(config, overrides={"peft": {}}, settings=["trunk.adapter_wire_dtype=bfloat16"])
    assert configuration_of(both)["trunk.adapter_wire_dtype"] == "bfloat16"
    assert configuration_of(both)["peft.layers"] == "all"
