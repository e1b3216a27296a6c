"""What a check found: one line each. Knows not what is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from zsl.errors import ZslError
from zsl.text.printable import printable


class State(StrEnum):
    """How a check ended, as it is printed."""

    OK = "ok"
    WARN = "warn"  # works, but perhaps not as is wanted
    FAIL = "FAIL"
    SKIP = "skip"  # not there, or could not be checked; no fault


@dataclass(frozen=True, slots=True)
class Check:
    """`found`: what is there; `to_do`: what to do about it. `error`: what a check ended with that could not end."""

    name: str
    state: State
    found: str
    to_do: str = ""
    error: Exception | None = field(default=None, compare=False)

    @property
    def line(self) -> str:
        text = f"{self.found}; {self.to_do}" if self.to_do else self.found
        return f"{self.state:<4}  {self.name:<14}  {printable(' '.join(text.split()))}"


def attempt(name: str, check: Callable[[], Check]) -> Check:
    """What `check` finds. One that raises has failed: with the error's own words, which say what to do."""
    try:
        return check()
    except ZslError as error:
        return Check(name, State.FAIL, str(error), error=error)
    except Exception as error:  # whatever is broken on this machine is what is looked for
        text = f"{type(error).__name__}: {error}"
        return Check(name, State.FAIL, text, "unexpected: --debug shows where", error=error)
