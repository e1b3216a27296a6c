"""What the documentation says is shown by a test, is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from zsl.training.toml_reference import toml_reference

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"`(?:bin/test )?(?:tests/)?(test_\w+)(?:\.py)?(?: -k (\w+))?`")
DOCUMENTS = ["README.md", "docs/reliability.md", "docs/security.md", "docs/batching.md"]


def names_of_tests(file: Path) -> list[str]:
    tree = ast.parse(file.read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node.name for node in tree.body if isinstance(node, functions) and node.name.startswith("test_")]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_test_that_is_named_is_there(document: str) -> None:
    missing = []
    for name, words in NAMED.findall((ROOT / document).read_text()):
        file = ROOT / "tests" / f"{name}.py"
        if not file.exists() or not any(words in test for test in names_of_tests(file)):
            missing.append(f"{name} -k {words}")
    assert missing == []


@pytest.mark.parametrize(
    "document", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")), ids=lambda path: path.name
)
def test_every_file_that_is_linked_to_is_there(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_reference_of_the_configuration_is_that_of_the_schema() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == toml_reference()


def test_rows_of_faults_and_bad_input_each_name_a_test() -> None:
    rows = [line for line in (ROOT / "docs/reliability.md").read_text().splitlines() if line.startswith("| ")]
    without = [row for row in rows if "`test_" not in row and "the same" not in row and "shown by" not in row]
    assert len(rows) > 50 and without == []


def test_no_deadline_looks_at_the_wall_clock() -> None:
    """`time.time` may jump. (A log line's own time is the one thing that it is for.)"""
    found = [
        str(file)
        for file in sorted((ROOT / "zsl").rglob("*.py"))
        if re.search(r"\btime\.time\(|\bdatetime\b", file.read_text())
    ]
    assert found == []
