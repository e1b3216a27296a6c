"""A data set that is read and made into tokens while it is trained on, and has no length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from zsl.training.data.rows import TokenRow
from zsl.training.data.sources import Documents

SHUFFLE_ROWS = 1000


class TokenStream(torch.utils.data.IterableDataset[dict[str, list[int]]]):
    """Rows `input_ids` and `labels` of the documents, in an order that `seed` and the epoch give.

    Only so many documents are shuffled at a time, and the files of a data set that has many.
    """

    def __init__(self, documents: Documents, encode: Callable[[Documents], Iterator[TokenRow]], *, seed: int) -> None:
        super().__init__()
        self._documents = documents
        self._encode = encode
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Trainer's word for the next round: its order is another."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        rows: Any = self._documents.rows
        order = np.random.default_rng([self._seed, self._epoch])
        shuffled = replace(self._documents, rows=rows.shuffle(generator=order, buffer_size=SHUFFLE_ROWS))
        for row in self._encode(shuffled):
            yield {"input_ids": row.input_ids, "labels": row.labels}
