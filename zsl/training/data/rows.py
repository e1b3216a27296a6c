"""Pack or truncate token sequences to rows, hold them in memory, and pad them to batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

NO_LABEL = -100  # ignored by transformers' losses
ROWS_A_CHUNK = 1000


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Tokens of a row, and their labels: the token itself if it is learnt, else `NO_LABEL`."""

    input_ids: list[int]
    labels: list[int]

    @classmethod
    def of_text(cls, input_ids: list[int]) -> TokenRow:
        """Make a row with a label on every token."""
        return cls(input_ids, input_ids)

    @property
    def has_target(self) -> bool:
        """True if a token after the first is learnt; the first has no context to be predicted from."""
        return any(label != NO_LABEL for label in self.labels[1:])

    def up_to(self, length: int) -> TokenRow:
        if len(self.input_ids) <= length:
            return self
        return TokenRow(self.input_ids[:length], self.labels[:length])


def pack(sequences: Iterable[TokenRow], length: int) -> Iterator[TokenRow]:
    """Concatenate sequences and cut them into rows of `length` tokens; an incomplete last row is dropped."""
    input_ids: list[int] = []
    labels: list[int] = []
    for sequence in sequences:
        input_ids += sequence.input_ids
        labels += sequence.labels
        whole = len(input_ids) - len(input_ids) % length
        for start in range(0, whole, length):
            yield TokenRow(input_ids[start : start + length], labels[start : start + length])
        del input_ids[:whole], labels[:whole]


def hold(rows: Iterable[TokenRow], limit: int | None = None) -> Dataset:
    """Make a data set in memory of the first `limit` rows, with int64 tensors `input_ids` and `labels`."""
    of_rows = iter(islice(rows, limit))
    schema = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})
    batches = []
    while chunk := list(islice(of_rows, ROWS_A_CHUNK)):
        input_ids = pa.array([row.input_ids for row in chunk], schema.field("input_ids").type)
        same = all(row.labels is row.input_ids for row in chunk)
        labels = input_ids if same else pa.array([row.labels for row in chunk], schema.field("labels").type)
        batches.append(pa.record_batch([input_ids, labels], schema=schema))
    return Dataset(pa.Table.from_batches(batches, schema=schema)).with_format("torch")


def take(dataset: Dataset, indices: Sequence[int]) -> Dataset:
    """Copy the rows at `indices` to a new data set in memory."""
    return Dataset(dataset.data.table.take(pa.array(indices, pa.int64()))).with_format("torch")


def count_tokens(dataset: Dataset) -> tuple[int, int]:
    """Return the number of tokens and of learnt tokens in all rows."""
    labels = [chunk.flatten().to_numpy() for chunk in dataset.data.column("labels").chunks]
    return sum(chunk.size for chunk in labels), sum(int((chunk != NO_LABEL).sum()) for chunk in labels)


@dataclass(frozen=True)
class PadRight:
    """Collator that pads rows at the right, with attention mask 0 and label `NO_LABEL`."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`, each int64 `[rows, tokens of the longest]`."""
        input_ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        labels = [torch.as_tensor(row["labels"]) for row in rows]
        masks = [torch.ones_like(ids) for ids in input_ids]
        return {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence(masks, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=NO_LABEL),
        }
