"""Conversations to tokens through the tokenizer's chat template, with labels on the assistant's answers only."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from zsl.errors import DataError
from zsl.split.reference import first_line
from zsl.training.data.rows import NO_LABEL, TokenRow

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

Messages = list[dict[str, Any]]
Encode = Callable[[PreTrainedTokenizerBase, set[int], Messages], TokenRow]


def conversation_encoder(tokenizer: PreTrainedTokenizerBase, model: str) -> Callable[[Messages], TokenRow]:
    """What makes tokens of a conversation, with the answers and the end of each as labels.

    Where the template marks what the assistant says (`{% generation %}`) those are its marks. Raises `DataError` for
    a tokenizer without a template; what is returned raises it for a conversation that the template does not take, and
    can be sent to another process.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise DataError(
            f"{model} has no chat template, so conversations cannot be written as it reads them; take an instruct "
            "model, put a chat_template.jinja beside its tokenizer, or train on a text with data.text_column"
        ) from None
    encode: Encode = _by_prefixes
    if tokenizer.is_fast:
        encode = _by_marks if GENERATION_MARK.search(template) else _by_characters
    specials = set(tokenizer.all_special_ids)
    specials |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}

    return partial(_encoded, encode, tokenizer, specials)


def problem_with(messages: Any) -> str | None:
    """Why this is no conversation, in words."""
    if not isinstance(messages, list):
        return f"{type(messages).__name__}, not a list of messages"
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            return "a message without role and content"
    return None


def _encoded(encode: Encode, tokenizer: PreTrainedTokenizerBase, specials: set[int], messages: Messages) -> TokenRow:
    try:
        return encode(tokenizer, specials, messages)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the model's chat template does not take it: {first_line(error)}") from error


def _by_marks(tokenizer: PreTrainedTokenizerBase, specials: set[int], messages: Messages) -> TokenRow:
    encoded: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    input_ids = list(encoded["input_ids"])
    learnt = zip(input_ids, encoded["assistant_masks"], strict=True)
    return TokenRow(input_ids, [token if mask else NO_LABEL for token, mask in learnt])


def _by_characters(tokenizer: PreTrainedTokenizerBase, specials: set[int], messages: Messages) -> TokenRow:
    """An answer is what its message adds to the text of the conversation before it and the header that asks for it.

    Every token that holds something of it is learnt: the first may begin in the header, where that ends with white
    space and the answer begins with some.
    """

    def text_of(part: Messages, *, ask: bool = False) -> str:
        return str(tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=ask))

    encoded: Any = tokenizer.apply_chat_template(
        messages, return_dict=True, tokenizer_kwargs={"return_offsets_mapping": True}
    )
    input_ids = list(encoded["input_ids"])
    spans = _spans(encoded["offset_mapping"])
    text = text_of(messages)
    labels = [NO_LABEL] * len(input_ids)
    for index in _answers(messages):
        before, until = text_of(messages[:index], ask=True), text_of(messages[: index + 1])
        if not (text.startswith(before) and text.startswith(until)):
            raise _not_found(index)
        held = [at for at, (start, end) in enumerate(spans) if start < len(until) and end > len(before)]
        if held:
            start, end = held[0], held[-1] + 1
            stop = _end_of_turn(tokenizer, specials, input_ids[:end], start)
            labels[start:stop] = input_ids[start:stop]
    return TokenRow(input_ids, labels)


def _spans(offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The characters of each token. Some tokenizers leave spaces out of `offsets`; each then belongs to the next."""
    spans, until = [], 0
    for start, end in offsets:
        spans.append((min(start, until), max(end, until)))
        until = max(end, until)
    return spans


def _by_prefixes(tokenizer: PreTrainedTokenizerBase, specials: set[int], messages: Messages) -> TokenRow:
    """As `_by_characters`, where a tokenizer does not tell the characters of its tokens: by what it makes of parts."""

    def tokens_of(part: Messages, *, ask: bool = False) -> list[int]:
        return list(tokenizer.apply_chat_template(part, return_dict=False, add_generation_prompt=ask))

    input_ids = tokens_of(messages)
    labels = [NO_LABEL] * len(input_ids)
    for index in _answers(messages):
        before = tokens_of(messages[:index], ask=True)
        until = tokens_of(messages[: index + 1])
        if input_ids[: len(before)] != before or input_ids[: len(until)] != until:
            raise _not_found(index)
        stop = _end_of_turn(tokenizer, specials, until, len(before))
        labels[len(before) : stop] = input_ids[len(before) : stop]
    return TokenRow(input_ids, labels)


def _answers(messages: Messages) -> list[int]:
    """Where the assistant speaks. What it says before anybody else is no answer."""
    return [index for index, message in enumerate(messages) if message["role"] == "assistant" and index > 0]


def _not_found(index: int) -> DataError:
    return DataError(
        f"where its message {index + 1}, an answer, begins and ends cannot be found: the model's chat template "
        "writes what comes before it differently when more follows; mark the answers in the template with "
        "{% generation %} and {% endgeneration %}, or keep one answer a conversation"
    )


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, specials: set[int], tokens: list[int], start: int) -> int:
    """Where an answer ends: behind its last special token, if only white space follows that."""
    for at in range(len(tokens) - 1, start - 1, -1):
        if tokens[at] in specials:
            return at + 1 if not str(tokenizer.decode(tokens[at + 1 :])).strip() else len(tokens)
    return len(tokens)
