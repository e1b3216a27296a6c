"""The commands of `bin/` install once, one after the other, and never use half an installation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Stands for Python: a virtual environment is a copy of it, and what pip does waits for a word from the test.
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
    *"-m venv "*) mkdir -p "${{@: -1}}/bin" && cp "$0" "${{@: -1}}/bin/python" ;;
    *"pip install"*)
        bin=$(dirname "$0")
        read -r word <"$WORDS"
        [ "$word" = go ] || {{ kill -9 $PPID; exit 1; }}
        echo installed >>"$bin/log"
        printf '#!/bin/sh\\necho it runs\\n' >"$bin/zsl"
        chmod +x "$bin/zsl" ;;
    *"import sys, venv"*) echo 3.13 ;;
    *"-m pytest"*) echo "it runs" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""
# Each with its environment, and how often it calls pip.
COMMANDS = [("zsl", ".venv", 2), ("test-without-torch", ".venv-without-torch", 1)]

pytestmark = [pytest.mark.timeout(60), pytest.mark.parametrize(("command", "venv", "calls"), COMMANDS)]


class Clone:
    """A clone without any environment yet. Its `words` are what each call of pip waits for."""

    def __init__(self, place: Path) -> None:
        self.place = place
        shutil.copytree(ROOT / "bin", place / "bin")
        for name in ("setup.cfg", "constraints.txt"):
            shutil.copy(ROOT / name, place)
        interpreters = place / "interpreters"
        interpreters.mkdir()
        for name in ("python3", "python3.13"):
            (interpreters / name).write_text(PYTHON)
            (interpreters / name).chmod(0o755)
        os.mkfifo(place / "words")
        self.words = os.open(place / "words", os.O_RDWR)  # both ends: opening one would wait for the other
        path = f"{interpreters}:{os.environ['PATH']}"
        self._environment = {**os.environ, "PATH": path, "WORDS": str(place / "words")}
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, command: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [str(self.place / "bin" / command)], stdout=pipe, stderr=pipe, text=True, env=self._environment
        )
        self.processes.append(process)
        return process


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clone]:
    monkeypatch.delenv("PYTHON", raising=False)
    clone = Clone(tmp_path)
    yield clone
    os.write(clone.words, b"die\n" * 8)  # whoever still waits for one
    for process in clone.processes:
        process.kill()
        process.communicate()
    os.close(clone.words)


def test_a_second_command_waits_while_the_first_installs_and_says_so(
    clone: Clone, command: str, venv: str, calls: int
) -> None:
    first = clone.start(command)
    assert first.stderr is not None
    assert "Installing" in first.stderr.readline()
    second = clone.start(command)
    assert second.stderr is not None
    assert "waiting" in second.stderr.readline()
    os.write(clone.words, b"go\n" * calls)
    for process in (first, second):
        assert "it runs" in process.communicate()[0]
        assert process.returncode == 0
    assert (clone.place / venv / "bin" / "log").read_text() == "installed\n" * calls
    assert "it runs" in clone.start(command).communicate()[0]


def test_an_installation_that_was_interrupted_is_begun_anew(clone: Clone, command: str, venv: str, calls: int) -> None:
    os.write(clone.words, b"go\n" * (calls - 1) + b"die\n")
    assert clone.start(command).wait() == -9
    os.write(clone.words, b"go\n" * calls)
    finished = clone.start(command)
    assert "it runs" in finished.communicate()[0]
    assert (clone.place / venv / "bin" / "log").read_text() == "installed\n" * calls


def test_an_update_that_was_interrupted_is_not_used_by_what_was_there_before(
    clone: Clone, command: str, venv: str, calls: int
) -> None:
    os.write(clone.words, b"go\n" * calls)
    assert clone.start(command).wait() == 0
    constraints = clone.place / "constraints.txt"
    before = constraints.read_text()
    constraints.write_text(f"{before}# changed\n")
    os.write(clone.words, b"die\n")
    assert clone.start(command).wait() == -9
    constraints.write_text(before)
    os.write(clone.words, b"go\n" * calls)
    assert "it runs" in clone.start(command).communicate()[0]
    assert (clone.place / venv / "bin" / "log").read_text() == "installed\n" * calls
