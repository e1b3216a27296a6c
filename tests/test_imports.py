"""Looking at zsl costs nothing. That imports point down, and which, is in setup.cfg for `lint-imports`."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Rooms and files that know no torch, so that they run and can be tested where there is none.
WITHOUT_TORCH = [
    "zsl.errors",
    "zsl.wire.frames",
    "zsl.transport.router",
    "zsl.transport.dealer",
    "zsl.trunk.daemon.server",
    "zsl.link.connection",
    "zsl.training.config.config",
    "zsl.training.directory.resume",
    "zsl.training.report.screen",
]


@pytest.mark.parametrize("module", ["zsl", *WITHOUT_TORCH])
def test_loads_neither_torch_nor_transformers(module: str) -> None:
    assert loaded_after(f"import {module}") == "[]"


@pytest.mark.parametrize("command", ["zsl.cli.trunkd:trunkd", "zsl.cli.train:train"])
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_neither_torch_nor_transformers(command: str, option: str) -> None:
    module, _, name = command.partition(":")
    script = (
        f"from {module} import {name}\n"
        f"try:\n    {name}(['{option}'])\n"
        "except SystemExit as end:\n    assert end.code == 0"
    )
    assert loaded_after(script).splitlines()[-1] == "[]"


def loaded_after(script: str) -> str:
    probe = f"{script}\nimport sys\nprint(sorted({{'torch', 'transformers', 'peft'}} & sys.modules.keys()))"
    finished = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()
