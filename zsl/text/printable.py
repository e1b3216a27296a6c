"""Escapes text that others wrote, so that it can neither steer a terminal nor pose as a line of its own.

Names and numbers of machines are refused where they enter (`zsl.wire.messages`); texts for people, file names and data
are escaped where they are shown.
"""

from __future__ import annotations

import logging
import re
from types import TracebackType

# Controls of C0 and C1, marks that turn the direction of writing, separators of lines, half characters.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff]")

_ErrorInfo = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]  # as logging has it
)


def printable(text: str) -> str:
    r"""Escape what is not to be seen in a line, as `\x1b`, `\n` or `\u2028`."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def is_printable(text: str) -> bool:
    """Check that `printable` has nothing to escape."""
    return _UNPRINTABLE.search(text) is None


def printable_lines(text: str) -> str:
    """Escape a text of several lines: its line ends stay."""
    return "\n".join(map(printable, text.split("\n")))


class PrintableFormatter(logging.Formatter):
    """Writes each message in one line, and a traceback below it indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: _ErrorInfo) -> str:  # noqa: N802
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        return _indented(stack_info)


def _indented(text: str) -> str:
    return "\n".join(f"  {printable(line)}" for line in text.split("\n"))
