"""The daemon that a command starts for itself ends with it, serves nobody else, and its errors are the command's."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import zsl
from support.models import CUT
from zsl.errors import ConfigError, StartupError, TrunkAuthError
from zsl.transport.curve_keys import write_key_pair
from zsl.trunk.daemon.embedded import EmbeddedTrunk

WAIT_SECONDS = 60.0
# A process with an embedded trunk, that says where it is. With "fork", another process holds what it held open.
PARENT = """
import os, signal, sys
from zsl.trunk.daemon.embedded import EmbeddedTrunk
with EmbeddedTrunk("random:gpt2", None, "float32") as trunk:
    if sys.argv[1:] == ["fork"] and os.fork() == 0:
        os.close(1)
        signal.pause()
    print(trunk._process.pid, trunk.client_key, flush=True)
    signal.pause()
"""


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def has_ended(pid: int) -> bool:
    """True also for a process that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("forked", [[], ["fork"]], ids=["alone", "with a forked process"])
def test_it_ends_with_its_parent_even_if_that_is_killed(forked: list[str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, *forked], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        pid, key = parent.stdout.readline().split()
        assert os.getsid(int(pid)) != os.getsid(parent.pid), "Ctrl-C in the terminal of the parent reaches it"
        parent.kill()
        parent.wait(WAIT_SECONDS)
        try:
            wait_until(lambda: has_ended(int(pid)))
            assert not Path(key).parent.exists()
        finally:
            if forked:
                os.killpg(parent.pid, signal.SIGKILL)


def test_what_ends_it_at_its_start_is_raised_as_it_was_there() -> None:
    with EmbeddedTrunk("random:gpt2", "9:2", "float32") as trunk, pytest.raises(ConfigError, match="9:2") as raised:
        trunk.endpoint  # noqa: B018
    assert type(raised.value) is ConfigError
    with EmbeddedTrunk("random:gpt2", None, "float32") as trunk:
        trunk._process.kill()
        with pytest.raises(StartupError, match="SIGKILL"):
            trunk.endpoint  # noqa: B018


def test_it_serves_only_its_parent_and_tells_its_end(
    checkpoints: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = str(checkpoints("llama"))
    monkeypatch.setenv("ZSL_TRUNKD_CUT", "0:1")  # for a daemon of the user's own
    with EmbeddedTrunk(path, CUT, "float32") as trunk:
        with zsl.TrunkClient(trunk.endpoint, server_key=trunk.server_key, client_key=trunk.client_key) as client:
            assert str(client.welcome.cut) == CUT
            x = torch.zeros(1, 3, client.welcome.model.hidden_size)
            assert client.forward(x).output.shape == x.shape
        write_key_pair(tmp_path, "other")
        stranger = {"server_key": trunk.server_key, "client_key": tmp_path / "other.key_secret"}
        with pytest.raises(TrunkAuthError):
            zsl.TrunkClient(trunk.endpoint, connect_timeout_seconds=10, **stranger).connect()
        trunk._process.kill()
        trunk._reader.join(WAIT_SECONDS)
    told = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(told) == 1 and "SIGKILL" in told[0].getMessage()


def test_its_log_becomes_that_of_the_command(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines as its process writes them, and lines that libraries print."""
    entry = {"logger": "zsl.trunk.daemon.server", "level": "warning", "message": "told", "exception": "Traceback: here"}
    others = [{**entry, "level": "info"}, {**entry, "logger": "transformers"}, {**entry, "logger": "py.warnings"}]
    written = [
        "print",
        '{"a": 1}',
        *map(json.dumps, [entry, *others, {**entry, "logger": "asyncio", "level": "error"}]),
    ]
    trunk = EmbeddedTrunk("random:gpt2", None, "float32")
    trunk._process = SimpleNamespace(stdout=[f"{line}\n".encode() for line in written], wait=lambda: 1)  # type: ignore
    trunk._read()
    told = [(record.name, record.getMessage(), record.exc_text) for record in caplog.records]
    assert told == [(name, "told", "Traceback: here") for name in ("zsl.trunk.daemon.server", "asyncio")]
    assert capsys.readouterr().err == 'print\n{"a": 1}\n'
    with pytest.raises(StartupError, match="exit code 1"):
        trunk.endpoint  # noqa: B018
