"""Handler of SIGHUP: reload the tenants, or end if the terminal has closed."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable

from zsl.errors import ConfigError

logger = logging.getLogger(__name__)


class Hangup:
    """Handles SIGHUP. With a list of tenants: `reload`. Without: `end` if the terminal has closed, else ignore."""

    def __init__(self, reload: Callable[[], None] | None, end: Callable[[signal.Signals], None]) -> None:
        self.reload = reload
        self.end = end
        self._had_terminal = _has_terminal()
        # Under nohup, a daemon without tenants outlives its terminal.
        self.is_obeyed = reload is not None or signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN

    def __call__(self, *_: object) -> None:
        if self.reload is not None:
            try:
                self.reload()
            except ConfigError as error:
                logger.error("the list of tenants stays as it was: %s", error)
            else:
                logger.info("SIGHUP: read the list of tenants again")
        elif self._had_terminal and not _has_terminal():
            self.end(signal.SIGHUP)
        else:
            logger.info("SIGHUP: ignored, because there is no list of tenants to reload")


def _has_terminal() -> bool:
    """Return whether there is a controlling terminal that is still open."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
