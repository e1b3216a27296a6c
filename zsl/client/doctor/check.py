"""Result of a `zsl doctor` check: its state, and its line of text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from zsl.errors import ZslError
from zsl.text.printable import printable


class State(StrEnum):
    """Outcome of a check, as it is printed."""

    OK = "ok"
    WARN = "warn"  # works, but perhaps not as intended
    FAIL = "FAIL"
    SKIP = "skip"  # missing or not checkable, which is no failure


@dataclass(frozen=True, slots=True)
class Check:
    """Result of a check. `found`: finding; `to_do`: advice; `error`: exception, if the check crashed."""

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
    """Run a check and return its result. An exception is a failure, with the text of the error."""
    try:
        return check()
    except ZslError as error:
        return Check(name, State.FAIL, str(error), error=error)
    except Exception as error:  # a broken installation may raise anything
        text = f"{type(error).__name__}: {error}"
        return Check(name, State.FAIL, text, "unexpected: --debug shows where", error=error)
