"""Standard output that may go away: a pipe whose reader has ended, or a full disk, must not end what runs.

Knows no torch.
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
    """Let what is written to a stream go nowhere: what waits in its buffer too, also when the interpreter ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextlib.contextmanager
def shown_while_it_can_be() -> Iterator[None]:
    """Have standard output show each line when it is done, and let nothing end because it cannot be written."""
    with contextlib.ExitStack() as stack:
        if sys.stdout is None:  # closed by whoever started this
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        elif isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)  # a log file has each step when it is done
            stack.enter_context(contextlib.redirect_stdout(Shown(sys.stdout)))
        yield


class Shown(io.TextIOBase):
    """Passes on to `stream`. When that cannot be written any more, a warning says so, and the rest is not shown."""

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
