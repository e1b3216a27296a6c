"""Escape untrusted text, so that it can neither control a terminal nor forge a log line.

`zsl.wire.messages` rejects invalid names and numbers as they arrive; texts for people, file names and data are escaped
as they are shown.
"""

from __future__ import annotations

import logging
import re
from types import TracebackType

# C0 and C1 controls, bidirectional and zero-width marks, line separators, surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff]")

_ErrorInfo = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]  # as logging has it
)


def printable(text: str) -> str:
    r"""Escape unprintable characters, as `\x1b`, `\n` or `\u2028`."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def is_printable(text: str) -> bool:
    """Return whether `printable` has nothing to escape."""
    return _UNPRINTABLE.search(text) is None


def printable_lines(text: str) -> str:
    """Escape a text of several lines, except its line ends."""
    return "\n".join(map(printable, text.split("\n")))


class PrintableFormatter(logging.Formatter):
    """Format each log message in one line, and a traceback indented below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: _ErrorInfo) -> str:  # noqa: N802
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        return _indented(stack_info)


def _indented(text: str) -> str:
    return "\n".join(f"  {printable(line)}" for line in text.split("\n"))
