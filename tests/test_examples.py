"""The example scripts run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from support.daemon import Daemon

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_plain_loop_trains_through_a_daemon_that_was_started_with_no_argument(tmp_path: Path) -> None:
    with Daemon(log=tmp_path / "log") as daemon:
        command = [sys.executable, str(EXAMPLES / "plain_loop.py"), daemon.endpoint]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\d+\.\d+)", finished.stdout)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.5
    assert (tmp_path / "runs" / "plain_loop" / "adapter" / "adapter_model.safetensors").exists()
