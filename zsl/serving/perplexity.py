"""Measure the loss and the perplexity of a model on a data set, as the validation of `zsl-train` does."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator

from zsl.errors import ConfigError
from zsl.training.data.load import TrainingData
from zsl.training.trainer.trainer import perplexity
from zsl.training.trainer.validation_loss import TokenLossMixin


@dataclass(frozen=True, slots=True)
class Measured:
    """Mean loss per predicted token, in nats, and its exponential."""

    loss: float
    perplexity: float
    rows: int
    tokens: int


class _Evaluation(TokenLossMixin, Trainer):
    """`Trainer` that only evaluates."""

    @property
    def predicted_tokens(self) -> int:
        return int(self._tokens)


def rows_to_measure(data: TrainingData) -> Dataset:
    """Return the validation rows, or without any the whole data. Raises `ConfigError` for a stream."""
    rows = data.train if data.validation is None else data.validation
    if not isinstance(rows, Dataset):
        raise ConfigError("a stream has no end: set data.samples")
    return rows


def measure(model: Any, data: TrainingData, *, batch_size: int) -> Measured:
    """Measure the model on the rows of the data."""
    rows = rows_to_measure(data)
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory,
            per_device_eval_batch_size=batch_size,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        evaluation = _Evaluation(model=model, args=arguments, data_collator=data.collate or default_data_collator)
        evaluation.remove_callback(PrinterCallback)  # it would write to standard output
        loss = float(evaluation.evaluate(rows)["eval_loss"])
    return Measured(loss, perplexity(loss), len(rows), evaluation.predicted_tokens)
