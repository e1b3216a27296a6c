"""Token sequences to rows of a data set: packed or cut off, held in memory, padded a batch at a time. No tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

NO_LABEL = -100  # what transformers' losses leave out
ROWS_A_CHUNK = 1000


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Tokens, and for each its label: the token itself where it is learnt, else `NO_LABEL`."""

    input_ids: list[int]
    labels: list[int]

    @classmethod
    def of_text(cls, input_ids: list[int]) -> TokenRow:
        """A row of which every token is learnt."""
        return cls(input_ids, input_ids)

    @property
    def has_target(self) -> bool:
        """Whether there is anything to predict. The first token is predicted from nothing, so it does not count."""
        return any(label != NO_LABEL for label in self.labels[1:])

    def up_to(self, length: int) -> TokenRow:
        if len(self.input_ids) <= length:
            return self
        return TokenRow(self.input_ids[:length], self.labels[:length])


def pack(sequences: Iterable[TokenRow], length: int) -> Iterator[TokenRow]:
    """The sequences one after another, cut into rows of `length` tokens; what fills no row at the end is left out."""
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
    """The first `limit` rows as a data set in memory: columns `input_ids` and `labels`, which it gives as tensors."""
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
    """These rows, as a data set of their own in memory."""
    return Dataset(dataset.data.table.take(pa.array(indices, pa.int64()))).with_format("torch")


def count_tokens(dataset: Dataset) -> tuple[int, int]:
    """Of all rows: the tokens, and those of them that are learnt."""
    labels = [chunk.flatten().to_numpy() for chunk in dataset.data.column("labels").chunks]
    return sum(chunk.size for chunk in labels), sum(int((chunk != NO_LABEL).sum()) for chunk in labels)


@dataclass(frozen=True)
class PadRight:
    """Collates rows of any lengths: padding behind them, masked, with labels that no loss counts."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`, each int64 `[rows, tokens of the longest]`."""
        input_ids = [torch.as_tensor(row["input_ids"]) for row in rows]
        labels = [torch.as_tensor(row["labels"]) for row in rows]
        masks = [torch.ones_like(ids) for ids in input_ids]
        return {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence(masks, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=NO_LABEL),
        }
