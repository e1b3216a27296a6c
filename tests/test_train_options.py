"""`zsl-train` without a file, with its options, and with a validation."""

from __future__ import annotations

import errno
import json
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm
from transformers import Trainer, TrainingArguments

from support.data import SENTENCES, conversation, write_model
from support.models import local_model, tiny_model
from test_train import COMMAND
from zsl.cli.broken_output import Shown, shown_while_it_can_be
from zsl.cli.train import train as train_command
from zsl.errors import EXIT_STARTUP_FAILED, EXIT_USAGE, ConfigError, RunFailed
from zsl.link.traffic import Traffic
from zsl.text.printable import printable_lines
from zsl.training.config.config import TrainConfig, read_config
from zsl.training.config.peft_table import peft_config
from zsl.training.config.third_party import make_foreign
from zsl.training.data.rows import TokenRow, hold
from zsl.training.directory.checkpoints import put_in_place, step_of
from zsl.training.directory.record import read_record
from zsl.training.directory.trained import find_trained
from zsl.training.report.metrics import RunMetrics
from zsl.training.report.screen import final_summary, step_line, stopped_early
from zsl.training.report.step_measure import StepMeasure
from zsl.training.run.limits import check_limits
from zsl.training.trainer.validation_loss import TokenLossMixin
from zsl.trunk.settings import ServerSettings

ROOT = Path(__file__).parent.parent


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(train_command, [str(word) for word in arguments], prog_name="zsl-train")


@pytest.fixture
def small(checkpoints: Callable[..., Path]) -> list[str]:
    """The options of a run of a few steps without a file."""
    return ["--model", str(checkpoints("llama")), "--set", "trunk.cut=2:4", "--samples", "8", "--max-length", "16"]


def lines_in(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_without_a_file_the_defaults_are_those_of_the_help() -> None:
    config = read_config(None, overrides={})
    train = config.train
    assert (config.data.name, config.data.samples, config.data.max_length) == ("synthetic", 20, 128)
    assert (train["per_device_train_batch_size"], train["num_train_epochs"], train["learning_rate"]) == (2, 1, 1e-4)
    assert (config.peft["method"], config.peft["r"], train["output_dir"]) == ("lora", 8, "lora_checkpoints")
    shown = " ".join(run("--help").stdout.split())
    for default in ("synthetic", "20", "2", "128", "1", "8", "1e-4", "./lora_checkpoints"):
        assert f"[default: {default}" in shown


def test_the_help_says_how_many_rows_a_file_trains_on(tmp_path: Path) -> None:
    assert "[default: 20; with CONFIG all, but 20 of synthetic]" in " ".join(run("--help").stdout.split())
    file = tmp_path / "run.toml"
    file.write_text("[data]\nname = 'python-docs'\n")
    assert read_config(file, overrides={}).data.samples is None


def test_another_method_without_a_file_is_not_given_the_keys_of_lora() -> None:
    config = read_config(None, settings=["peft.method=ia3"], overrides={})
    assert config.peft == {"method": "ia3"}
    asked = read_config(None, settings=["peft.method=loha", "peft.target_modules=all-linear"], overrides={})
    assert asked.peft == {"method": "loha", "target_modules": "all-linear"}


def test_every_option_reaches_the_training(small: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--batch-size", "4", "--epochs", "2", "--lora-rank", "3", "--lr", "0.01", "--dataset", "synthetic"]
    result = run(*small, *options, "--save-dir", out)
    assert result.exit_code == 0, result.output
    assert [line["step"] for line in lines_in(out)] == [1, 2, 3, 4]
    weights = load_file(out / "adapter" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in weights.items() if "lora_A" in name} == {3}
    assert "learning_rate = 0.01" in result.stdout
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_other_options_reach_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[TrainConfig] = []
    monkeypatch.setattr("zsl.training.run.run.train_from_config", lambda config, *_, **__: made.append(config))
    options = ["--server", "a:1", "--server-key", "s.key", "--client-key", "c.key_secret", "--cut", "2:4"]
    for validation in ("0.25", "notes.txt"):
        result = run(*options, "--dataset", "a.txt", "--steps", "7", "--seed", "3", "--validation", validation)
        assert result.exit_code == 0, result.output
    share, file = made
    assert (share.trunk.server_key, share.trunk.client_key, share.trunk.cut) == ("s.key", "c.key_secret", "2:4")
    assert (share.train["max_steps"], share.train["seed"]) == (7, 3)
    assert (share.data.validation, file.data.validation) == (0.25, "notes.txt")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_as_one_of_several_processes_it_says_that_it_is_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    result = run()
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"zsl-train: {name}=2 ") and result.stderr.count("\n") == 1
    monkeypatch.setenv(name, "1")
    assert run("missing.toml").stderr.startswith("zsl-train: missing.toml: ")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--set", "train.learning_rate=nan"], 2),
        (["--set", "peft.rank=3"], 2),
        (["--set", "peft.lora_dropout=2.0"], 2),
        (["--set", 'peft.target_modules=["nope"]'], 2),
        (["--cut", "4:2"], 2),
        (["--server-key", "k"], 2),
        (["--server", "nowhere"], 2),
        (["--server", "a:1", "--server-key", "missing.key"], 2),
        (["--cut", "4:9"], 3),
        (["--model", "random:nothing"], 3),
        (["--model", "random:bert"], 3),
        (["--dataset", "missing.txt"], 2),
        (["--max-length", "65"], 2),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_an_error_in_the_configuration_is_all_that_is_shown(
    small: list[str], options: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*small, *options)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("zsl-train: ")
    assert list(tmp_path.iterdir()) == []


def test_options_go_before_settings_and_those_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("[data]\nsamples = 3\nmax_length = 30\n[train]\nlearning_rate = 3.0\n")
    config = read_config(file, settings=["data.samples=4", "data.max_length=40"], overrides={"data": {"samples": 5}})
    assert (config.data.samples, config.data.max_length, config.train["learning_rate"]) == (5, 40, 3.0)


def test_a_step_shows_where_its_time_went_and_what_crossed(small: list[str], tmp_path: Path) -> None:
    result = run(*small, "--save-dir", tmp_path)
    assert re.search(
        r"step 4/4: loss [\d.]+, [\d,]+ tok/s, [a-z]+ \d+% [a-z]+ \d+%, 0:00 left\n",
        result.stdout,
    )
    assert re.search(r"Communication per step of 32 tokens\n.*\n  this run, measured +\d.*kB +\d", result.stdout)
    for line in lines_in(tmp_path):
        parts = [line[f"{part}_seconds"] for part in ("data", "bottom", "wire", "trunk", "top", "other")]
        assert sum(parts) == pytest.approx(line["seconds"], abs=1e-5)
        assert line["data_seconds"] > 0
        assert line["tokens"] == 32
        # Two tensors of 2 x 16 tokens x 32 float32 numbers each way, and their headers.
        assert 0 < line["bytes_up"] - 2 * 2 * 16 * 32 * 4 < 1500


def test_the_line_of_a_long_run_fits_in_80_columns_and_has_the_largest_parts() -> None:
    seconds = {"data": 0.1, "bottom": 1.0, "crossing": 7.5, "top": 1.3, "other": 0.1}
    measure = StepMeasure(
        steps=1,
        tokens=123_450,
        seconds=10.0,
        traffic=Traffic(compute_seconds=6.0),
        **{f"{part}_seconds": value for part, value in seconds.items()},
    )
    line = step_line(1000, 20_000, 12.3456, measure, 11_220.0)
    assert line == "  step 1000/20000: loss 12.3456, 12,345 tok/s, wire 15% trunk 60%, 3:07:00 left"
    assert len(line) <= 80


def test_a_loss_that_ran_away_is_called_that() -> None:
    said = final_summary([10.0, 9.0, math.nan, math.inf], 1.0)
    assert "The loss is not a finite number, first at step 3: try a lower train.learning_rate." in said
    assert re.search(r"lowest +9\.0000\n", said)
    assert "The loss fell by 1.0000." in final_summary([10.0, 9.0], 1.0)


def test_the_summary_goes_by_the_validation_where_there_is_one() -> None:
    said = final_summary([9.0, 10.0], 1.0, [(0, 3.0), (2, 2.5)], kept=2)
    assert "The validation loss fell by 0.5000." in said and "step 2, where the validation loss was lowest" in said
    said = final_summary([9.0, 8.0], 1.0, [(0, 3.0), (1, 3.5), (2, 4.0)], kept=1)
    assert "The validation loss did not fall: it rose by 1.0000." in said
    assert "step 1, the best checkpoint; at step 0 the validation loss was lower: 3.0000." in said


def test_of_one_step_there_is_no_verdict_and_a_loss_that_stayed_is_not_said_to_rise() -> None:
    assert final_summary([10.0], 1.0).splitlines()[-1] == "  average  10.0000"
    assert final_summary([10.0, 9.0, 10.00001], 1.0).endswith("The loss did not change.")
    assert final_summary([10.0], 1.0, [(0, 3.0), (1, 3.0)]).endswith("The validation loss did not change.")


def test_with_a_threshold_of_early_stopping_it_is_said_by_how_much_the_loss_was_to_fall() -> None:
    said = stopped_early(6, 40, 2, 1.5, threshold=0.05)
    assert said == "  stopped at step 6 of 40: no validation loss lower than 1.5000 by more than 0.05 in 2 validations"
    said = stopped_early(6, 40, 1, 1.5, went_by="perplexity")
    assert said == "  stopped at step 6 of 40: no validation perplexity lower than 1.5000 in 1 validation"


def test_tensorboard_gets_what_was_measured(small: list[str], tmp_path: Path) -> None:
    reports = ["--set", "train.report_to=tensorboard", "--set", "data.validation=0.25"]
    result = run(*small, *reports, "--save-dir", tmp_path)
    assert result.exit_code == 0, result.output
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    seen = EventAccumulator(str(events)).Reload()

    def series(name: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in seen.Scalars(name)]

    lines = lines_in(tmp_path)
    steps = [line for line in lines if "loss" in line]
    validations = [line for line in lines if "eval_loss" in line]
    assert len(steps) == 4 and len(validations) == 2
    assert series("train/loss") == [(line["step"], pytest.approx(line["loss"])) for line in steps]
    assert series("train/trunk/bytes_up") == [(line["step"], line["bytes_up"]) for line in steps]
    assert series("train/share/trunk") == [
        (line["step"], pytest.approx(line["trunk_seconds"] / line["seconds"], abs=1e-4)) for line in steps
    ]
    for name in ("loss", "perplexity"):
        expected = [(line["step"], pytest.approx(line[f"eval_{name}"])) for line in validations]
        assert series(f"eval/{name}") == expected


def test_the_clients_layers_compute_in_half_precision_without_a_gpu_too(small: list[str], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="autocast.*torch.bfloat16"):
        result = run(*small, "--set", "train.bf16=true", "--save-dir", tmp_path)
    assert result.exit_code == 0, result.output


EXAMPLES = [
    pytest.param(block, id=f"{file.name}-{number}")
    for file in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
    for number, block in enumerate(re.findall(r"^```toml\n(.*?)^```", file.read_text(), re.MULTILINE | re.DOTALL))
    if "[train]" in block
]


@pytest.mark.parametrize("block", EXAMPLES)
def test_configurations_in_the_docs_are_valid(block: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(block)
    config = read_config(file, overrides={})
    make_foreign(TrainingArguments, str(file), "train", config.trainer_arguments)
    peft_config(str(file), config.peft, checkpoints=True)


def test_a_finished_run_is_replaced_and_another_configuration_named(small: list[str], tmp_path: Path) -> None:
    command = [*small, "--set", "train.save_steps=2", "--save-dir", tmp_path]
    assert "holds a run that came to its end" not in run(*command).stdout
    assert "holds a run that came to its end; what this one saves replaces it" in run(*command).stdout
    gone_on = run(*command, "--resume", "--lr", "0.5").stdout
    assert "It was made with another configuration: train.learning_rate (0.0001 there, 0.5 here)" in gone_on
    assert "There was no step left to take." in gone_on


def test_a_dry_run_checks_all_and_leaves_nothing(small: list[str], tmp_path: Path) -> None:
    result = run(*small, "--save-dir", tmp_path / "runs" / "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "Dry run: " in result.stdout
    assert "max_length = 16" in result.stdout and "Training\n" not in result.stdout
    assert list(tmp_path.iterdir()) == []
    result = run(
        *small,
        "--dry-run",
        "--save-dir",
        tmp_path / "runs" / "out",
        "--server",
        "127.0.0.1:1",
        "--set",
        "trunk.connect_timeout_seconds=0.3",
    )
    assert result.exit_code == 3 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("per_device_train_batch_size=0", ["per_device_train_batch_size = 0", "1 or more"]),
        ("learning_rate=nan", ["learning_rate = nan"]),
        ("num_train_epochs=0", ["num_train_epochs = 0", "over 0"]),
        ("max_steps=0", ["max_steps = 0"]),
        ("seed=-1", ["seed = -1"]),
        ("dataloader_num_workers=-1", ["dataloader_num_workers = -1"]),
        ("report_to=nobody", ["train.report_to", "nobody"]),
        ("eval_strategy=steps", ["eval_strategy"]),
        ("eval_on_start=true", ["eval_on_start", "data.validation"]),
        ("optim=galore_adamw", ["train.optim", "galore"]),
        ("optim_args=nope", ["train.optim_args"]),
        ("adam_beta1=2.0", ["train.adam_beta1"]),
        ("lr_scheduler_kwargs={nope=1}", ["train.lr_scheduler_kwargs"]),
        ("lr_scheduler_type=warmup_stable_decay", ["train.lr_scheduler_type"]),
        ("log_level=nope", ["train.log_level"]),
        ("dataloader_persistent_workers=true", ["train.dataloader_persistent_workers"]),
        ("label_smoothing_factor=2", ["train.label_smoothing_factor"]),
        ("output_dir=", ["output_dir", "name a directory"]),
        ("push_to_hub=true", ["train.push_to_hub", "hf upload"]),
    ],
)
def test_what_would_fail_in_the_training_is_said_before_it(
    small: list[str], setting: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*small, "--set", f"train.{setting}")
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    line = result.stderr.strip().splitlines()[-1]
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []


def test_rows_and_batches_that_the_daemon_will_refuse_are_said_in_a_dry_run(small: list[str]) -> None:
    for key, more in (
        ("train", ["--samples", "2049", "--batch-size", "2049"]),
        (
            "eval",
            ["--samples", "2049", "--set", "data.validation=0.5", "--set", "train.per_device_eval_batch_size=2049"],
        ),
    ):
        result = run(*small, *more, "--dry-run")
        assert result.exit_code == 2, result.output
        assert "32,768" in result.stderr and f"train.per_device_{key}_batch_size" in result.stderr


def test_the_longest_rows_of_a_batch_are_held_against_the_limits() -> None:
    info: Any = SimpleNamespace(max_row_tokens=64, model=SimpleNamespace(hidden_size=8))
    limits = ServerSettings(max_request_tokens=100).limits(info)
    rows = hold(TokenRow.of_text([1] * length) for length in (10, 60, 3, 38))

    def check(rows: Any, batch_size: int, *, virtual_tokens: int = 0, packs: bool = True) -> None:
        check_limits(rows, batch_size, limits, key="k", row_tokens=50, virtual_tokens=virtual_tokens, packs=packs)

    check(rows, 2)
    check(None, 2)
    for wrong in ({"batch_size": 3}, {"batch_size": 2, "packs": False}, {"batch_size": 2, "virtual_tokens": 2}):
        with pytest.raises(ConfigError, match=r"\b100\b.* train\.k\b"):
            check(rows, **wrong)
    with pytest.raises(ConfigError, match=r"\b100\b"):
        check(None, 3)
    with pytest.raises(ConfigError, match=r"65 tokens.* 64 .*data\.max_length"):
        check(rows, 1, virtual_tokens=5)


def test_data_that_make_no_batch_leave_what_was_trained_as_it_is(small: list[str], tmp_path: Path) -> None:
    assert run(*small, "--save-dir", tmp_path).exit_code == 0
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    for more in ([], ["--set", "train.max_steps=3"]):
        options = ["--batch-size", "16", "--set", "train.dataloader_drop_last=true", *more]
        result = run(*small, *options, "--save-dir", tmp_path)
        assert result.exit_code == 2 and re.search("8 rows .* 16", result.stderr), result.output
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_a_loss_that_is_no_number_ends_the_training_with_the_adapters_of_the_step_before(
    small: list[str], tmp_path: Path
) -> None:
    """The bottom stays as it is, so the trunk is asked nothing that it would refuse."""
    only_top = ["--set", "peft.target_modules=['lm_head']", "--set", "train.max_grad_norm=0", "--lr", "1e30"]
    result = run(*small, *only_top, "--save-dir", tmp_path / "out")
    assert result.exit_code == 1, result.output
    found = re.search(
        r"training ended after step (\d+): the (loss|gradient) of step (\d+) is (nan|-?inf)", result.stderr
    )
    assert found is not None and int(found[3]) == int(found[1]) + 1, result.stderr
    assert [line["step"] for line in lines_in(tmp_path / "out")] == list(range(1, int(found[3])))
    weights = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_metric_that_is_no_number_is_null_in_the_file_and_nan_when_a_run_goes_on(tmp_path: Path) -> None:
    metrics = RunMetrics(tmp_path / "metrics.jsonl")
    metrics.add_micro_batch(torch.tensor(1.0))
    metrics.end_step(1, 0.5, {})
    metrics.add_validation(1, 0.5, math.nan, math.inf)
    metrics.close()
    assert lines_in(tmp_path)[1] == {"step": 1, "eval_loss": None, "eval_perplexity": None, "epoch": 0.5}
    (step, loss), *more = RunMetrics(tmp_path / "again.jsonl", metrics.text).validations
    assert (step, more) == (1, []) and math.isnan(loss)


def test_with_no_gradient_from_the_trunk_something_behind_it_must_learn(small: list[str], tmp_path: Path) -> None:
    only_bottom = ["--set", "peft.target_modules=['q_proj']", "--set", "peft.layers_to_transform=[0]"]
    with pytest.warns(UserWarning, match="mode is 'none'"):
        result = run(*small, *only_bottom, "--set", "trunk.mode=none", "--dry-run", "--save-dir", tmp_path / "out")
    assert result.exit_code == 2 and "mode none" in result.stderr, result.output


def test_an_adapter_of_another_model_or_shape_is_no_place_to_go_on_from(
    small: list[str], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    command = [*small, "--set", "train.save_steps=2", "--save-dir", tmp_path]
    assert run(*command).exit_code == 0
    before = (tmp_path / "adapter" / "run.json").read_bytes()
    for options, words in (
        (["--model", checkpoints("llama", seed=7)], ["checkpoint-4 ", "the model's weights"]),
        (["--lora-rank", "4"], ["checkpoint-4 ", "shape", "[8, 64] there, [4, 64] here"]),
        (["--set", "peft.target_modules=['q_proj']"], ["shape", "missing here"]),
    ):
        for how in ([], ["--dry-run"]):
            result = run(*command, *options, *how, "--resume")
            assert result.exit_code == 2, result.output
            line = result.stderr.strip().splitlines()[-1]
            assert all(word in line for word in words) and len(line) < 500, line
    assert (tmp_path / "adapter" / "run.json").read_bytes() == before
    dry = run(*command, "--lr", "0.5", "--resume", "--dry-run")
    assert dry.exit_code == 0 and "train.learning_rate" in dry.stdout


def test_a_local_checkpoint_with_more_than_this_side_takes_is_refused_before_the_training(
    small: list[str], tmp_path: Path
) -> None:
    local = tmp_path / "checkpoint-2"
    targets = ["q_proj", "v_proj"]
    model = get_peft_model(local_model(small[1]), LoraConfig(r=8, target_modules=targets, modules_to_save=["lm_head"]))
    model.save_pretrained(local)
    (local / "trainer_state.json").write_text('{"global_step": 2, "max_steps": 2}')
    command = [*small, "--set", f"peft.target_modules={targets}", "--set", f"train.resume_from_checkpoint={local}"]
    weights = load_file(local / "adapter_model.safetensors")
    for unwanted, words in (
        ((), "8 of 25, as base_model.model.model.layers.2."),
        ((".2.", ".3."), "base_model.model.lm_head.weight is [211, 32] there, missing here"),
    ):
        kept = {name: tensor + 1 for name, tensor in weights.items() if not any(map(name.__contains__, unwanted))}
        save_file(kept, local / "adapter_model.safetensors")
        result = run(*command, "--dry-run", "--save-dir", tmp_path / "out")
        assert result.exit_code == EXIT_USAGE and words in result.stderr, result.output


def test_the_adapter_of_an_earlier_run_is_not_taken_for_that_of_one_that_was_killed(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*small, "--set", "train.save_steps=2", "--save-dir", tmp_path]
    assert run(*command).exit_code == 0
    assert find_trained([tmp_path]).adapters == [tmp_path / "adapter"]

    def killed(*_: Any, **__: Any) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr("zsl.training.run.results.Results.save", killed)
        run(*command)
    with pytest.raises(ConfigError, match=r"checkpoint-4.* .*adapter"):
        find_trained([tmp_path])
    assert find_trained([tmp_path / "adapter"]).adapters == [tmp_path / "adapter"]
    assert "Resuming from" in run(*command).stdout
    assert find_trained([tmp_path]).adapters == [tmp_path / "adapter"]


@pytest.mark.long
def test_a_reader_of_the_output_that_goes_away_ends_no_training(small: list[str], tmp_path: Path) -> None:
    command = [*COMMAND, *small, "--save-dir", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert said.count("standard output cannot be written any more: Broken pipe") == 1 and "Traceback" not in said
    assert len(lines_in(tmp_path / "out")) == 4 and (tmp_path / "out" / "adapter").is_dir()


def test_an_output_without_space_is_given_up_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with open("/dev/full", "w", buffering=1) as full:
        shown = Shown(full)
        for _ in range(3):
            print("a step", file=shown)
    assert [record.getMessage() for record in caplog.records] == [
        "standard output cannot be written any more: No space left on device; going on without it"
    ]


def test_where_standard_output_is_closed_what_is_shown_goes_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    with shown_while_it_can_be():
        tqdm.write("a step")
        print("a step", flush=True)


def test_quiet_says_nothing_where_nothing_is_wrong(small: list[str], tmp_path: Path) -> None:
    result = run(*small, "--save-dir", tmp_path / "out", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert len(lines_in(tmp_path / "out")) == 4


def test_resume_goes_on_or_fails_and_restart_begins_anew(small: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    nothing = run(*small, "--save-dir", out, "--resume")
    assert nothing.exit_code == 2 and "--resume" in nothing.stderr and "--save-dir" in nothing.stderr
    checkpoints = ["--set", "train.save_steps=2"]
    assert run(*small, *checkpoints, "--save-dir", out, "--set", "train.max_steps=3").exit_code == 0
    gone_on = run(*small, *checkpoints, "--save-dir", out, "--resume", "--set", "train.max_steps=4")
    assert gone_on.exit_code == 0 and "Resuming from" in gone_on.stdout
    assert "Resuming" not in run(*small, *checkpoints, "--save-dir", out, "--restart").stdout


def test_a_validation_has_its_own_loss_and_perplexity(small: list[str], tmp_path: Path) -> None:
    settings = ["--set", "data.validation=0.25", "--epochs", "3", "--lr", "0.01"]
    result = run(*small, *settings, "--save-dir", tmp_path)
    assert result.exit_code == 0, result.output
    lines = [line for line in lines_in(tmp_path) if "eval_loss" in line]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        assert line["eval_perplexity"] == pytest.approx(math.exp(line["eval_loss"]))
        assert f"validation loss {line['eval_loss']:.4f}, perplexity {line['eval_perplexity']:.2f}" in result.stdout
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]


STOPS_EARLY = ["data.validation=0.25", "train.early_stopping_patience=2", "train.save_steps=2", "train.logging_steps=1"]


def test_a_training_goes_on_from_the_adapter_of_another(
    small: list[str], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    command = [*small, "--set", "data.validation=0.25", "--lr", "0.1"]
    first = run(*command, "--lora-rank", "4", "--save-dir", tmp_path / "first")
    assert first.exit_code == 0, first.output
    finished = run(*command, "--adapter", tmp_path / "first", "--save-dir", tmp_path / "second")
    assert finished.exit_code == 0, finished.output
    before, after = (
        [x["eval_loss"] for x in lines_in(tmp_path / name) if "eval_loss" in x] for name in ("first", "second")
    )
    assert after[0] == before[-1] != before[0] and after[-1] != after[0]
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("first", "second"))
    assert one.keys() == other.keys() and not any(torch.equal(one[name], other[name]) for name in one)
    for options, code, words in (
        (["--lora-rank", "8"], EXIT_USAGE, "peft.r"),
        (["--model", checkpoints("llama", seed=7)], EXIT_USAGE, "other weights"),
        (["--adapter", tmp_path / "nowhere"], EXIT_STARTUP_FAILED, "nowhere"),
    ):
        result = run(*command, "--adapter", tmp_path / "first", *options, "--save-dir", tmp_path / "out")
        assert result.exit_code == code and words in result.stderr, result.output
    assert not (tmp_path / "out").exists()


def test_it_stops_early_and_keeps_the_best(small: list[str], tmp_path: Path) -> None:
    settings = [*STOPS_EARLY, "train.learning_rate=0.3"]  # far too much: the loss rises
    options = [word for setting in settings for word in ("--set", setting)]
    result = run(*small, *options, "--epochs", "20", "--save-dir", tmp_path)
    assert result.exit_code == 0, result.output
    validations = [line for line in lines_in(tmp_path) if "eval_loss" in line and line["step"]]
    best = min(validations, key=lambda line: line["eval_loss"])
    assert validations[-1]["step"] == best["step"] + 4
    assert f": no validation loss lower than {best['eval_loss']:.4f} in 2 validations" in result.stdout
    assert f"The adapters are those of step {best['step']}" in result.stdout
    kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    of_the_best = load_file(tmp_path / f"checkpoint-{best['step']}" / "adapter_model.safetensors")
    assert kept.keys() == of_the_best.keys()
    assert all(torch.equal(kept[name], of_the_best[name]) for name in kept)


def test_early_stopping_needs_a_validation(small: list[str], tmp_path: Path) -> None:
    result = run(*small, "--set", "train.early_stopping_patience=2", "--save-dir", tmp_path)
    assert result.exit_code == 2 and "data.validation" in result.stderr


@pytest.mark.long
@pytest.mark.parametrize("limit", [1, 2])
def test_where_the_best_could_not_be_written_the_next_best_is_kept(
    limit: int, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what another Trainer left in the directory stays, whatever `save_total_limit` says."""
    foreign = tmp_path / "checkpoint-500"
    foreign.mkdir()
    not_written = 0

    def full_once(written: Path, place: Path) -> None:
        if place.name == f"checkpoint-{not_written}":
            raise OSError(errno.ENOSPC, "No space left on device")
        put_in_place(written, place)

    def validation_losses() -> dict[int, float]:
        return {line["step"]: line["eval_loss"] for line in lines_in(tmp_path) if "eval_loss" in line and line["step"]}

    monkeypatch.setattr("zsl.training.trainer.whole_checkpoints.put_in_place", full_once)
    settings = [*STOPS_EARLY, "train.learning_rate=0.3", f"train.save_total_limit={limit}"]
    options = [word for setting in settings for word in ("--set", setting)]
    command = [*small, *options, "--epochs", "20", "--restart", "--save-dir", tmp_path]
    assert run(*command).exit_code == 0
    losses = validation_losses()
    not_written = min(losses, key=losses.__getitem__)
    result = run(*command)
    assert result.exit_code == 0, result.output
    losses = validation_losses()
    best = min(losses.keys() - {not_written}, key=losses.__getitem__)
    assert f"The adapters are those of step {best}" in result.stdout
    kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    of_the_best = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], of_the_best[name]) for name in kept)
    assert foreign.is_dir()


def test_an_early_stopped_run_whose_adapters_could_not_be_saved_only_saves_them(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [word for setting in [*STOPS_EARLY, "train.learning_rate=0.3"] for word in ("--set", setting)]
    command = [*small, *options, "--epochs", "20", "--save-dir", str(tmp_path)]

    def full(*_: Any, **__: Any) -> None:
        raise RunFailed("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("zsl.training.run.results.save_adapter", full)
        failed = run(*command)
    assert failed.exit_code == 1 and "the training is done, but not all of it is saved" in failed.stderr
    before = lines_in(tmp_path)
    saved = run(*command)
    assert saved.exit_code == 0, saved.output
    assert lines_in(tmp_path) == before
    assert re.search(r"The adapters are those of step \d+", saved.stdout) and (tmp_path / "adapter").is_dir()


def test_an_adapter_says_what_model_it_is_of_and_nothing_of_the_data(small: list[str], tmp_path: Path) -> None:
    assert run(*small, "--save-dir", tmp_path).exit_code == 0
    of_run = read_record(tmp_path)
    assert of_run is not None and "data.name" in of_run.configuration
    for name in ("adapter", "bottom_lora", "top_lora"):
        record = read_record(tmp_path / name)
        assert record is not None
        assert record.configuration == {"model.name": of_run.configuration["model.name"]}
        assert record.facts == {fact: value for fact, value in of_run.facts.items() if "data" not in fact}
        assert "the model's weights" in record.facts and record.facts != of_run.facts


def test_a_side_that_has_no_adapter_any_more_keeps_none_of_an_earlier_run(small: list[str], tmp_path: Path) -> None:
    assert run(*small, "--save-dir", tmp_path).exit_code == 0
    assert (tmp_path / "bottom_lora").is_dir()
    only_top = ["--set", "peft.target_modules=['q_proj']", "--set", "peft.layers_to_transform=[5]"]
    again = run(*small, *only_top, "--save-dir", tmp_path)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "top_lora").is_dir() and not (tmp_path / "bottom_lora").exists()


@pytest.mark.long
def test_a_run_goes_on_from_another_ones_checkpoint_and_looks_for_its_own_best(
    small: list[str], tmp_path: Path
) -> None:
    """The other one had no early stopping, or had come to its end by it."""
    validated = ["--set", "data.validation=0.25", "--set", "train.save_steps=2"]
    assert run(*small, *validated, "--save-dir", tmp_path / "plain").exit_code == 0
    stops = [word for setting in STOPS_EARLY for word in ("--set", setting)]
    assert run(*small, *stops, "--epochs", "20", "--lr", "0.3", "--save-dir", tmp_path / "stopped").exit_code == 0
    last = max(tmp_path.glob("stopped/checkpoint-*"), key=step_of)
    for number, checkpoint in enumerate((tmp_path / "plain" / "checkpoint-2", last)):
        goes_on = ["--set", f"train.resume_from_checkpoint={checkpoint}", "--epochs", "20", "--lr", "0.01"]
        out = tmp_path / str(number)
        result = run(*small, *stops, *goes_on, "--save-dir", out)
        assert result.exit_code == 0, result.output
        steps = [line["step"] for line in lines_in(out) if "loss" in line]
        assert steps[-1] >= step_of(checkpoint) + 4 and "The adapters are those of step" in result.stdout
        kept = re.search(r"The adapters are those of step (\d+)", result.stdout)
        assert kept is not None and int(kept[1]) > step_of(checkpoint)


@pytest.mark.parametrize(("method", "smoothing"), [("lora", 0.0), ("prompt_tuning", 0.0), ("lora", 0.3)])
def test_the_validation_loss_is_the_mean_over_all_tokens_that_are_predicted(
    method: str, smoothing: float, tmp_path: Path
) -> None:
    """Validation loss is that of the cross-entropy, also where the training's loss is smoothed."""
    config: Any = LoraConfig(r=2, target_modules=["q_proj"])
    if method == "prompt_tuning":
        config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), config)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 50, (4, 7)).unbind()]

    class Validates(TokenLossMixin, Trainer):
        pass

    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, report_to="none", use_cpu=True)
    arguments.label_smoothing_factor = smoothing
    trainer = Validates(model=model, args=arguments, eval_dataset=rows)
    measured = trainer.evaluate()["eval_loss"]
    assert (trainer.label_smoother is not None) == bool(smoothing), "the training's loss is as it was asked for"
    model.eval()
    with torch.no_grad():
        batch = torch.stack([row["input_ids"] for row in rows])
        expected = model(input_ids=batch, labels=batch).loss.item()
    assert measured == pytest.approx(expected, rel=1e-5)


def test_the_validation_loss_is_that_of_a_token_however_rows_are_batched(tmp_path: Path) -> None:
    rows = [{"messages": conversation("Yes?", " ".join(SENTENCES[: 1 + row % 3]))} for row in range(16)]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = write_model(tmp_path / "model")
    losses = []
    for size in (1, 3, 8):
        settings = ["trunk.cut=2:4", "data.validation=0.5", f"train.per_device_eval_batch_size={size}"]
        options = [word for setting in [*settings, "train.max_steps=1"] for word in ("--set", setting)]
        out = tmp_path / str(size)
        result = run("--model", model, "--dataset", chats, "--max-length", "64", *options, "--save-dir", out)
        assert result.exit_code == 0, result.output
        losses.append(lines_in(out)[0]["eval_loss"])
    assert losses[1:] == [pytest.approx(losses[0], rel=1e-6)] * 2


def test_names_of_files_and_columns_neither_steer_the_terminal_nor_pose_as_lines(tmp_path: Path) -> None:
    texts = tmp_path / "texts\x1b]0;title\x07\nSaved.jsonl"
    row = {"text": " ".join(SENTENCES), "more\x1b[2J\nSaved\u202e": 1}
    texts.write_text(json.dumps(row) + "\n")
    model = write_model(tmp_path / "model")
    options = ["--cut", "2:4", "--max-length", "16", "--dry-run", "--save-dir", tmp_path / "out"]
    result = run("--model", model, "--dataset", texts, *options)
    assert result.exit_code == 0, result.output
    assert "not used: column more\\x1b[2J\\nSaved\\u202e" in result.stdout and "texts\\x1b]0;title" in result.stdout
    assert printable_lines(result.output) == result.output and "Saved" not in result.output.splitlines()


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("rate", "stops_early"), [("0.01", False), ("0.3", True)])
def test_a_killed_run_with_validation_ends_as_if_never_killed(
    rate: str, stops_early: bool, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*small, "--epochs", "20" if stops_early else "3", "--lr", rate]
    options += [word for setting in STOPS_EARLY for word in ("--set", setting)]
    ended = run(*options, "--save-dir", tmp_path / "whole")
    assert ended.exit_code == 0 and ("stopped at step" in ended.stdout) == stops_early
    # One before the last, when a validation that was no better has been counted.
    killed_at = lines_in(tmp_path / "whole")[-1]["step"] - 1 if stops_early else 7
    end_step = RunMetrics.end_step

    def dying(self: RunMetrics, step: int, *rest: Any) -> None:
        end_step(self, step, *rest)
        if step == killed_at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunMetrics, "end_step", dying)
        with pytest.raises(Killed):
            run(*options, "--save-dir", tmp_path / "killed")
    gone_on = run(*options, "--save-dir", tmp_path / "killed")
    assert "Resuming from" in gone_on.stdout
    numbers = ("step", "epoch", "loss", "eval_loss")
    whole, killed = (
        [{key: line[key] for key in numbers if key in line} for line in lines_in(tmp_path / name)]
        for name in ("whole", "killed")
    )
    assert whole == killed
