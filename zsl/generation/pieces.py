"""Results of a generation: pieces of text with log-probabilities, and the whole. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Logarithm of a token's probability; `top` has the most probable tokens in its place, with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """One token's addition to the text: empty where the text waits for the next tokens."""

    text: str
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Generated:
    """A whole text. `finish`: `stop` by the model or a stop string, `length` at the limit, or `cancelled`."""

    text: str
    tokens: int
    finish: Finish
