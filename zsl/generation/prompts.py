"""Turn prompts and conversations into tokens, and check that they fit the model's context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from zsl.errors import DataError, ModelError
from zsl.text.first_line import first_line
from zsl.text.plural import counted

Message = dict[str, str]  # `role` and `content`


class ContextError(DataError):
    """A prompt and its answer do not fit the model's context."""


def tokens_of_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text, with those that the tokenizer begins one with. Raises `DataError` for none."""
    tokens: list[int] = tokenizer(text)["input_ids"]
    if not tokens:
        raise DataError("the prompt is empty")
    return tokens


def tokens_of_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Return the tokens of a conversation up to the next answer, by the model's chat template.

    Raises `ModelError` for a model without one, `DataError` for messages that it does not accept.
    """
    if not tokenizer.chat_template:
        raise ModelError("the model has no chat template: it completes texts")
    try:
        text: Any = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"the model's chat template does not accept the messages: {first_line(error)}") from error
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


def room_for_answer(prompt_tokens: int, context_tokens: int, asked: int | None, *, default: int) -> int:
    """Return the largest number of tokens of an answer: `asked`, or as much of `default` as the context has room for.

    Raises `ContextError`.
    """
    left = context_tokens - prompt_tokens
    if left < (asked or 1):
        answer = "" if asked is None else f" and an answer of up to {asked:,}"
        raise ContextError(
            f"the prompt has {counted(prompt_tokens, 'token')}{answer}, and the model takes {context_tokens:,} together"
        )
    return min(default, left) if asked is None else asked
