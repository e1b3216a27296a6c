"""Streaming data set without a length, read, shuffled and tokenized during training."""

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
    """Endless rows `input_ids` and `labels` of the documents, in rounds shuffled by `seed`.

    The order of files, and in a buffer that of documents, is shuffled. The number of rows read is the only
    position of a training, and a step's batches can be of two rounds; to Trainer the whole training is one epoch. Each
    worker of a DataLoader reads all documents and yields its part of the rows.

    Iterating raises `DataError` for an invalid document, and if a whole round has no row.
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
        return _with_worker_errors(itertools.islice(self._rows(), worker.id, None, worker.num_workers))

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
    """Error of a worker, which torch rebuilds in the main process from a traceback's text: keeps its last line."""

    def __init__(self, text: str) -> None:
        super().__init__(text.rpartition(f"{type(self).__name__}: ")[2].strip())


def _with_worker_errors(rows: Iterator[dict[str, list[int]]]) -> Iterator[dict[str, list[int]]]:
    try:
        yield from rows
    except DataError as error:
        raise _FromWorker(str(error)) from None
