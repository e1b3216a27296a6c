"""Failpoints for tests: named places at which the daemon kills itself or hangs. Off in normal use.

    ZSL_FAILPOINT=before-backward:kill        SIGKILL before the first backward is computed
    ZSL_FAILPOINT=after-forward:kill:3        SIGKILL after the third forward, before it is answered
    ZSL_FAILPOINT=before-forward:hang         the compute thread hangs

Places: `before-forward`, `after-forward`, `before-backward`, `after-backward`; each is in the compute thread.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Mapping

from zsl.errors import ConfigError

logger = logging.getLogger(__name__)

VARIABLE = "ZSL_FAILPOINT"
_FORM = re.compile(r"((?:before|after)-(?:forward|backward)):(kill|hang)(?::(\d+))?")


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang() -> None:
    threading.Event().wait()


_ACTIONS: dict[str, Callable[[], None]] = {"kill": _kill, "hang": _hang}


class Failpoint:
    """Fails at the given visit of a place; never without a place."""

    def __init__(self, place: str | None = None, action: str = "kill", visit: int = 1) -> None:
        self._place = place
        self._act = _ACTIONS[action]
        self._visits_left = visit

    def visit(self, place: str) -> None:
        """Fail if this is the configured place and visit."""
        if place != self._place:
            return
        self._visits_left -= 1
        if self._visits_left == 0:
            self._act()


def failpoint_from(environment: Mapping[str, str]) -> Failpoint:
    """Return the failpoint named by the environment. Raises `ConfigError` for an invalid one."""
    text = environment.get(VARIABLE)
    if not text:
        return Failpoint()
    match = _FORM.fullmatch(text)
    if match is None:
        raise ConfigError(f"{VARIABLE}={text!r}: write for example before-backward:kill or after-forward:hang:3")
    logger.warning("%s=%s: this daemon will fail on purpose", VARIABLE, text)
    return Failpoint(match[1], match[2], int(match[3] or 1))
