"""Tests, links and commands that the documentation names exist."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from itertools import count
from pathlib import Path

import pytest

from support.configuration_page import toml_reference
from support.pages import LANGUAGES, PAGES, ROOT, TRANSLATED, blocks_of, options_of_command, prose_of
from zsl.cli.train import train
from zsl.cli.trunkd import trunkd
from zsl.cli.zsl import zsl

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


def anchors_of(text: str) -> set[str]:
    """The headings of a page as links name them: of two that read alike the second ends with -1."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.M):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(next(each for n in count() if (each := f"{name}-{n}" if n else name) not in found))
    return found


def dead_links(page: Path) -> list[str]:
    """Links of a page, outside its blocks, to a file or a heading that is not there."""
    dead = []
    for link in re.findall(r"\]\(<?([^)>\s]+)>?|(?:src|href)=\"([^\"]+)\"|^\[[^]]+\]: (\S+)", prose_of(page), re.M):
        place, _, anchor = "".join(link).partition("#")
        if ":" in place:
            continue  # of another site
        target = page.parent / place if place else page
        if not target.exists() or (anchor and anchor not in anchors_of(target.read_text())):
            dead.append("".join(link))
    return dead


@pytest.mark.parametrize("document", PAGES, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_or_a_heading(document: Path) -> None:
    assert dead_links(document) == []


def test_a_link_to_a_heading_that_is_not_there_is_dead(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Two `words`\n## Same\n## Same\n```sh\n# no heading\n```\n[a](#two-words) [b](page.md#same-1)\n")
    assert dead_links(page) == []
    with page.open("a") as more:
        more.write("[c](#same-2) [d](#no-heading) [e](gone.md) [f](https://example.org/#x)\n\n[g]: gone.png\n")
    assert dead_links(page) == ["#same-2", "#no-heading", "gone.md", "gone.png"]


def test_every_block_says_what_it_is() -> None:
    """Commands, a file, a program, or text to look at: tests/test_pages.py runs all but the last."""
    assert sum(len(blocks_of(page)) for page in PAGES) > 30
    unknown = {block.language for page in PAGES for block in blocks_of(page)} - LANGUAGES
    assert unknown == set()
    indented = [page.name for page in PAGES if re.search(r"(^|\n)\n    \S", prose_of(page))]
    assert indented == []


def test_every_option_that_is_named_is_one_of_the_command() -> None:
    commands = {**{f"zsl {name}": command for name, command in zsl.commands.items()}, "zsl-train": train}
    commands["zsl-trunkd"] = trunkd
    options = {name: options_of_command(command) for name, command in commands.items()}
    everybodys = {"--help", "--version"}.union(*options.values())
    named = 0
    for page in PAGES:
        for span in re.findall(r"`([^`\n]+)`", prose_of(page)):
            first = re.match(r"(?:bin/)?(zsl-train|zsl-trunkd|zsl [a-z]+)\b", span)
            if first is None and not span.startswith("--"):
                continue
            known = options[first[1]] if first else everybodys
            found = set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", span))
            assert found <= known, f"{page.name}: `{span}`"
            named += len(found)
    assert named > 30


def test_bench_says_which_benchmarks_there_are(tmp_path: Path) -> None:
    (tmp_path / ".venv.sh").write_text(f"set -euo pipefail\nroot={ROOT}\nvenv={tmp_path}/none\n")
    shutil.copy(ROOT / "bin/bench", tmp_path)

    def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([tmp_path / "bench", *arguments], capture_output=True, text=True, timeout=60, check=False)

    helped = bench("--help")
    names = {line.strip() for line in helped.stdout.splitlines() if line.startswith("  ")}
    assert helped.returncode == 0 and {"step", "gradient_modes"} < names
    assert max(map(len, helped.stdout.splitlines())) <= 80
    for unusable in ([], ["nosuch"], ["report"], ["-x"]):
        refused = bench(*unusable)
        assert refused.returncode == 2 and "  step\n" in refused.stderr
        assert not unusable or unusable[0] in refused.stderr.splitlines()[0]


def shape_of(page: Path) -> list[tuple[list[str], set[str]]]:
    """Collect from each section of a page the lines of its blocks, without comments, and the words in backticks."""
    sections = []
    for section in re.split(r"^##+ ", page.read_text(), flags=re.MULTILINE):
        prose, *blocks = re.split(r"^```", section, flags=re.MULTILINE)
        examples, prose = blocks[0::2], "".join([prose, *blocks[1::2]])
        lines = [re.sub(r"\s*# .*", "", line) for line in "".join(examples).splitlines()]
        sections.append((lines, set(re.findall(r"`([^`\n]+)`", prose))))
    return sections


@pytest.mark.parametrize("page", TRANSLATED, ids=lambda page: page.name)
def test_a_translation_has_the_blocks_and_names_of_its_page_section_by_section(page: Path) -> None:
    translation = TRANSLATED[page]
    english, chinese = shape_of(page), shape_of(translation)
    assert len(english) > 5 and len(english) == len(chinese)
    for in_english, in_chinese in zip(english, chinese, strict=True):
        assert in_chinese == in_english
    assert f"]({translation.name})" in page.read_text() and f"]({page.name})" in translation.read_text()


def test_translated_are_the_pages_of_a_first_day() -> None:
    assert {page.name for page in TRANSLATED} == {"README.md", "first-run.md", "guide.md"}


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
