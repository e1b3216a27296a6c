"""The name under which zsl is installed, and what finds the package by it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import zsl
from zsl.client.doctor.packages import DISTRIBUTION

ROOT = Path(__file__).parent.parent
# On PyPI this name belongs to an unrelated project.
ANOTHERS = re.compile(r"zsl\[|pip install (?:-\S+ )*'?zsl(?![-\w])")
TEXTS = ("*.md", "*.toml", "*.py", "*.sh", "*.cfg")


def test_the_distribution_is_named_once_and_is_what_is_installed() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["metadata"]["name"] == DISTRIBUTION != "zsl"
    assert metadata.version(DISTRIBUTION) == zsl.__version__


def test_nothing_hints_at_the_project_that_has_the_packages_name() -> None:
    files = [
        file
        for pattern in TEXTS
        for place in ("*", "zsl", "docs", "examples", "bin")
        for file in _files(place, pattern)
    ]
    assert len(files) > 100
    assert [str(file) for file in files if ANOTHERS.search(file.read_text())] == []


def _files(place: str, pattern: str) -> list[Path]:
    return list(ROOT.glob(pattern) if place == "*" else (ROOT / place).rglob(pattern))


def test_a_folder_named_zsl_does_not_hide_the_package(tmp_path: Path) -> None:
    """Above a clone there is one. Python would make an empty namespace package of it if nothing else came first."""
    (tmp_path / "zsl").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(
        [sys.executable, "-c", "import zsl; print(zsl.__version__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.stdout.strip() == zsl.__version__, finished.stderr
