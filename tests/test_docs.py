"""What the documentation says is shown by a test, is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from zsl.training.toml_reference import toml_reference

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"`(?:bin/test )?(?:tests/)?(test_\w+)(?:\.py)?(?: -k (\w+))?`")
DOCUMENTS = ["README.md", "README.zh-CN.md", "docs/reliability.md", "docs/security.md", "docs/batching.md"]


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


def code_by_section(document: str) -> list[tuple[list[str], set[str]]]:
    """Of each section of a Markdown file: the lines of its examples, without comments, and what is in backticks."""
    sections = []
    for section in re.split(r"^## ", (ROOT / document).read_text(), flags=re.MULTILINE):
        prose, *blocks = re.split(r"^```", section, flags=re.MULTILINE)
        examples, prose = blocks[0::2], "".join([prose, *blocks[1::2]])
        lines = re.findall(r"^    .*$", prose, flags=re.MULTILINE) + "".join(examples).splitlines()
        sections.append(([re.sub(r"\s*# .*", "", line) for line in lines], set(re.findall(r"`([^`\n]+)`", prose))))
    return sections


def test_both_readmes_have_the_same_commands_examples_and_names_section_by_section() -> None:
    english, chinese = code_by_section("README.md"), code_by_section("README.zh-CN.md")
    assert len(english) > 5 and len(english) == len(chinese)
    for in_english, in_chinese in zip(english, chinese, strict=True):
        assert in_chinese == in_english


def test_the_reference_of_the_configuration_is_that_of_the_schema() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == toml_reference()


def test_rows_of_faults_and_bad_input_each_name_a_test() -> None:
    rows = [line for line in (ROOT / "docs/reliability.md").read_text().splitlines() if line.startswith("| ")]
    without = [row for row in rows if "`test_" not in row and "the same" not in row and "shown by" not in row]
    assert len(rows) > 50 and without == []


def test_every_message_that_troubleshooting_explains_is_one_that_zsl_says() -> None:
    source = " ".join(re.sub(r'"\s*\n\s*f?"', "", file.read_text()) for file in sorted((ROOT / "zsl").rglob("*.py")))
    connecting = (ROOT / "docs/troubleshooting.md").read_text().split("## It is slow")[0]
    first_cells = [line.split("|")[1] for line in connecting.splitlines() if line.startswith("| ")]
    pieces = [piece for cell in first_cells for text in re.findall(r"`([^`]+)`", cell) for piece in text.split("…")]
    pieces = [words for piece in pieces for words in piece.split(": ") if words.strip(" :")]
    assert len(pieces) > 8
    assert [words for words in pieces if words.strip(" :") not in source] == []


def test_no_deadline_looks_at_the_wall_clock() -> None:
    """`time.time` may jump. (A log line's own time is the one thing that it is for.)"""
    found = [
        str(file)
        for file in sorted((ROOT / "zsl").rglob("*.py"))
        if re.search(r"\btime\.time\(|\bdatetime\b", file.read_text())
    ]
    assert found == []
