"""Parse the size of a request: rows x tokens, by name or by numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass

import click


@dataclass(frozen=True)
class Size:
    """A batch of `rows` sequences of `tokens` each, of which the first `left_padding` are padding."""

    name: str
    rows: int
    tokens: int
    left_padding: int = 0

    @property
    def total_tokens(self) -> int:
        return self.rows * self.tokens


SIZES = {size.name: size for size in (Size("small", 1, 16), Size("medium", 2, 64), Size("large", 2, 128))}


def parse_size(text: str) -> Size:
    """`small`, `medium`, `large`, ROWSxTOKENS or, padded on the left, ROWSxPADDING+TOKENS."""
    if text in SIZES:
        return SIZES[text]
    match = re.fullmatch(r"([1-9]\d*)x(?:(\d+)\+)?([1-9]\d*)", text)
    if match is None:
        raise click.BadParameter(
            f"{text!r}: one of {', '.join(SIZES)}, ROWSxTOKENS such as 1x12, or ROWSxPADDING+TOKENS such as 1x4+12"
        )
    left_padding = int(match[2] or 0)
    return Size(text, int(match[1]), left_padding + int(match[3]), left_padding)
