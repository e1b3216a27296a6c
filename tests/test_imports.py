"""Imports only point down, the two sides never meet, and looking at zsl costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "zsl"

# What each room may import of zsl, beside itself.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "printable": set(),
    "small_files": {"errors"},
    "wire": {"errors", "printable"},
    "transport": {"errors", "small_files", "wire"},
    "split": {"errors", "wire"},
    "trunk": {"errors", "printable", "small_files", "wire", "transport", "split", ""},
    "client": {"errors", "printable", "wire", "transport", "split", ""},
    "training": {"errors", "printable", "small_files", "wire", "split", "client", "trunk"},
    "cli": {"errors", "printable", "transport", "split", "client", "trunk", "training", ""},
}
# Rooms and files that know no torch, so that they run and can be tested where there is none.
WITHOUT_TORCH = [
    "zsl.errors",
    "zsl.wire.frames",
    "zsl.transport.router",
    "zsl.transport.dealer",
    "zsl.trunk.server",
    "zsl.client.connection",
    "zsl.training.config",
    "zsl.training.resume",
    "zsl.training.report",
]


def room_of(module: str) -> str:
    """`zsl.wire.frames` is in `wire`; `zsl` itself is in ''."""
    return module.removeprefix("zsl").strip(".").partition(".")[0]


def zsl_imports(file: Path) -> set[str]:
    """The rooms that a file imports, those under TYPE_CHECKING too."""
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            rooms |= {room_of(alias.name) for alias in node.names if alias.name.partition(".")[0] == "zsl"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            if (node.module or "").partition(".")[0] == "zsl":
                rooms.add(room_of(node.module or ""))
    return rooms


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_only_point_down(file: Path) -> None:
    room = file.relative_to(ROOT).parts[0].removesuffix(".py")
    if room == "__init__":
        return  # names of every room, loaded when they are asked for
    assert zsl_imports(file) - {room} <= ALLOWED[room]


def test_every_room_is_in_the_table() -> None:
    rooms = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == ALLOWED.keys()


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
