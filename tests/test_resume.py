"""A training that was killed, started again with the same command, ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peft import PeftModel
from safetensors.torch import load_file

import zsl
from support.embedded import served
from support.full_disk import files_of_at_most
from support.models import local_model, with_lora, write_checkpoint
from support.tokenizer import tiny_tokenizer
from zsl.cli.train import train as train_command
from zsl.errors import RunFailed
from zsl.training.report.metrics import RunMetrics
from zsl.training.run.results import Results
from zsl.training.trainer.trainer import SplitTrainer

# Dropout and a warm-up, so that random numbers and the schedule matter. 6 steps an epoch, 12 in all.
CONFIG = """
[model]
name = "{model}"
[trunk]
cut = "2:4"
[data]
samples = 12
max_length = 16
[peft]
r = 4
lora_dropout = 0.1
target_modules = ["q_proj", "v_proj"]
[train]
learning_rate = 1e-2
num_train_epochs = 2
warmup_steps = 3
seed = 0
save_steps = 4
"""
NUMBERS = ("step", "loss", "epoch", "tokens", "eval_loss", "eval_perplexity")
ADAPTERS = ("adapter", "bottom_lora", "top_lora")


class Killed(BaseException):
    """Ends a training in this process and leaves on disk what a killed process would."""


def train(config: Path, directory: Path, *settings: str) -> Result:
    options = [word for setting in settings for word in ("--set", setting)]
    return CliRunner().invoke(
        train_command, [str(config), "--save-dir", str(directory), *options], prog_name="zsl-train"
    )


def trained(config: Path, directory: Path, *settings: str) -> str:
    result = train(config, directory, *settings)
    assert result.exit_code == 0, result.output
    return result.stdout


@contextmanager
def at_step(number: int, what: Callable[[], Any]) -> Iterator[None]:
    """Run `what` once the line of this step is written."""
    end_step = RunMetrics.end_step

    def ending(metrics: RunMetrics, step: int, epoch: float, measured: Mapping[str, Any]) -> None:
        end_step(metrics, step, epoch, measured)
        if step == number:
            what()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunMetrics, "end_step", ending)
        yield


def die() -> None:
    raise Killed


def interrupt() -> None:
    raise KeyboardInterrupt


def killed_after(step: int, config: Path, directory: Path, *settings: str) -> None:
    with at_step(step, die), pytest.raises(Killed):
        train(config, directory, *settings)


def assert_same_result(directory: Path, expected: Path) -> None:
    assert numbers_in(directory) == numbers_in(expected)
    for name in ADAPTERS:
        one, other = (load_file(path / name / "adapter_model.safetensors") for path in (directory, expected))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def numbers_in(directory: Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl`, less what was measured with a clock, or counts what was sent again."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key in NUMBERS} for line in lines]


def steps_in(directory: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[..., Path]) -> Path:
    file = tmp_path_factory.mktemp("config") / "small.toml"
    file.write_text(CONFIG.format(model=checkpoints("llama")))
    return file


@pytest.fixture(scope="module")
def uninterrupted(config: Path) -> Path:
    directory = config.parent / "uninterrupted"
    trained(config, directory)
    return directory


@pytest.fixture(scope="module")
def killed_at_step_10(config: Path) -> Path:
    directory = config.parent / "killed"
    killed_after(10, config, directory)
    assert names(directory) == {".lock", "run.json", "metrics.jsonl", "checkpoint-4", "checkpoint-8"}
    assert steps_in(directory)[-1] == 10
    return directory


@pytest.fixture
def killed(killed_at_step_10: Path, tmp_path: Path) -> Path:
    """A copy of a run that was killed after its tenth step, with the checkpoints of the fourth and the eighth."""
    return shutil.copytree(killed_at_step_10, tmp_path / "out")


COMMAND = "from zsl.cli.train import train; train(prog_name='zsl-train')"
# Killed while it writes the checkpoint of step 8: Trainer's files are there, and not yet the checksums.
KILLED_WHILE_SAVING = """
import os, signal
from zsl.training.trainer import whole_checkpoints
put_in_place = whole_checkpoints.put_in_place
def dying(written, place):
    if place.name == "checkpoint-8":
        os.kill(os.getpid(), signal.SIGKILL)
    put_in_place(written, place)
whole_checkpoints.put_in_place = dying
"""
# Takes its time for step 10, so that it can be killed there.
STANDING_STILL = """
import threading
from zsl.training.report.metrics import RunMetrics
from zsl.training.run.results import Results
add = RunMetrics.add_micro_batch
def standing(self, loss):
    if self.last_step == 9:
        threading.Event().wait()
    add(self, loss)
RunMetrics.add_micro_batch = standing
"""


@pytest.mark.long
def test_killed_while_it_saves_and_again_at_a_step_it_ends_as_if_never_killed(
    config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"env": {**os.environ, "OMP_NUM_THREADS": "2"}, "text": True, "cwd": tmp_path}

    first = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING + COMMAND, str(config), "--save-dir", "out"],
        capture_output=True,
        timeout=250,
        check=False,
        **options,
    )
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert [name for name in names(out) if name.startswith("checkpoint")] == ["checkpoint-4"]
    assert any(name.startswith(".saving-") for name in names(out))

    with subprocess.Popen(
        [sys.executable, "-c", STANDING_STILL + COMMAND, str(config), "--save-dir", "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        **options,
    ) as second:
        assert second.stdout is not None
        end = threading.Timer(200, second.kill)  # it stands still, so nothing else would end it
        end.start()
        shown = []
        for line in second.stdout:
            shown.append(line)
            if "step 9/" in line:
                second.kill()
        end.cancel()
        assert any("step 9/" in line for line in shown), "each step is shown when it is done, also in a pipe"
        assert second.wait(100) == -signal.SIGKILL
    assert "  Resuming from out/checkpoint-4, step 4 of 12\n" in shown
    assert not any("step 4/" in line for line in shown)

    assert "out/checkpoint-8, step 8 of 12\n" in trained(config, out)
    assert_same_result(out, uninterrupted)
    assert names(out) == names(uninterrupted)


def test_after_a_resume_the_screen_counts_the_whole_run(config: Path, uninterrupted: Path, killed: Path) -> None:
    shown = trained(config, killed)
    losses = [json.loads(line)["loss"] for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert f"\n\nTraining\n  Resuming from {killed}/checkpoint-8, step 8 of 12\n  step 9/12: loss " in shown
    assert f"Epoch 2: 6 steps, loss average {sum(losses[6:]) / 6:.4f}" in shown
    assert "Epoch 1" not in shown
    assert re.search(r"^  steps +12 in", shown, re.M)
    assert f"first    {losses[0]:.4f}" in shown
    assert f"average  {sum(losses) / 12:.4f}" in shown


@pytest.mark.parametrize(
    ("settings", "killed_steps"),
    [
        ([], [6]),  # in front of the second epoch: from checkpoint 4, over its end
        (["train.save_steps=3"], [7]),  # from the checkpoint at the end of an epoch
        (["train.save_strategy=epoch"], [8]),
        (["train.max_steps=10"], [9, 10]),  # ends in the middle of an epoch; killed before that is saved
        (["train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=5"], [5]),  # 5, 5 and 2
        (
            [
                "train.per_device_train_batch_size=1",
                "train.gradient_accumulation_steps=4",
                "train.overlap=3",
                "train.save_steps=2",
            ],
            [3, 5],
        ),
        (["model.dtype=bfloat16"], [10]),
    ],
    ids=["over an epoch", "at an epoch's end", "by epoch", "last step", "accumulated", "overlapped", "bfloat16"],
)
def test_however_it_trains_it_goes_on_bit_for_bit(
    config: Path, tmp_path: Path, settings: list[str], killed_steps: list[int]
) -> None:
    trained(config, tmp_path / "expected", *settings)
    for step in killed_steps:
        killed_after(step, config, tmp_path / "out", *settings)
    assert "Resuming" in trained(config, tmp_path / "out", *settings)
    assert_same_result(tmp_path / "out", tmp_path / "expected")


def test_killed_when_all_steps_are_done_only_the_adapters_are_saved(config: Path, tmp_path: Path) -> None:
    middle_of_an_epoch = "train.max_steps=10"
    trained(config, tmp_path / "expected", middle_of_an_epoch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Results, "save", lambda *_: die())
        with pytest.raises(Killed):
            train(config, tmp_path / "out", middle_of_an_epoch)
    shown = trained(config, tmp_path / "out", middle_of_an_epoch)
    assert "checkpoint-10, step 10 of 10\n  There was no step left to take.\n\nSaved\n" in shown
    assert re.search(r"^  steps +10 in", shown, re.M)
    assert_same_result(tmp_path / "out", tmp_path / "expected")


def test_killed_before_its_first_checkpoint_it_begins_again(config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    killed_after(3, config, tmp_path / "out")
    assert "Resuming" not in trained(config, tmp_path / "out")
    assert_same_result(tmp_path / "out", uninterrupted)


def test_a_checkpoint_is_an_adapter_of_the_whole_model(uninterrupted: Path, checkpoints: Callable[..., Path]) -> None:
    whole = PeftModel.from_pretrained(local_model(str(checkpoints("llama"))), str(uninterrupted / "checkpoint-12"))
    state = {key: value for key, value in whole.state_dict().items() if "lora" in key}
    saved = load_file(uninterrupted / "adapter" / "adapter_model.safetensors")
    assert len(state) == len(saved)
    assert all(torch.equal(state[key.replace(".weight", ".default.weight")], saved[key]) for key in saved)


def test_the_newest_checkpoint_is_damaged_and_the_one_before_is_taken(
    config: Path, uninterrupted: Path, killed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.truncate(killed / "checkpoint-8" / "optimizer.pt", 5000)
    assert "checkpoint-4, step 4 of 12" in trained(config, killed)
    assert any(f"{killed}/checkpoint-8 " in message and " optimizer.pt " in message for message in caplog.messages)
    assert_same_result(killed, uninterrupted)
    assert {"checkpoint-8", "checkpoint-12"} <= names(killed)


def test_no_whole_checkpoint_is_exit_3_and_nothing_is_touched(config: Path, killed: Path) -> None:
    for checkpoint in ("checkpoint-4", "checkpoint-8"):
        (killed / checkpoint / "rng_state.pth").unlink()
    before = (killed / "metrics.jsonl").read_bytes()
    result = train(config, killed)
    assert result.exit_code == 3
    assert re.search(r"no whole checkpoint .*rng_state.pth is missing.*delete them.*--save-dir", result.stderr)
    assert (killed / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("torn", ["run.json", "metrics.jsonl"])
def test_a_file_that_was_half_written_is_survived(config: Path, uninterrupted: Path, killed: Path, torn: str) -> None:
    os.truncate(killed / torn, (killed / torn).stat().st_size - 20)
    assert "Resuming" in trained(config, killed)
    assert_same_result(killed, uninterrupted)


def test_another_configuration_is_exit_2_and_names_the_key(config: Path, killed: Path) -> None:
    result = train(config, killed, "train.learning_rate=0.02", "train.logging_steps=3", "peft.r=8")
    assert result.exit_code == 2
    line = result.stderr.strip().splitlines()[-1]
    assert re.search(r"another configuration: peft.r \(4 there, 8 here\), train.learning_rate \(0.01 there, 0.02", line)
    assert "logging" not in line
    assert "--save-dir to keep it, or begin anew over it with --restart" in line


def test_what_does_not_change_the_numbers_may_be_changed(
    config: Path, uninterrupted: Path, killed: Path, checkpoints: Callable[..., Path]
) -> None:
    with served(str(checkpoints("llama"))) as endpoint:
        shown = trained(config, killed, "train.save_steps=5", "train.logging_steps=2", f"trunk.endpoint={endpoint}")
    assert "step 9/" not in shown  # and it takes effect
    assert "step 10/" in shown
    assert {"checkpoint-10", "checkpoint-12"} == {name for name in names(killed) if name.startswith("checkpoint")}
    assert_same_result(killed, uninterrupted)


def text_model(directory: Path) -> Path:
    """A tiny model that can read: whole words."""
    path = write_checkpoint(directory, "llama")
    tiny_tokenizer().save_pretrained(path)
    return path


def test_other_text_and_other_weights_under_the_same_names_are_refused(tmp_path: Path) -> None:
    config = tmp_path / "small.toml"
    model = text_model(tmp_path)
    config.write_text(CONFIG.format(model=model))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 190}" for i in range(1000)))
    arguments = (config, tmp_path / "out", f"data.name={text}")
    killed_after(5, *arguments)

    original = text.read_text()
    text.write_text(original.replace("w17 ", "w18 ", 1))
    result = train(*arguments)
    assert result.exit_code == 2
    assert re.search(r"another configuration: the rows of the data \(\w{12} there, \w{12} here\)", result.stderr)

    text.write_text(original)
    shutil.rmtree(model)
    write_checkpoint(tmp_path, "llama", seed=3).rename(model)
    text_model(tmp_path)
    result = train(*arguments)
    assert result.exit_code == 2
    assert re.search(r"another configuration: the model's weights \(\w{12} there, \w{12} here\)", result.stderr)


def test_a_run_that_has_ended_begins_anew_and_keeps_its_checkpoints_until_then(
    config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    seen: list[set[str]] = []

    class Stopped(RuntimeError):
        pass

    def stop(*_: Any, **__: Any) -> None:
        seen.append(names(out))
        raise Stopped("no trunk")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SplitTrainer, "training_step", stop)
        assert train(config, out).exit_code == 1
    assert seen == [names(uninterrupted)]  # as a step was begun
    assert names(out) == names(uninterrupted)  # and as none was taken
    with at_step(1, lambda: seen.append(names(out))):
        assert "Resuming" not in trained(config, out, "train.learning_rate=0.02")
    assert not any(name.startswith("checkpoint") for name in seen[-1])
    assert steps_in(out) == list(range(1, 13))
    assert numbers_in(out) != numbers_in(uninterrupted)


@pytest.mark.long
def test_what_the_user_says_about_checkpoints_is_respected(
    config: Path, uninterrupted: Path, killed: Path, tmp_path: Path
) -> None:
    # Without checkpoints there is nothing to go on from.
    killed_after(5, config, tmp_path / "none", "train.save_strategy=no")
    assert not any(name.startswith("checkpoint") for name in names(tmp_path / "none"))
    assert "Resuming" not in trained(config, tmp_path / "none", "train.save_strategy=no")
    assert_same_result(tmp_path / "none", uninterrupted)
    # A checkpoint that is named, in another directory, and with more to train than it was made for.
    asked = f"train.resume_from_checkpoint={killed}/checkpoint-4"
    shown = trained(config, tmp_path / "more", asked, "train.max_steps=14")
    assert f"Resuming from {killed}/checkpoint-4, step 4\n" in shown
    assert steps_in(tmp_path / "more") == list(range(1, 15))
    # Not to go on, and then nothing promises it.
    with at_step(5, interrupt):
        stopped = train(config, killed, "train.resume_from_checkpoint=false")
    assert re.search(r"ended after step 5: interrupted; the adapters of", stopped.stderr)
    assert "Resuming" not in trained(config, killed, "train.resume_from_checkpoint=false")
    assert_same_result(killed, uninterrupted)


def test_a_run_that_is_stopped_says_where_it_goes_on(config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    with at_step(6, interrupt):
        result = train(config, tmp_path / "out")
    assert result.exit_code == 130
    said = "training ended after step 6: interrupted; the same command goes on from {0}/checkpoint-4; the adapters of "
    assert said.format(tmp_path / "out") in result.stderr
    assert set(ADAPTERS) <= names(tmp_path / "out")
    with at_step(7, interrupt):
        result = train(config, tmp_path / "out")
    assert "after step 7: interrupted; " in result.stderr  # not after 3 of this process
    trained(config, tmp_path / "out")
    assert_same_result(tmp_path / "out", uninterrupted)


def test_checkpoints_that_do_not_fit_on_the_disk_are_a_warning_each_and_lose_nothing(
    config: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Room for no file, for none but the small ones, for all but the optimizer: three writers, three foreign errors."""
    out = tmp_path / "out"
    rooms = {4: 0, 6: 6_000, 8: 20_000}
    save = SplitTrainer._save_checkpoint
    seen: dict[int, set[str]] = {}

    def saving(trainer: SplitTrainer, *arguments: Any) -> None:
        step = trainer.state.global_step
        if step in rooms:
            with files_of_at_most(rooms[step]):
                save(trainer, *arguments)
        else:
            save(trainer, *arguments)
        seen[step] = names(out)

    monkeypatch.setattr(SplitTrainer, "_save_checkpoint", saving)
    trained(config, out, "train.save_steps=2")
    warnings = [message for message in caplog.messages if "could not be written" in message]
    assert len(warnings) == 3
    for step, warning in zip(rooms, warnings, strict=True):
        assert warning.startswith(f"{out}/checkpoint-{step} ")
        assert "\n" not in warning
        assert seen[step] == {".lock", "run.json", "metrics.jsonl", "checkpoint-2"}
    assert seen[10] == {".lock", "run.json", "metrics.jsonl", "checkpoint-2", "checkpoint-10"}
    assert_same_result(out, uninterrupted)


def test_adapters_that_do_not_fit_on_the_disk_are_an_error_that_says_where_the_training_is(
    config: Path, uninterrupted: Path, killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ADAPTERS:  # older ones, of the steps until an interruption
        (killed / name).mkdir()
        (killed / name / "adapter_model.safetensors").write_bytes(b"older")
    save = Results.save

    def saving(*arguments: Any) -> Any:
        with files_of_at_most(3_000):
            return save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Results, "save", saving)
        result = train(config, killed)
    assert result.exit_code == 1
    line = result.stderr.strip().splitlines()[-1]
    assert re.search(
        rf"not all of it is saved; the same command goes on from {killed}/checkpoint-12; the adapter ", line
    )
    assert re.search(rf"could not be written to {killed}/adapter: .*File too large", line)
    for name in ADAPTERS:
        assert (killed / name / "adapter_model.safetensors").read_bytes() == b"older"
    assert not any(name.startswith(".saving") for name in names(killed))

    trained(config, killed)
    assert_same_result(killed, uninterrupted)


def test_lines_that_do_not_fit_on_the_disk_wait_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = RunMetrics(tmp_path / "metrics.jsonl")
    expected = RunMetrics(tmp_path / "expected.jsonl")
    for step in range(1, 7):
        for each in (metrics, expected):
            each.add_micro_batch(torch.tensor(float(step)))
        expected.end_step(step, step / 6, {})
        with files_of_at_most(70 if step in (3, 4) else 1000):  # a line and a half
            metrics.end_step(step, step / 6, {})
    metrics.finish()
    assert (tmp_path / "metrics.jsonl").read_text() == expected.text
    assert len(caplog.messages) == 1
    assert "metrics.jsonl " in caplog.messages[0] and "File too large" in caplog.messages[0]
    metrics.close()
    expected.close()


def test_an_adapter_that_cannot_be_written_leaves_the_older_one(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    path = str(checkpoints("llama"))
    with served(path) as endpoint:
        trunk = zsl.RemoteTrunk(endpoint)
        split = with_lora(zsl.load_client(path, trunk, layers="client"))
        zsl.save_adapter(split, tmp_path / "adapter")
        before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
        with torch.no_grad():
            for parameter in split.parameters():
                parameter.add_(1.0)
        with files_of_at_most(3_000), pytest.raises(RunFailed, match=rf"adapter .*{tmp_path}.*too large"):
            zsl.save_adapter(split, tmp_path / "adapter")
        trunk.close()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert names(tmp_path) == {"adapter"}


def test_the_best_checkpoint_is_kept_under_its_own_path(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = SplitTrainer._save_checkpoint

    def saving(trainer: SplitTrainer, *arguments: Any) -> None:
        trainer.state.best_global_step = 4
        save(trainer, *arguments)

    monkeypatch.setattr(SplitTrainer, "_save_checkpoint", saving)
    trained(config, tmp_path / "out", "train.save_steps=2")
    kept = {name for name in names(tmp_path / "out") if name.startswith("checkpoint")}
    assert kept == {"checkpoint-4", "checkpoint-10", "checkpoint-12"}
    for name in kept:
        state = json.loads((tmp_path / "out" / name / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "out" / "checkpoint-4")
