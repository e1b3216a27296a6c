"""Keep keys and values of one generation for the next, whose prompt begins with the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Reusable:
    """Keys and values of a conversation, from turn to turn. Holds none where the model keeps none."""

    def __init__(self) -> None:
        self._cache: Any = None
        self._tokens: list[int] = []

    def for_prompt(self, prompt: Sequence[int]) -> dict[str, Any]:
        """Return the argument of `generate` for a prompt: the tokens that it begins with are not computed again."""
        cache, self._cache = self._cache, None  # a generation that fails leaves it in an unknown state
        fits = len(self._tokens) < len(prompt) and list(prompt[: len(self._tokens)]) == self._tokens
        return {} if cache is None or not fits else {"past_key_values": cache}

    def keep(self, cache: Any, tokens: Sequence[int]) -> None:
        """Keep the cache of a generation, which holds all of `tokens` but the last ones."""
        if cache is not None:
            self._cache, self._tokens = cache, list(tokens[: cache.get_seq_length()])
