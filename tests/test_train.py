"""`zsl-train` as the person who types it sees it."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from transformers import default_data_collator

import zsl
from support import batches
from support.daemon import Daemon
from support.data import synthetic_rows
from support.models import CUT, local_model
from zsl.cli.train import train as train_command
from zsl.models.reference import resolve
from zsl.training.config.config import read_config
from zsl.training.config.data_table import DataTable
from zsl.training.data.load import load_data

COMMAND = [sys.executable, "-c", "from zsl.cli.train import train; train(prog_name='zsl-train')"]
# What a shell starts in the background without job control inherits that SIGINT is ignored.
WITH_SIGINT = [*COMMAND[:2], f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {COMMAND[2]}"]

SMALL = """
[model]
name = "{model}"
[trunk]
cut = "2:4"
[data]
samples = 12
max_length = 16
[peft]
r = 4
target_modules = ["q_proj", "v_proj"]
[train]
learning_rate = 1e-2
num_train_epochs = 2
seed = 0
"""


def train(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture
def config(tmp_path: Path, checkpoints: Callable[..., Path]) -> Path:
    file = tmp_path / "small.toml"
    file.write_text(SMALL.format(model=checkpoints("llama")))
    return file


@pytest.fixture(scope="module")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[..., Path]
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One whole run with an embedded trunk; several tests look at it."""
    directory = tmp_path_factory.mktemp("run")
    (directory / "small.toml").write_text(SMALL.format(model=checkpoints("llama")))
    finished = train("small.toml", "--save-dir", "out", cwd=directory)
    assert finished.returncode == 0, finished.stderr
    return directory / "out", finished


def lines_in(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses_in(directory: Path) -> list[float]:
    return [line["loss"] for line in lines_in(directory) if "loss" in line]


def test_it_prints_what_it_does_in_order(finished_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, finished = finished_run
    headings = [
        "Configuration",
        "Model parts",
        "Trainable parameters",
        "Connection",
        "Data set",
        "Training",
        "Saved",
        "Summary",
    ]
    positions = [re.search(rf"^{heading}$", finished.stdout, re.M) for heading in headings]
    assert all(positions), finished.stdout
    starts = [match.start() for match in positions if match]
    assert starts == sorted(starts)
    for pattern in (
        r"bottom +embeddings, layers 0-1 +[\d,]+  this process",
        r"trunk +layers 2-3 +[\d,]+  embedded trunk",
        r"top +layers 4-5, head +[\d,]+  this process",
        r"bottom +[\d,]+ of [\d,]+ \(\d+\.\d\d%\)",
        r"tcp://127\.0\.0\.1:\d+\n  llama \(6 layers, weights [0-9a-f]{12}\), cut 2:4, f32, mode exact",
        r"synthetic, 12 rows of 16 tokens",
        r"step 12/12: loss \d+\.\d{4}",
        r"Epoch 1: 6 steps, loss average \d+\.\d{4}, lowest \d+\.\d{4}, highest \d+\.\d{4}",
        r"Epoch 2: 6 steps",
        r"steps +12 in",
        r"The loss fell by \d+\.\d{4}\.",
    ):
        assert re.search(pattern, finished.stdout), f"{pattern} is not in\n{finished.stdout}"
    too_wide = [line for line in finished.stdout.partition("Model parts")[2].splitlines() if len(line) > 80]
    assert too_wide == []
    assert finished.stderr == "", "no warning, and no progress bar in what is no terminal"


def test_the_summary_is_what_the_metrics_say(finished_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    directory, finished = finished_run
    losses = losses_in(directory)
    assert len(losses) == 12
    shown = {name: float(value) for name, value in re.findall(r"^  (\w+) +(\d+\.\d{4})$", finished.stdout, re.M)}
    expected = {"first": losses[0], "last": losses[-1], "lowest": min(losses), "average": sum(losses) / 12}
    assert shown == {name: round(value, 4) for name, value in expected.items()}
    assert losses[-1] < losses[0]


def test_the_saved_adapter_on_the_whole_model_continues_where_training_ended(
    finished_run: tuple[Path, subprocess.CompletedProcess[str]], checkpoints: Callable[..., Path]
) -> None:
    """The loss of the trained rows on the whole local model with the adapter is below that without it."""
    directory, _ = finished_run
    path = str(checkpoints("llama"))
    data = load_data(DataTable(samples=12, max_length=16), resolve(path)).train
    batch = default_data_collator(list(data))

    def loss(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(model.eval()(**batch).loss)

    adapted = loss(PeftModel.from_pretrained(local_model(path), str(directory / "adapter")))
    assert adapted < loss(local_model(path)) - 0.1
    assert adapted <= losses_in(directory)[-1] + 0.2
    for side in ("bottom_lora", "top_lora"):
        assert PeftModel.from_pretrained(local_model(path), str(directory / side))


def test_the_saved_adapter_gives_the_same_logits_on_the_split_and_on_the_whole_model(
    finished_run: tuple[Path, subprocess.CompletedProcess[str]],
    checkpoints: Callable[..., Path],
    serve: Callable[..., Daemon],
) -> None:
    path, adapter = str(checkpoints("llama")), str(finished_run[0] / "adapter")
    trunk = zsl.RemoteTrunk(serve("llama").endpoint)
    ids = batches.tokens(2, 16)
    with torch.no_grad():
        split = PeftModel.from_pretrained(zsl.load_client(path, trunk), adapter)(input_ids=ids).logits
        whole = PeftModel.from_pretrained(local_model(path), adapter)(input_ids=ids).logits
        bare = local_model(path)(input_ids=ids).logits
    trunk.close()
    assert torch.equal(split, whole)
    assert not torch.equal(whole, bare)


def test_through_a_daemon_the_losses_are_those_of_the_embedded_trunk(
    finished_run: tuple[Path, subprocess.CompletedProcess[str]],
    config: Path,
    serve: Callable[..., Daemon],
    tmp_path: Path,
) -> None:
    server = serve("llama").endpoint.removeprefix("tcp://")
    finished = train(config, "--server", server, "--save-dir", tmp_path / "out", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert f"  tcp://{server}\n  llama" in finished.stdout
    assert losses_in(tmp_path / "out") == losses_in(finished_run[0])


@pytest.mark.long
def test_any_key_can_be_set_and_the_mode_shows(config: Path, tmp_path: Path) -> None:
    finished = train(
        config, "--set", "train.max_steps=2", "--set", "trunk.mode=straight-through", "--save-dir", "out", cwd=tmp_path
    )
    assert finished.returncode == 0, finished.stderr
    assert "mode straight-through" in finished.stdout
    assert len(losses_in(tmp_path / "out")) == 2


@pytest.mark.long
def test_overlap_and_a_deterministic_trunk_change_no_loss(config: Path, tmp_path: Path) -> None:
    common = ["train.max_steps=2", "train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=4"]
    runs = {
        "one by one": [],
        "deterministic": ["trunk.deterministic=packed"],
        "overlapped": ["trunk.deterministic=packed", "train.overlap=4"],
    }
    losses = {}
    for name, settings in runs.items():
        options = [option for setting in (*common, *settings) for option in ("--set", setting)]
        directory = tmp_path / name.replace(" ", "_")
        finished = train(config, *options, "--save-dir", directory, cwd=tmp_path)
        assert finished.returncode == 0, finished.stderr
        losses[name] = losses_in(directory)
    assert losses["deterministic"] == pytest.approx(losses["one by one"], rel=1e-5)
    assert losses["overlapped"] == losses["deterministic"]  # though micro-batches share passes then


def assert_one_line(finished: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert finished.returncode == code, finished.stderr
    assert "Traceback" not in finished.stderr
    line = finished.stderr.strip().splitlines()[-1]
    assert line.startswith("zsl-train: "), finished.stderr
    for word in words:
        assert word in line, line


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        (["data.sample=5"], 2, ["small.toml", "data.sample", "did you mean data.samples?"]),
        (["dat.samples=5"], 2, ["small.toml", "[dat]", "did you mean [data]?"]),
        (["peft.rang=5"], 2, ["small.toml", "peft.rang"]),
        (["lora.r=5"], 2, ["small.toml", "[lora]", "[peft]"]),
        (["train.learning_rate=fast"], 2, ["small.toml", "train.learning_rate = 'fast'", "valid number"]),
        (["train.learning_rat=5"], 2, ["small.toml", "train.learning_rat", "did you mean train.learning_rate?"]),
        (["data.samples=none"], 2, ["small.toml", "data.samples"]),
        (["data.max_length=65"], 2, ["data.max_length = 65", "at most 64 tokens"]),
        (["data.name=wikipedia"], 2, ["wikipedia", "synthetic, python-docs"]),
        (["trunk.mode=fast"], 2, ["small.toml", "trunk.mode", "straight-through"]),
        (["trunk.cut=4:2"], 2, ["4:2", "2:10"]),
        (["trunk.wire_dtype=int8"], 2, ["small.toml", "trunk.wire_dtype", "bfloat16"]),
        (["train.overlap=0"], 2, ["train.overlap = 0"]),
        (["train.overlap=2"], 2, ["overlap = 2", "gradient_accumulation_steps = 1"]),
        (["peft.target_modules=nothing"], 2, ["small.toml", "[peft]", "target_modules = nothing", "q_proj"]),
        (["nonsense"], 2, ["nonsense", "table.key=value"]),
        (["model.name=random:nothing"], 3, ["nothing"]),
        (["model.name=/no/such"], 3, ["model '/no/such' cannot be loaded: there is no such directory", "hub id"]),
        (["model.name=./no"], 3, ["model './no'", "no such directory"]),
        (["model.name=~/no"], 3, ["model '~/no'", "no such directory"]),
        (["model.name=~nobody-here/no"], 3, ["model '~nobody-here/no'", "no such directory"]),
        (["model.name=a/b/c/d"], 3, ["model 'a/b/c/d'", "no such directory"]),
        (
            ["model.name=random:gpt2", "data.name=python-docs"],
            3,
            ["no tokenizer", "name a pretrained model with"],
        ),
        (["trunk.endpoint=127.0.0.1:1", "trunk.connect_timeout_seconds=0.3"], 3, ["127.0.0.1:1", "zsl-trunkd"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)
def test_what_cannot_run_is_one_line_and_the_right_exit_code(
    config: Path, tmp_path: Path, settings: list[str], code: int, words: list[str]
) -> None:
    options = [option for setting in settings for option in ("--set", setting)]
    result = CliRunner().invoke(
        train_command, [str(config), *options, "--save-dir", str(tmp_path)], prog_name="zsl-train"
    )
    assert result.exit_code == code, result.output
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("zsl-train: ")
    for word in words:
        assert word in line


def test_a_missing_and_a_broken_file_are_exit_2_with_the_place(tmp_path: Path) -> None:
    assert_one_line(train("nowhere.toml", cwd=tmp_path), 2, "nowhere.toml", "No such file")
    (tmp_path / "broken.toml").write_text("[model\nname = 1")
    assert_one_line(train("broken.toml", cwd=tmp_path), 2, "broken.toml", "line 1")


def test_another_cut_or_other_weights_at_the_daemon_are_exit_3(
    config: Path, serve: Callable[..., Daemon], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    server = serve("llama").endpoint
    finished = train(config, "--server", server, "--set", "trunk.cut=1:4", cwd=tmp_path)
    assert_one_line(finished, 3, "cut 2:4", "1:4", server)
    other = checkpoints("llama", seed=7)
    finished = train(config, "--server", server, "--set", f"model.name={other}", cwd=tmp_path)
    assert_one_line(finished, 3, "weights", "same checkpoint", server)


@pytest.mark.long
def test_an_empty_text_file_is_exit_3_and_a_model_without_tokenizer_is_named(config: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    assert_one_line(train(config, "--set", "data.name=empty.txt", cwd=tmp_path), 3, "empty.txt", "empty")
    assert_one_line(train(config, "--set", "data.name=python-docs", cwd=tmp_path), 3, "has no tokenizer; name a model")


def start_long_run(config: Path, server: str | None, stderr: Path) -> subprocess.Popen[str]:
    """A run of thousands of steps, which has taken three of them. It leads a group of processes, as in a terminal."""
    options = ["train.num_train_epochs=1000", "trunk.request_timeout_seconds=3"]
    command = [*WITH_SIGINT, str(config), *(["--server", server] if server else []), "--save-dir", "out"]
    command += [word for option in options for word in ("--set", option)]
    with stderr.open("w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=config.parent, process_group=0
        )
    assert process.stdout is not None
    for line in process.stdout:
        if "step 3/" in line:
            return process
    raise AssertionError(stderr.read_text())


def test_a_daemon_that_dies_leaves_what_was_trained_so_far_on_disk(
    config: Path, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    path = str(checkpoints("llama"))
    with Daemon("--model", path, "--cut", CUT, log=tmp_path / "log") as daemon:
        process = start_long_run(config, daemon.endpoint, tmp_path / "stderr")
        daemon.signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert process.returncode == 1
    last = (tmp_path / "stderr").read_text().strip().splitlines()[-1]
    assert re.match(r"zsl-train: training ended after step \d+: .*lost.*; the adapters .* are in out$", last), last
    assert PeftModel.from_pretrained(local_model(path), str(tmp_path / "out" / "adapter"))
    assert len(losses_in(tmp_path / "out")) >= 3


@pytest.mark.parametrize("stop", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_run_that_is_stopped_saves_what_it_has(
    config: Path, serve: Callable[..., Daemon], tmp_path: Path, stop: signal.Signals
) -> None:
    process = start_long_run(config, serve("llama").endpoint, tmp_path / "stderr")
    process.send_signal(stop)
    process.communicate(timeout=60)
    assert process.returncode == 128 + stop
    last = (tmp_path / "stderr").read_text().strip().splitlines()[-1]
    assert re.match(r"zsl-train: training ended after step \d+: interrupted; .* are in out$", last), last
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.long
def test_ctrl_c_ends_a_run_before_the_daemon_that_it_has_started(config: Path, tmp_path: Path) -> None:
    process = start_long_run(config, None, tmp_path / "stderr")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    told = (tmp_path / "stderr").read_text().strip().splitlines()
    assert len(told) == 1 and "interrupted" in told[0] and "adapters" in told[0], told


def test_the_synthetic_language_is_seeded_and_learnable() -> None:
    """A word mostly determines the next: the best guess is right far more often than any one word occurs."""
    rows = synthetic_rows(50, 100, vocabulary=1000, seed=3)
    assert rows == synthetic_rows(50, 100, vocabulary=1000, seed=3)
    assert rows != synthetic_rows(50, 100, vocabulary=1000, seed=4)
    pairs = [(one, two) for row in rows for one, two in itertools.pairwise(row)]
    best = {
        one: max({two for first, two in pairs if first == one}, key=lambda two: pairs.count((one, two)))
        for one in {one for one, _ in pairs}
    }
    assert sum(best[one] == two for one, two in pairs) / len(pairs) > 0.7


def test_the_printed_configuration_is_the_configuration(config: Path, tmp_path: Path) -> None:
    checked = read_config(config, settings=["peft.lora_alpha=3"], overrides={})
    printed = tmp_path / "small.toml"
    printed.write_text(checked.as_toml())
    assert read_config(printed, overrides={}) == checked


@pytest.mark.parametrize("name", ["synthetic", "smollm2"])
def test_the_examples_are_valid_configurations(name: str) -> None:
    assert read_config(Path(__file__).parent.parent / "examples" / f"{name}.toml", overrides={})
