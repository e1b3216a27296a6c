"""Every benchmark runs with a tiny model for a moment, and writes the table and the plot that it says it writes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from support.data import write_model
from support.models import CUT
from support.pages import PAGES, options_of_command

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RUN_SECONDS = 400  # a minute at most, where no one else uses the cores

TINY = ["--model", "LLAMA", "--cut", CUT, "--threads", "1"]
# By benchmark: its options (LLAMA is a checkpoint, CHAT one with a tokenizer, HERE the test's directory), columns that
# say what it found, and its files beside the first, which is its own name's with .json.
RUNS: dict[str, tuple[list[str], set[str], list[str]]] = {
    "adapter_bytes": (
        [*TINY, "--size", "1x4", "--micro-batches", "2", "--steps", "1"],
        {"adapters", "micro_batches", "up_mb", "down_mb", "adapter_up_mb", "adapter_down_mb"},
        ["adapter_bytes.png"],
    ),
    "budget": (
        [*TINY, "--only", "300 steps of one token", "--only", "a mask, 1 x 2,048 tokens"],
        {"budget_mib", "counted_mib", "resident_mib", "peak_mib", "stays_mib"},
        ["budget.log"],
    ),
    "connections": (
        ["--idle", "2", "--active", "1", "--seconds", "0.2", "--rounds", "1"],
        {"forwards_per_second", "p99_ms", "daemon_mib", "daemon_files"},
        ["connections.png"],
    ),
    "decode": (
        [
            *(*TINY, "--sessions", "1,2", "--tokens", "4", "--lengths", "8,16", "--rounds", "1", "--trainers", "1"),
            *("--shares", "0.2", "--train-size", "1x4", "--prompt-tokens", "8", "--seconds", "2"),
        ],
        {"tokens_per_second", "over_merging_off", "over_local", "late_over_early"}
        | {"first_token_ms", "between_p50_ms", "between_p99_ms", "training_steps_per_second"},
        [],
    ),
    "embedded": (
        ["--config", "HERE/run.toml", "--steps", "3", "--rounds", "1"],
        {"step_s", "over_beside", "first_step_after_s", "pss_mib"},
        ["embedded.log"],
    ),
    "decode_wan": (
        ["--model", "CHAT", "--cut", CUT, "--round-trip-ms", "5", "--tokens", "8", "--rounds", "1"],
        {"way", "tokens_per_trip", "tokens_per_second", "predicted_over_plain", "over_plain"},
        [],
    ),
    "floods": (
        ["--seconds", "0.2", "--rounds", "1", "--kinds", "status,unknown key's handshakes"],
        {"p50_alone_ms", "p50_ms", "p99_ratio"},
        [],
    ),
    "adapted_layers": (
        ["--config", "HERE/run.toml", "--work", "HERE/work", "--samples", "20", "--epochs", "1"],
        {"layers", "validation_loss", "perplexity"},
        [],
    ),
    "gpu": (
        ["--small"],
        {"clients", "over_sequential", "over_ideal", "step_p99_ms", "client_host_mib"},
        ["gpu-paths.json", "gpu.log"],
    ),
    "ghost_memory": (
        [*TINY, "--size", "1x4"],
        {"arrangement", "resident_mib", "peak_mib", "adapters_mib", "peak_over_without_mib"},
        [],
    ),
    "gradient_modes": (
        ["--config", "HERE/run.toml", "--work", "HERE/work", "--samples", "20", "--epochs", "1"],
        {"mode", "validation_loss", "perplexity"},
        [],
    ),
    "memory": (
        [*TINY, "--clients", "1", "--size", "1x4", "--stash-memory", "64MiB"],
        {"daemon_mib", "clients_mib", "over_local", "steps"},
        ["memory.log"],
    ),
    "serve_streams": (
        ["--model", "CHAT", "--cut", CUT, "--threads", "1", "--seconds", "5", "--streams", "12", "--tokens", "8"],
        {"what", "number"},
        [],
    ),
    "small_steps": (["--seconds", "0.1", "--rounds", "1"], {"over_local", "middle_half"}, ["small_steps.png"]),
    "soak": (["--minutes", "0.1", "--clients", "2"], {"what", "number"}, []),
    "step": (["--model", "LLAMA", "--tokens", "8", "--rounds", "1", "--threads", "1"], {"step_ms"}, ["step.png"]),
    "throughput": (
        [
            *TINY,
            *("--kind", "trunk", "--clients", "1", "--sizes", "1x4", "--seconds", "0.1", "--repeats", "1"),
            *("--stash-memory", "64MiB"),
        ],
        {"steps_per_second", "over_merging_off", "over_grpc", "over_zsl", "mean_batch", "daemon_mib"},
        ["throughput-trunk-1x4.png"],
    ),
    "transport": (["--rounds", "1"], {"median_ms", "over_bare", "over_zsl"}, ["transport.png"]),
    "wan": (["--micro-batches", "4", "--tokens", "8"], {"share_of_limit", "limit_steps_per_s"}, ["wan.png"]),
}
NEED_MORE = {"connections": "psutil", "throughput": "grpc", "transport": "grpc"}  # `bin/test long` installs both
CONFIG = '[model]\nname = "LLAMA"\n[peft]\nr = 2\n[data]\nname = "synthetic"\nmax_length = 8\n'


def rows_of(file: Path, columns: set[str]) -> list[dict[str, object]]:
    """The rows that a benchmark wrote. Each has a value in some column, and each column in some row."""
    results = json.loads(file.read_text())
    rows: list[dict[str, object]] = results["rows"]
    assert rows and results["machine"]["memory_gib"] > 0
    assert columns <= {name for row in rows for name, value in row.items() if value is not None}
    return rows


def test_every_benchmark_has_a_run_here() -> None:
    commands = {file.stem for file in BENCHMARKS.glob("*.py") if "@click.command" in file.read_text()}
    processes = {"connections_client", "throughput_client", "shaped_link"}  # which benchmarks start
    assert commands - processes == RUNS.keys() | {"scheduler_sim"}


def test_every_option_that_a_page_names_is_one_of_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    named = 0
    for page in PAGES:
        for name, words in re.findall(r"bin/bench (\w+)([^`\n#]*)", page.read_text()):
            found = set(re.findall(r"--[a-z-]+", words))
            named += len(found)
            assert not found or found <= options_of_command(import_module(name).main), f"{page.name}: {name} {words}"
    assert named > 10


def test_the_simulation_of_the_scheduler_has_a_row_for_each_policy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scheduler_sim

    monkeypatch.setattr(scheduler_sim, "CLIENTS", (2, 10))
    monkeypatch.setattr(scheduler_sim, "AT_CLIENTS", 10)
    monkeypatch.setattr(scheduler_sim, "SINGLE_BATCHES", 20)
    finished = CliRunner().invoke(scheduler_sim.main, ["--out", str(tmp_path)], catch_exceptions=False)
    assert finished.exit_code == 0
    rows = rows_of(tmp_path / "scheduler_sim_cpu.json", {"mouse_p99_ms", "jain", "single_batches", "decisions_per_s"})
    assert len(rows) == 2 * len(scheduler_sim.POLICIES)
    assert (tmp_path / "scheduler_sim_cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
@pytest.mark.timeout(RUN_SECONDS + 20)
@pytest.mark.parametrize("name", RUNS)
def test_a_benchmark_writes_its_table_and_its_plot(name: str, checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    if name in NEED_MORE and find_spec(NEED_MORE[name]) is None:
        pytest.skip(f"{NEED_MORE[name]} is not installed")
    options, columns, files = RUNS[name]
    llama, here = str(checkpoints("llama", max_position_embeddings=4096)), str(tmp_path)  # rows of 2,048 of budget
    (tmp_path / "run.toml").write_text(CONFIG.replace("LLAMA", llama))
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--out", str(tmp_path / "out")]
    places = {"LLAMA": llama, "HERE": here, "CHAT": str(write_model(tmp_path)) if "CHAT" in options else ""}
    for word, place in places.items():
        options = [option.replace(word, place) for option in options]
    command += options
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True
    ) as process:
        try:
            shown, said = process.communicate(timeout=RUN_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the daemons of one that hangs
    assert process.returncode == 0, f"{shown}\n{said}"
    written = min((tmp_path / "out").glob("*.json"), key=lambda file: len(file.name))  # of several tables the last
    assert written.stem.startswith(name)
    rows = rows_of(written, columns)
    header = next(line for line in shown.splitlines() if columns <= set(line.split()))
    assert shown.count(header) == 1 and len(rows) > 1
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {written.name, *files}
