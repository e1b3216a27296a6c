"""Answers of OpenAI's API: bodies of whole answers, and chunks of streamed ones. Imports no torch."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from zsl.generation.pieces import Generated, Piece, TokenLogprob


def model_card(name: str, created: int) -> dict[str, Any]:
    """Describe a model."""
    return {"id": name, "object": "model", "created": created, "owned_by": "zsl"}


def now() -> int:
    """Return the seconds since 1970."""
    return time.time_ns() // 10**9


@dataclass
class Answer:
    """Answer to one request. `decode` gives the text of one token."""

    model: str
    prompt_tokens: int
    decode: Callable[[int], str]
    with_logprobs: bool
    tells_usage: bool = False
    created: int = field(default_factory=now)

    kind, prefix, chunk_kind = "", "", ""

    def __post_init__(self) -> None:
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"

    def whole(self, pieces: Sequence[Piece], made: Generated) -> dict[str, Any]:
        """Return the body of a whole answer."""
        choice = {**self.content(made.text), "logprobs": self._logprobs(pieces), "finish_reason": made.finish}
        return {**self._head(self.kind), "choices": [{"index": 0, **choice}], "usage": self._usage(made)}

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        """Return the chunk of a piece; None if it says nothing."""
        if not piece.text and (piece.logprob is None or not self.with_logprobs):
            return None
        return self._chunk({**self.delta(piece.text), "logprobs": self._logprobs([piece]), "finish_reason": None})

    def first_chunks(self) -> Iterable[dict[str, Any]]:
        """Return the chunks in front of the text."""
        return ()

    def last_chunks(self, made: Generated) -> Iterable[dict[str, Any]]:
        """Return the chunks behind the text."""
        yield self._chunk({**self.delta(None), "logprobs": None, "finish_reason": made.finish})
        if self.tells_usage:
            yield {**self._head(self.chunk_kind), "choices": [], "usage": self._usage(made)}

    def content(self, text: str) -> dict[str, Any]:
        """Return the text as a whole answer has it."""
        raise NotImplementedError

    def delta(self, text: str | None) -> dict[str, Any]:
        """Return the text as a chunk has it; None for no more text."""
        raise NotImplementedError

    def logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return the log-probabilities of tokens."""
        raise NotImplementedError

    def _logprobs(self, pieces: Iterable[Piece]) -> dict[str, Any] | None:
        return self.logprobs([p.logprob for p in pieces if p.logprob is not None]) if self.with_logprobs else None

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self.tells_usage else {}
        return {**self._head(self.chunk_kind), "choices": [{"index": 0, **choice}], **usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self.created, "model": self.model}

    def _usage(self, made: Generated) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made.tokens,
            "total_tokens": self.prompt_tokens + made.tokens,
        }


class ChatAnswer(Answer):
    """Answer of `/v1/chat/completions`."""

    kind, prefix, chunk_kind = "chat.completion", "chatcmpl", "chat.completion.chunk"

    def content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str | None) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}}

    def first_chunks(self) -> Iterable[dict[str, Any]]:
        delta = {"delta": {"role": "assistant", "content": ""}}
        yield self._chunk({**delta, "logprobs": None, "finish_reason": None})

    def logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {
            "content": [
                {**self._token(one.token, one.logprob), "top_logprobs": [self._token(*pair) for pair in one.top]}
                for one in found
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.decode(token)
        whole = "\ufffd" not in text  # else it is a part of a character
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


class CompletionAnswer(Answer):
    """Answer of `/v1/completions`."""

    kind, prefix, chunk_kind = "text_completion", "cmpl", "text_completion"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._offset = 0

    def content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def delta(self, text: str | None) -> dict[str, Any]:
        return {"text": text or ""}

    def logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        tokens = [self.decode(one.token) for one in found]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in found],
            "top_logprobs": [{self.decode(token): logprob for token, logprob in one.top} for one in found],
            "text_offset": offsets,
        }
