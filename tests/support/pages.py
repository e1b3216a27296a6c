"""The pages as a reader meets them: their blocks in order, and the commands that are in them. Knows no torch."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
TRANSLATED = {page: page.with_suffix(".zh-CN.md") for page in PAGES if page.with_suffix(".zh-CN.md") in PAGES}
# What a block may be: commands, a file, a program, or something to look at.
LANGUAGES = {"sh", "toml", "python", "text"}


@dataclass(frozen=True, slots=True)
class Block:
    """Text between two fences."""

    language: str
    text: str
    line: int

    @property
    def commands(self) -> list[str]:
        """The command lines of a block of them, whole, without comments."""
        if self.language != "sh":
            return []
        lines = re.sub(r"\\\n\s*", " ", self.text).splitlines()
        return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    found, opened = [], None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened = (line.removeprefix("```"), number)
        else:
            inside = page.read_text().splitlines()[opened[1] : number - 1]
            found.append(Block(opened[0], "\n".join(inside) + "\n", opened[1]))
            opened = None
    assert opened is None, f"{page}: the block of line {opened} does not end"
    return found


def prose_of(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def options_of_command(command: click.Command) -> set[str]:
    """The options of a command, as they are written."""
    return {text for parameter in command.params for text in (*parameter.opts, *parameter.secondary_opts)}


def words_of(command: str) -> tuple[dict[str, str], list[str]]:
    """A command's environment and its words, as a shell sees them."""
    words = shlex.split(command)
    environment = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, environment[name] = words.pop(0).partition("=")
    return environment, words
