"""Documents to rows of tokens: with the tokenizer or its chat template, packed or one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from zsl.errors import DataError
from zsl.training.data.chat import conversation_encoder, problem_with
from zsl.training.data.columns import Column
from zsl.training.data.reading import read_batches
from zsl.training.data.rows import TokenRow, pack
from zsl.training.data.sources import Documents
from zsl.training.report import counted

DOCUMENTS_AT_ONCE = 100
SHOWN_CHARACTERS = 60  # of a row that has no number

# Values of a column, with the numbers of their rows.
Batches = Iterator[list[tuple[int | None, Any]]]


@dataclass
class Tally:
    """What became of the documents that gave no row, or not the whole of one."""

    tokens: int = 0
    empty: int = 0
    without_target: int = 0
    cut_off: int = 0

    def lines(self, kind: str, length: int) -> list[str]:
        """For whoever trains."""
        what, target = ("text", "") if kind == "text" else ("conversation", " of an answer")
        told = [
            (self.empty, f"empty {what}", "left out"),
            (self.without_target, "row", f"left out, with nothing{target} to learn within {length} tokens"),
            (self.cut_off, what, f"cut off at {length} tokens"),
        ]
        return [f"{counted(count, noun)} {fate}" for count, noun, fate in told if count]


class Encoder:
    """Makes rows of at most `length` tokens of the documents in a column.

    Raises `DataError` for a document that is not what the column should hold, with the number of its row, or how it
    begins where rows are shuffled.
    """

    def __init__(
        self, column: Column, tokenizer: PreTrainedTokenizerBase, model: str, *, length: int, packing: bool | None
    ) -> None:
        tokenizer.model_max_length = 1 << 30  # rows are cut here
        self.column = column
        self.length = length
        self.packing = column.kind == "text" if packing is None else packing
        self.pad_token_id = int(tokenizer.pad_token_id or 0)
        self._tokenizer = tokenizer
        self._conversation = conversation_encoder(tokenizer, model) if column.kind == "messages" else None

    def rows(self, documents: Documents, tally: Tally, *, shuffled: bool = False) -> Iterator[TokenRow]:
        """The rows of `documents`, `shuffled` or as they lie there; `tally` counts while they are taken."""
        values = self._batches(documents, tally, numbered=not shuffled)
        make = self._texts if self._conversation is None else self._conversations
        sequences = make(documents, values, tally)
        for row in pack(sequences, self.length) if self.packing else self._cut_off(sequences, tally):
            if row.has_target:
                yield row
            else:
                tally.without_target += 1

    def token(self, number: int) -> str:
        """The token of a number, as the tokenizer writes it."""
        return str(self._tokenizer.convert_ids_to_tokens(number))

    def _cut_off(self, sequences: Iterator[TokenRow], tally: Tally) -> Iterator[TokenRow]:
        for sequence in sequences:
            tally.cut_off += len(sequence.input_ids) > self.length
            yield sequence.up_to(self.length)

    def _texts(self, documents: Documents, batches: Batches, tally: Tally) -> Iterator[TokenRow]:
        """A sequence for each text. One end-of-text token stands between packed ones, and one behind each other one."""
        end = self._tokenizer.eos_token_id
        ended = True
        for values in batches:
            texts = []
            for number, text in values:
                if not isinstance(text, str):
                    raise DataError(f"{self._where(documents, number, text)}: {type(text).__name__}, not text")
                if text.strip():
                    texts.append(text)
                else:
                    tally.empty += 1
            for input_ids in self._tokenizer(texts)["input_ids"] if texts else []:
                if end is not None and self.packing and not ended and input_ids[:1] != [end]:
                    input_ids = [end, *input_ids]
                elif end is not None and not self.packing and input_ids[-1:] != [end]:
                    input_ids = [*input_ids, end]
                ended = input_ids[-1:] == [end]
                tally.tokens += len(input_ids)
                yield TokenRow.of_text(input_ids)

    def _conversations(self, documents: Documents, batches: Batches, tally: Tally) -> Iterator[TokenRow]:
        assert self._conversation is not None
        for values in batches:
            for number, messages in values:
                if problem := problem_with(messages):
                    raise DataError(f"{self._where(documents, number, messages)}: {problem}")
                if not messages:
                    tally.empty += 1
                    continue
                try:
                    sequence = self._conversation(messages)
                except DataError as error:
                    raise DataError(f"{self._where(documents, number, messages)}: {error}") from error
                tally.tokens += len(sequence.input_ids)
                yield sequence

    def _batches(self, documents: Documents, tally: Tally, *, numbered: bool) -> Batches:
        """The column's values, with the numbers of their rows from 1; missing ones are counted and left out."""
        number = 0
        name = self.column.name
        batches = documents.rows.select_columns([name]).iter(DOCUMENTS_AT_ONCE)
        for batch in read_batches(batches, documents.described, reader=documents.reader, files=documents.files):
            values = batch[name]
            there = [(at if numbered else None, v) for at, v in enumerate(values, number + 1) if v is not None]
            number += len(values)
            tally.empty += len(values) - len(there)
            yield there

    def _where(self, documents: Documents, number: int | None, value: Any) -> str:
        beginning = repr(value)[:SHOWN_CHARACTERS]
        row = f"row {number}" if number is not None else f"the row that begins {beginning}"
        return f"{documents.described}, column {self.column.name!r}, {row}"
