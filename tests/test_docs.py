"""What the documentation says is shown by a test, is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

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
