"""Standard output that may go away: a pipe whose reader has ended, or a full disk, must not end what runs.

Knows no torch.
"""

from __future__ import annotations

import io
import logging
import os
from typing import Any

logger = logging.getLogger(__name__)


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
            # What waits in the stream's buffer goes there too, also when the interpreter ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            logger.warning("standard output cannot be written any more: %s; going on without it", error.strerror)
