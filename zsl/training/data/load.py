"""Load the training and validation rows that `[data]` describes, as tokens with labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import xxhash
from datasets import Dataset

from zsl.errors import ConfigError, DataError
from zsl.models.reference import ModelReference
from zsl.text.plural import counted
from zsl.training.config.data_table import SYNTHETIC, DataTable
from zsl.training.data.columns import Column, column_of
from zsl.training.data.encoding import Encoder, Tally
from zsl.training.data.rows import PadRight, TokenRow, count_tokens, hold, take
from zsl.training.data.sources import Documents, open_documents, validation_documents
from zsl.training.data.stream import SHUFFLE_ROWS, TokenStream
from zsl.training.data.synthetic import SYNTHETIC_SAMPLES, synthetic_language

ROWS_COUNTED = 100  # of a stream, before training


@dataclass(frozen=True)
class TrainingData:
    """Data sets for Trainer: rows with `input_ids` and `labels`, as int64 tensors or, in a stream, as lists.

    `collate` pads rows to a batch, and is None if all rows have the same length. `lines` describe the data to the user.
    `fingerprint` identifies a stream, whose rows cannot all be hashed; it is None for other data.
    """

    train: Dataset | TokenStream
    validation: Dataset | None
    collate: PadRight | None
    lines: list[str]
    fingerprint: str | None = None


def load_data(table: DataTable, reference: ModelReference, *, virtual_tokens: int = 0) -> TrainingData:
    """Load the data that `table` describes, tokenized for the model.

    Packed rows have `max_length` tokens, others at most that; `virtual_tokens` more precede each row. `lines` count
    rows left out or truncated, in a stream among the first rows. Raises `ConfigError` for an unknown name, conflicting
    keys, or rows longer than the model accepts; `DataError` for missing or unreadable data, or data without a row;
    `ModelError` if the model has no tokenizer.
    """
    config = reference.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and table.max_length + virtual_tokens > positions:
        in_front = f", {virtual_tokens} of which are virtual tokens of [peft]" if virtual_tokens else ""
        raise ConfigError(
            f"data.max_length = {table.max_length}: {reference.text} takes at most {positions} tokens a row{in_front}"
        )
    vocabulary = int(config.vocab_size)
    if table.name == SYNTHETIC:
        return _synthetic(table, vocabulary)
    if reference.location is None:
        reference.tokenizer()  # raises that the model has none, before data is read
    documents = open_documents(table)
    encoder = _encoder(documents, table, reference)
    validation, about_validation = None, []
    encoders = [encoder]
    if isinstance(table.validation, str):
        others = validation_documents(table, table.validation, documents)
        encoders.append(_encoder(others, table, reference))
        validation, (first, *more) = _in_memory(
            others, encoders[-1], vocabulary, table.validation_samples, "validation_samples"
        )
        unused = [] if encoders[-1].column == encoder.column else encoders[-1].column.lines()
        about_validation = [f"validation: {first}", *more, *unused]
    collate = None if all(encoder.packing for encoder in encoders) else PadRight(encoder.pad_token_id)
    if table.streams:
        stream, fingerprint, lines = _stream(documents, encoder, vocabulary, table)
        return TrainingData(
            stream, validation, collate, [*lines, *encoder.column.lines(), *about_validation], fingerprint
        )
    both = table.samples and table.samples + _validation_count(table, table.samples)
    train, lines = _in_memory(documents, encoder, vocabulary, both, "samples")
    if isinstance(table.validation, float):
        held = len(train)
        train, validation = _split_validation(train, table, documents.described)
        lines[0] = f"{documents.described}, {_size(train, encoder)}"
        about_validation = [f"validation: {_size(validation, encoder)} of the same data, not trained on"]
        if left_out := held - len(train) - len(validation):
            about_validation.append(f"{counted(left_out, 'row')} of that share left out by data.validation_samples")
    return TrainingData(train, validation, collate, [*lines, *encoder.column.lines(), *about_validation])


def _synthetic(table: DataTable, vocabulary: int) -> TrainingData:
    write = synthetic_language(table.max_length, vocabulary, table.seed)
    samples = table.samples or SYNTHETIC_SAMPLES
    train = hold(map(TokenRow.of_text, write(samples)))
    lines = [f"{SYNTHETIC}, {counted(len(train), 'row')} of {table.max_length} tokens"]
    if table.samples is None:
        lines.append(f"{SYNTHETIC_SAMPLES} rows, as data.samples says no other number")
    validation = None
    if count := _validation_count(table, samples):
        validation = hold(map(TokenRow.of_text, write(count)), table.validation_samples)
        lines.append(f"validation: {counted(len(validation), 'other row')} of the same language")
    return TrainingData(train, validation, None, lines)


def _encoder(documents: Documents, table: DataTable, reference: ModelReference) -> Encoder:
    what = documents.described
    column = Column("text", "text") if documents.is_text else column_of(documents, table)
    if documents.is_text and table.packing is False and len(documents.rows) == 1:
        raise ConfigError(f"data.packing = false makes a row of each document, and {what} is one document")
    return Encoder(column, reference.tokenizer(), reference.text, length=table.max_length, packing=table.packing)


def _rows(
    encoder: Encoder, vocabulary: int, documents: Documents, tally: Tally, *, shuffled: bool = False
) -> Iterator[TokenRow]:
    """Yield the rows of `documents`. Raises `DataError` for a token id that is not below `vocabulary`."""
    for number, row in enumerate(encoder.rows(documents, tally, shuffled=shuffled), 1):
        # Check padding too, as it is embedded. Labels are tokens of the row, so they need no check.
        used = row.input_ids if encoder.packing else [*row.input_ids, encoder.pad_token_id]
        if (token := max(used)) >= vocabulary:
            where = "a row" if shuffled else f"row {number}"
            raise DataError(
                f"{documents.described}, {where} of tokens: the tokenizer's {encoder.token(token)!r} has the number "
                f"{token}, and the model has {vocabulary:,} tokens; take the tokenizer that belongs to the model, or "
                "give it the tokens (resize_token_embeddings) and save it"
            )
        yield row


def _in_memory(
    documents: Documents, encoder: Encoder, vocabulary: int, limit: int | None, key: str
) -> tuple[Dataset, list[str]]:
    """Load at most `limit` rows (the value of `key`) into memory; return them and lines that describe them.

    Raises `DataError` if there are none.
    """
    tally = Tally()
    what = documents.described
    rows = _rows(encoder, vocabulary, documents, tally)
    dataset = hold(rows, limit)
    about = tally.lines(encoder.column.kind, encoder.length)
    if limit is not None and len(dataset) == limit and _has_more(rows, documents):
        about.append(f"there are more rows, left out by data.{key}")
    if not len(dataset):
        raise DataError(_no_row(what, encoder, tally))
    return dataset, [f"{what}, {_size(dataset, encoder)}", *about]


def _has_more(rows: Iterator[TokenRow], documents: Documents) -> bool:
    """Tell whether another row follows; False for a stream of the hub, where looking could download files."""
    if not documents.files and not isinstance(documents.rows, Dataset):
        return False
    try:
        return next(rows, None) is not None
    except DataError:
        return True  # an invalid row is a row, and is not used


def _stream(
    documents: Documents, encoder: Encoder, vocabulary: int, table: DataTable
) -> tuple[TokenStream, str, list[str]]:
    """Return the stream, its fingerprint and lines that describe it. Raises `DataError` if it has no row."""
    tally = Tally()
    what = documents.described
    firsts = list(islice(_rows(encoder, vocabulary, documents, tally), ROWS_COUNTED))
    if not firsts:
        raise DataError(_no_row(what, encoder, tally))
    known = f"{documents.identity()} {firsts[0].input_ids} {firsts[0].labels}"
    stream = TokenStream(documents, partial(_rows, encoder, vocabulary, tally=Tally(), shuffled=True), seed=table.seed)
    length = f"{encoder.length} tokens" if encoder.packing else f"up to {encoder.length} tokens"
    line = f"{what}, read while it is trained on, rows of {length}, shuffled among {SHUFFLE_ROWS:,} documents"
    tally.tail = 0  # in training, the next round fills up that row
    counts = [
        f"in the first {counted(len(firsts), 'row')}: {about}"
        for about in tally.lines(encoder.column.kind, encoder.length)
    ]
    return stream, xxhash.xxh3_128(known.encode()).hexdigest(), [line, *counts]


def _no_row(what: str, encoder: Encoder, tally: Tally) -> str:
    if encoder.packing and tally.tokens and not tally.without_target:
        fill = "does not fill" if tally.tokens == 1 else "do not fill"
        return (
            f"{what}: {counted(tally.tokens, 'token')} {fill} one row of {encoder.length}; lower data.max_length, "
            "or give each text a row of its own with data.packing = false"
        )
    reasons = tally.lines(encoder.column.kind, encoder.length)
    return f"{what} gives no row to learn from: {', '.join(reasons)}" if reasons else f"{what} has no rows"


def _size(dataset: Dataset, encoder: Encoder) -> str:
    tokens, learnt = count_tokens(dataset)
    places = {"messages": "answers", "completion": "completions"}
    place = places.get(encoder.column.kind)
    learnt_of = f", {learnt:,} of them in {place}" if place else ""
    length = f"{encoder.length}" if encoder.packing else f"up to {encoder.length}"
    return f"{counted(len(dataset), 'row')} of {length} tokens ({tokens:,} tokens{learnt_of})"


def _validation_count(table: DataTable, samples: int) -> int:
    """Return the number of validation rows, beside `samples`, that makes validation the requested fraction."""
    share = table.validation
    return max(1, round(samples * share / (1 - share))) if isinstance(share, float) else 0


def _split_validation(rows: Dataset, table: DataTable, what: str) -> tuple[Dataset, Dataset]:
    """Split `rows` into training and validation rows, drawn with `seed`, each in `rows`' order."""
    assert isinstance(table.validation, float)
    count = max(1, round(len(rows) * table.validation))
    if count == len(rows):
        raise DataError(
            f"{what}: data.validation = {table.validation} leaves none of {counted(count, 'row')} to train on"
        )
    drawn = np.random.default_rng(table.seed).permutation(len(rows))
    return take(rows, sorted(drawn[count:])), take(rows, sorted(drawn[:count][: table.validation_samples]))
