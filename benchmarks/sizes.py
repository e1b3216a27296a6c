"""Sizes of a request: rows x tokens, by name or written out."""

from __future__ import annotations

import re
from dataclasses import dataclass

import click


@dataclass(frozen=True)
class Size:
    """A batch of `rows` sequences of `tokens` each."""

    name: str
    rows: int
    tokens: int

    @property
    def total_tokens(self) -> int:
        return self.rows * self.tokens


SIZES = {size.name: size for size in (Size("small", 1, 16), Size("medium", 2, 64), Size("large", 2, 128))}


def parse_size(text: str) -> Size:
    """`small`, `medium`, `large` or ROWSxTOKENS."""
    if text in SIZES:
        return SIZES[text]
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise click.BadParameter(f"{text!r}: one of {', '.join(SIZES)}, or ROWSxTOKENS such as 1x12")
    return Size(text, int(match[1]), int(match[2]))
