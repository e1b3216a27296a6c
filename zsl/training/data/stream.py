"""A data set that is read and made into tokens while it is trained on, and has no length."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from zsl.errors import DataError
from zsl.training.data.rows import TokenRow
from zsl.training.data.sources import Documents

SHUFFLE_ROWS = 1000


class TokenStream(torch.utils.data.IterableDataset[dict[str, list[int]]]):
    """Rows `input_ids` and `labels` of the documents, round after round without an end, in an order of `seed`.

    Only so many documents are shuffled at a time, and the files of a data set that has many. As it has no end, the
    number of rows taken is all that says where a training stands, and a step's batches can be of two rounds; to Trainer
    the whole training is one epoch. Each worker of a DataLoader reads all documents and gives its share of the rows.

    Iterating raises `DataError` for a document that cannot be used, and if a whole round gives no row.
    """

    def __init__(self, documents: Documents, encode: Callable[[Documents], Iterator[TokenRow]], *, seed: int) -> None:
        super().__init__()
        self._documents = documents
        self._encode = encode
        self._seed = seed

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        worker = torch.utils.data.get_worker_info()
        if worker is None:
            return self._rows()
        return _with_errors_that_travel(itertools.islice(self._rows(), worker.id, None, worker.num_workers))

    def _rows(self) -> Iterator[dict[str, list[int]]]:
        rows: Any = self._documents.rows
        for number in itertools.count():
            order = np.random.default_rng([self._seed, number])
            shuffled = replace(self._documents, rows=rows.shuffle(generator=order, buffer_size=SHUFFLE_ROWS))
            row = None
            for row in self._encode(shuffled):
                yield {"input_ids": row.input_ids, "labels": row.labels}
            if row is None:
                what = self._documents.described
                raise DataError(f"{what} gives no row to learn from any more: it is not what it was at the start")


class _FromWorker(DataError):
    """What torch makes again in the main process, with the worker's traceback for its text: the last line is ours."""

    def __init__(self, text: str) -> None:
        super().__init__(text.rpartition(f"{type(self).__name__}: ")[2].strip())


def _with_errors_that_travel(rows: Iterator[dict[str, list[int]]]) -> Iterator[dict[str, list[int]]]:
    try:
        yield from rows
    except DataError as error:
        raise _FromWorker(str(error)) from None
