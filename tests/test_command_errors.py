"""How a command ends whose work has failed."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner, Result

from zsl.cli.errors import one_line_errors
from zsl.errors import RunFailed

LONG = "x" * 5000


def ended_with(error: Exception) -> Result:
    @click.command
    def command() -> None:
        with one_line_errors("zsl-some", debug=False):
            raise error

    return CliRunner().invoke(command)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\nno such\tthing\nand 200 lines\nmore", " no such thing"),
        (LONG, f" {LONG[:300]}…"),
        ("", ""),
    ],
    ids=["many lines", "a long line", "no text"],
)
def test_of_a_foreign_error_the_beginning_is_told_in_a_line(text: str, shown: str) -> None:
    ended = ended_with(OverflowError(text))
    assert (ended.exit_code, ended.stderr) == (1, f"zsl-some: OverflowError:{shown} (--debug shows where)\n")


def test_an_error_of_zsl_is_told_whole() -> None:
    ended = ended_with(RunFailed(f"first\nsecond {LONG}"))
    assert (ended.exit_code, ended.stderr) == (1, f"zsl-some: first second {LONG}\n")
