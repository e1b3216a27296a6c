"""Encode documents as rows of tokens, with the tokenizer or its chat template, packed or one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from zsl.errors import DataError
from zsl.text.plural import counted
from zsl.training.data.answer_tokens import conversation_encoder, shared_length
from zsl.training.data.columns import Column, without_filled
from zsl.training.data.conversations import conversation_of
from zsl.training.data.dataset_errors import read_batches
from zsl.training.data.rows import NO_LABEL, TokenRow, pack
from zsl.training.data.sources import Documents

DOCUMENTS_AT_ONCE = 100
SHOWN_CHARACTERS = 60  # of a row without a number, in errors

NOUNS = {"text": "text", "messages": "conversation", "completion": "completion"}

# Batches of rows with their numbers, with the values of the columns that are read.
Batches = Iterator[list[tuple[int | None, dict[str, Any]]]]


@dataclass
class Tally:
    """Counts of documents that were left out, truncated or changed, by reason."""

    tokens: int = 0
    empty: int = 0
    without_target: int = 0
    cut_off: int = 0
    tail: int = 0  # tokens after the last packed row
    twice: int = 0
    merged: int = 0
    endless: int = 0
    weighted: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # by the chat template

    def lines(self, kind: str, length: int) -> list[str]:
        """Return a line for each count that is not zero, for the user."""
        what = NOUNS[kind]
        target = "" if kind == "text" else f" of {'a completion' if kind == 'completion' else 'an answer'}"
        told = [
            (self.empty, f"empty {what}", "left out"),
            (self.without_target, "row", f"left out, with nothing{target} to learn within {length} tokens"),
            (self.cut_off, what, f"cut off at {length} tokens"),
            (self.tail, "token", "left out, which fill no row at the end"),
            (self.endless, what, f"with no {'end-of-text token' if kind == 'text' else 'special token'} to end by"),
            (self.twice, what, "with special tokens at an end that the tokenizer adds, written once"),
            (self.merged, what, "with a first token that begins in the prompt"),
            (self.weighted, "answer", "with a weight of another value than 1, which is not used"),
            (self.left_out["message"], "message", "that the model's chat template leaves out or rewrites"),
            (self.left_out["tools"], what, "with tools that the model's chat template leaves out"),
            (self.left_out["opening"], what, "begun by the assistant, whose first message is not learnt"),
        ]
        return [f"{counted(count, noun)} {fate}" for count, noun, fate in told if count]


class Encoder:
    """Encodes the documents in a column as rows of at most `length` tokens.

    Raises `DataError` for an invalid document, with the number of its row, or its beginning if rows are shuffled.
    """

    def __init__(
        self, column: Column, tokenizer: PreTrainedTokenizerBase, model: str, *, length: int, packing: bool | None
    ) -> None:
        tokenizer.model_max_length = 1 << 30  # rows are truncated here
        self.column = column
        self.length = length
        self.packing = column.kind == "text" if packing is None else packing
        self.pad_token_id = int(tokenizer.pad_token_id or 0)
        self._tokenizer = tokenizer
        self._model = model
        self._end = tokenizer.eos_token_id
        added = list(tokenizer("")["input_ids"])  # special tokens added to every text
        self._begin = tokenizer.bos_token_id
        self._begins = added[:1] == [self._begin]
        self._ends = added[int(self._begins) :][-1:] == [self._end]
        # Completions may be plain texts, and need a chat template only if they are not.
        self._chat = conversation_encoder(tokenizer, model) if column.kind == "messages" else None

    def rows(self, documents: Documents, tally: Tally, *, shuffled: bool = False) -> Iterator[TokenRow]:
        """Yield the rows of `documents`, and count in `tally`. `shuffled` documents have no row numbers."""
        batches = self._batches(documents, tally, numbered=not shuffled)
        make = self._texts if self.column.kind == "text" else self._answers
        sequences = make(documents, batches, tally)
        rows = 0
        for row in pack(sequences, self.length) if self.packing else self._cut_off(sequences, tally):
            rows += 1
            if row.has_target:
                yield row
            else:
                tally.without_target += 1
        tally.tail = tally.tokens - rows * self.length if self.packing else 0

    def token(self, number: int) -> str:
        """Return the text of a token id."""
        return str(self._tokenizer.convert_ids_to_tokens(number))

    def _cut_off(self, sequences: Iterator[TokenRow], tally: Tally) -> Iterator[TokenRow]:
        for sequence in sequences:
            tally.cut_off += len(sequence.input_ids) > self.length
            yield sequence.up_to(self.length)

    def _texts(self, documents: Documents, batches: Batches, tally: Tally) -> Iterator[TokenRow]:
        """Yield a sequence for each text, with one end-of-text token between packed ones, else one after each."""
        end = self._end
        ended = True
        for rows in batches:
            texts = []
            for number, row in rows:
                text = row[self.column.name]
                if not isinstance(text, str):
                    raise DataError(f"{self._where(documents, number, text)}: {type(text).__name__}, not text")
                if text.strip():
                    texts.append(text)
                else:
                    tally.empty += 1
            for input_ids in self._tokenized(texts, tally) if texts else []:
                if end is None:
                    tally.endless += not (self.packing and ended)
                elif self.packing and not ended and input_ids[:1] != [end]:
                    input_ids = [end, *input_ids]
                elif not self.packing and input_ids[-1:] != [end]:
                    input_ids = [*input_ids, end]
                ended = input_ids[-1:] == [end]
                tally.tokens += len(input_ids)
                yield TokenRow.of_text(input_ids)

    def _tokenized(self, texts: list[str], tally: Tally) -> Iterator[list[int]]:
        for input_ids in self._tokenizer(texts)["input_ids"]:
            tokens = list(input_ids)
            if self._begins and tokens[:2] == [self._begin] * 2:
                del tokens[0]
            if self._ends and tokens[-2:] == [self._end] * 2:
                del tokens[-1]
            tally.twice += len(tokens) < len(input_ids)
            yield tokens

    def _answers(self, documents: Documents, batches: Batches, tally: Tally) -> Iterator[TokenRow]:
        """Yield a sequence for each conversation or completion that is not empty."""
        for rows in batches:
            for number, row in rows:
                try:
                    sequence = self._answer(row, tally)
                except DataError as error:
                    raise DataError(f"{self._where(documents, number, row[self.column.name])}: {error}") from error
                if sequence is None:
                    tally.empty += 1
                else:
                    tally.tokens += len(sequence.input_ids)
                    yield sequence

    def _answer(self, row: dict[str, Any], tally: Tally) -> TokenRow | None:
        answer = row[self.column.name]
        if self.column.kind == "completion":
            kinds = {type(row["prompt"]), type(answer)}
            if kinds == {str}:
                return self._completion(row["prompt"], answer, tally) if answer.strip() else None
            if str in kinds:
                raise DataError("one of prompt and completion is a text, the other a list of messages")
        conversation = conversation_of(row, self.column)
        if len(conversation.messages) == conversation.prompt:
            return None
        if self._chat is None:
            self._chat = conversation_encoder(self._tokenizer, self._model)
        sequence = self._chat(conversation)
        tally.left_out.update(self._chat.left_out(conversation))
        tally.weighted += conversation.weighted_answers
        tally.endless += sequence.has_target and not self._chat.specials.intersection(sequence.labels)
        return sequence

    def _completion(self, prompt: str, completion: str, tally: Tally) -> TokenRow:
        """Join prompt, completion and end-of-text token, with labels on all but the prompt's tokens."""
        before, input_ids = self._tokenized([prompt, prompt + completion], of_both := Tally())
        tally.twice += of_both.twice > 0
        if self._end is None:
            tally.endless += 1
        elif input_ids[-1:] != [self._end]:
            input_ids.append(self._end)
        shared = shared_length(before, input_ids)
        tally.merged += before[shared:] not in ([], [self._end])
        return TokenRow(input_ids, [*[NO_LABEL] * shared, *input_ids[shared:]])

    def _batches(self, documents: Documents, tally: Tally, *, numbered: bool) -> Batches:
        """Yield batches of the columns' values with row numbers from 1; count and leave out missing values."""
        number = 0
        column = self.column
        names = [column.name, *column.beside]
        needed = [column.name, column.prompt] if column.prompt else [column.name]
        features: dict[str, Any] = documents.rows.features or {}
        batches = documents.rows.select_columns(names).iter(DOCUMENTS_AT_ONCE)
        for batch in read_batches(batches, documents.described, reader=documents.reader, files=documents.files):
            rows = [
                {name: without_filled(value, features.get(name)) for name, value in zip(names, values, strict=True)}
                for values in zip(*(batch[name] for name in names), strict=True)
            ]
            there = [
                (at if numbered else None, row)
                for at, row in enumerate(rows, number + 1)
                if all(row[name] is not None for name in needed)
            ]
            number += len(rows)
            tally.empty += len(rows) - len(there)
            yield there

    def _where(self, documents: Documents, number: int | None, value: Any) -> str:
        beginning = repr(value)[:SHOWN_CHARACTERS]
        row = f"row {number}" if number is not None else f"the row that begins {beginning}"
        return f"{documents.described}, column {self.column.name!r}, {row}"
