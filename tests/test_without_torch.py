"""The tests that are also run where there is no torch need none: they are imported here with none to be found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import WITHOUT_TORCH

HERE = Path(__file__).parent
HEAVY = ["torch", "transformers", "peft", "accelerate", "datasets", "safetensors"]
# Imports the modules that it is told, none of which may need the heavy packages, and tells which failed.
PROBE = f"""
import importlib, json, sys
sys.modules |= dict.fromkeys({HEAVY})  # None: importing them fails
failures = {{}}
for name in json.loads(sys.stdin.readline()):
    try:
        importlib.import_module(name)
    except BaseException as error:
        failures[name] = repr(error)
print(json.dumps(failures))
"""


def failures_without_torch(modules: list[str]) -> dict[str, str]:
    finished = subprocess.run(
        [sys.executable, "-c", PROBE],
        input=json.dumps(modules),
        cwd=HERE,
        env={"PYTHONPATH": f"{HERE}:{HERE.parent}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return dict(json.loads(finished.stdout))


def test_the_listed_tests_are_there_and_need_no_torch() -> None:
    assert [name for name in WITHOUT_TORCH if not (HERE / name).exists()] == []
    assert failures_without_torch([name.removesuffix(".py") for name in WITHOUT_TORCH]) == {}


@pytest.mark.parametrize("module", ["support.models", "test_wire_tensors"])
def test_a_test_that_needs_torch_would_be_found(module: str) -> None:
    assert "torch" in failures_without_torch([module])[module]
