"""Keep a command running when standard output cannot be written: a closed pipe, a full disk.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger(__name__)


def to_nowhere(stream: Any) -> None:
    """Redirect a stream to the null device, including the content of its buffer."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextlib.contextmanager
def shown_while_it_can_be() -> Iterator[None]:
    """Flush standard output after each line, and ignore that it cannot be written, with one warning."""
    with contextlib.ExitStack() as stack:
        if sys.stdout is None:  # closed by the parent process
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        elif isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)  # so that a log file has each step as it ends
            stack.enter_context(contextlib.redirect_stdout(Shown(sys.stdout)))
        yield


class Shown(io.TextIOBase):
    """Forward writes to `stream`. When one fails, log a warning and drop the rest."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream

    def write(self, text: str, /) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def _try(self, action: Any, *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            to_nowhere(self._stream)
            logger.warning("standard output cannot be written any more: %s; going on without it", error.strerror)
