"""Tokenize conversations with the chat template, with labels on the assistant's answers only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from zsl.errors import DataError
from zsl.training.data.chat_template import ChatTemplate, template_errors
from zsl.training.data.conversations import Conversation, Messages
from zsl.training.data.rows import NO_LABEL, TokenRow

Encode = Callable[[ChatTemplate, set[int], Conversation], TokenRow]


@dataclass(frozen=True)
class ConversationEncoder:
    """Tokenizes a conversation, with labels on the answers and their end-of-turn tokens.

    A template that marks the assistant's text (`{% generation %}`) defines the answers. Can be pickled. Raises
    `DataError` for a conversation that the template refuses.
    """

    template: ChatTemplate
    specials: set[int]

    def __call__(self, conversation: Conversation | Messages) -> TokenRow:
        conversation = self._adapted(conversation)
        with template_errors():
            return self._encode(conversation)(self.template, self.specials, conversation)

    def left_out(self, conversation: Conversation | Messages) -> list[str]:
        """Name the parts that are not learnt: `message` and `tools` by the template, `opening` by this encoder."""
        conversation = self._adapted(conversation)
        with template_errors():
            found = list(self.template.left_out(conversation))
            opens = conversation.messages[0]["role"] == "assistant" and not conversation.prompt
            if opens and self._encode(conversation) is not _by_marks:
                found.append("opening")
        return found

    def _adapted(self, given: Conversation | Messages) -> Conversation:
        return self.template.taken(given if isinstance(given, Conversation) else Conversation(given))

    def _encode(self, conversation: Conversation) -> Encode:
        if not self.template.tokenizer.is_fast:
            return _by_prefixes
        return _by_marks if self.template.is_marked(conversation) else _by_characters


def conversation_encoder(tokenizer: PreTrainedTokenizerBase, model: str) -> ConversationEncoder:
    """Make the encoder for a model's tokenizer. Raises `DataError` if it has no chat template."""
    try:
        template = ChatTemplate.of(tokenizer)
    except ValueError:
        raise DataError(
            f"{model} has no chat template, so conversations cannot be written as it reads them; take an instruct "
            "model, put a chat_template.jinja beside its tokenizer, or train on a text with data.text_column"
        ) from None
    specials = set(tokenizer.all_special_ids)
    specials |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ConversationEncoder(template, specials)


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Count the characters or tokens that two sequences share at their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _tokens(template: ChatTemplate, conversation: Conversation) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the tokens, and the character span of each."""
    encoded: Any = template.tokenizer.apply_chat_template(
        conversation.messages,
        return_dict=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
        **conversation.variables,
    )
    return list(encoded["input_ids"]), _spans(encoded["offset_mapping"])


def _by_marks(template: ChatTemplate, specials: set[int], conversation: Conversation) -> TokenRow:
    input_ids, spans = _tokens(template, conversation)
    begin = 0
    if conversation.prompt:
        text, before = template.text(conversation), template.text(conversation, conversation.prompt, ask=True)
        if not text.startswith((before, template.text(conversation, conversation.prompt))):
            raise _not_found(conversation.prompt)
        begin = shared_length(before, text)
    labels = [NO_LABEL] * len(input_ids)
    for start, end in template.marks(conversation):
        for at in _overlapping(spans, max(start, begin), end):
            labels[at] = input_ids[at]
    return TokenRow(input_ids, labels)


def _by_characters(template: ChatTemplate, specials: set[int], conversation: Conversation) -> TokenRow:
    """Label answers by character spans: the text that a message adds after the generation prompt.

    Every token that overlaps the answer is learnt. The first may begin in the prompt, if white space of both is one
    token.
    """
    input_ids, spans = _tokens(template, conversation)
    text = template.text(conversation)
    labels = [NO_LABEL] * len(input_ids)
    for index in _answers(conversation):
        before, until = template.text(conversation, index, ask=True), template.text(conversation, index + 1)
        if not (text.startswith(before) and text.startswith(until)):
            raise _not_found(index)
        if answer := _overlapping(spans, len(before), len(until)):
            start, end = answer[0], answer[-1] + 1
            stop = _end_of_turn(template.tokenizer, specials, input_ids[:end], start)
            labels[start:stop] = input_ids[start:stop]
    return TokenRow(input_ids, labels)


def _overlapping(spans: list[tuple[int, int]], start: int, end: int) -> list[int]:
    """Return the indices of the tokens that overlap these characters."""
    return [at for at, (first, last) in enumerate(spans) if first < end and last > start]


def _spans(offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the character span of each token, with the white space that `offsets` leave out."""
    spans, until = [], 0
    for start, end in offsets:
        spans.append((start, end) if start < end else (min(start, until), max(end, until)))
        until = max(end, until)
    return spans


def _by_prefixes(template: ChatTemplate, specials: set[int], conversation: Conversation) -> TokenRow:
    """Label answers by the tokens of prefixes, for a tokenizer without character offsets."""

    def tokens_of(until: int | None = None, *, ask: bool = False) -> list[int]:
        messages, variables = conversation.messages[:until], conversation.variables
        return list(
            template.tokenizer.apply_chat_template(messages, return_dict=False, add_generation_prompt=ask, **variables)
        )

    input_ids = tokens_of()
    labels = [NO_LABEL] * len(input_ids)
    for index in _answers(conversation):
        before, until = tokens_of(index, ask=True), tokens_of(index + 1)
        if input_ids[: len(before)] != before or input_ids[: len(until)] != until:
            raise _not_found(index)
        stop = _end_of_turn(template.tokenizer, specials, until, len(before))
        labels[len(before) : stop] = input_ids[len(before) : stop]
    return TokenRow(input_ids, labels)


def _answers(conversation: Conversation) -> list[int]:
    """Return the indices of the assistant's messages after the prompt, except the conversation's first message."""
    first = max(conversation.prompt, 1)
    return [at for at, message in enumerate(conversation.messages) if message["role"] == "assistant" and at >= first]


def _not_found(index: int) -> DataError:
    return DataError(
        f"where its message {index + 1}, an answer, begins and ends cannot be found: the model's chat template "
        "writes what comes before it differently when more follows; mark the answers in the template with "
        "{% generation %} and {% endgeneration %}, or keep one answer a conversation"
    )


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, specials: set[int], tokens: list[int], start: int) -> int:
    """Return the end of an answer: after its last special token, if only white space follows."""
    for at in range(len(tokens) - 1, start - 1, -1):
        if tokens[at] in specials:
            return at + 1 if not str(tokenizer.decode(tokens[at + 1 :])).strip() else len(tokens)
    return len(tokens)
