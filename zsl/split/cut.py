"""Parse the cut `[start, stop)` from text, and check it against a number of layers."""

from __future__ import annotations

import re

from zsl.errors import ConfigError, ModelError
from zsl.wire.messages import Cut


def parse_cut(text: str) -> Cut:
    """Parse a cut written as `START:STOP`, such as `2:10`. Raises `ConfigError`."""
    match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text.strip())
    if match is None or int(match[1]) >= int(match[2]):
        raise ConfigError(f"cut {text!r}: write START:STOP with START < STOP, for example 2:10")
    return Cut(start=int(match[1]), stop=int(match[2]))


def check_cut(cut: Cut, layers: int) -> None:
    """Raise `ModelError` if the cut is outside the model's layers."""
    if not 0 <= cut.start < cut.stop <= layers:
        raise ModelError(f"cut {cut}: the model has layers 0 to {layers - 1}; choose 0 <= START < STOP <= {layers}")
