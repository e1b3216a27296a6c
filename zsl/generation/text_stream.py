"""Decode tokens to text as they come, and end it before a stop string. Pure: the decoder is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"  # decoders write it for bytes that are no character, or not yet one
MOST_TOKENS_OF_A_CHARACTER = 4  # a character of UTF-8 has at most four bytes


class TextStream:
    """Text of a growing list of tokens. Text that may be the beginning of a stop string is held back.

    Only the last few tokens are decoded for each new one, together with those before them: decoders treat the first
    token of a text in a special way.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = stops
        self._tokens: list[int] = []
        self._context = 0  # the first token that is decoded again
        self._read = 0  # the first token whose text was not taken
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Return the text that the token makes certain. Empty once a stop string was found."""
        self._tokens.append(token)
        text = self._new_text()
        waits = text.endswith(INCOMPLETE) and len(self._tokens) - self._read < MOST_TOKENS_OF_A_CHARACTER
        return "" if waits else self._until_a_stop(self._taken(text))

    def end(self) -> str:
        """Return the rest of the text."""
        text = self._until_a_stop(self._taken(self._new_text()))
        rest, self._held = self._held, ""
        return text + rest

    def _new_text(self) -> str:
        before = self._decode(self._tokens[self._context : self._read])
        return self._decode(self._tokens[self._context :])[len(before) :]

    def _taken(self, text: str) -> str:
        if text:
            self._context, self._read = self._read, len(self._tokens)
        return text

    def _until_a_stop(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            self.stopped, self._held = True, ""
            return text[:found]
        kept = max((_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _begun(text: str, stop: str) -> int:
    """Return the number of characters at the end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
