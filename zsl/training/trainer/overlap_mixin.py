"""Mixin for Hugging Face `Trainer` that keeps several micro-batches of a step in flight.

class MyTrainer(OverlapMixin, Trainer): ...

trainer = MyTrainer(overlap=4, model=model, args=TrainingArguments(gradient_accumulation_steps=8, ...), ...)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zsl.client.gradient_sum import StepSums, micro_batch
from zsl.client.overlap import run_overlapped
from zsl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class OverlapMixin(_Base):
    """Mixin before `Trainer`: runs `overlap` of a step's `gradient_accumulation_steps` micro-batches concurrently.

    The gradients of adapters on the trunk's layers are summed up at the daemon, and cross once a step. All gradients
    are the same as without it. Raises `ConfigError` if `overlap` exceeds the number of micro-batches.
    """

    def __init__(self, *arguments: Any, overlap: int = 1, **options: Any) -> None:
        super().__init__(*arguments, **options)
        steps = self.args.gradient_accumulation_steps
        if overlap > steps:
            raise ConfigError(
                f"overlap = {overlap}, but a step has gradient_accumulation_steps = {steps} micro-batches; "
                "raise that and lower per_device_train_batch_size"
            )
        self.overlap = overlap
        self._samples: list[Any] = []
        self._micro_losses: deque[torch.Tensor] = deque()
        self._sums, self._begun = StepSums(), 0  # of this step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        self._samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._micro_losses.clear()
        self._sums, self._begun = StepSums(), 0
        return self._samples, num_items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        step = super().training_step
        if self.overlap == 1 and len(self._samples) <= 1:
            return step(model, inputs, num_items_in_batch)
        if self.overlap == 1:
            self._begun += 1
            is_last = self._begun >= len(self._samples)
            with micro_batch(self._sums, is_last=is_last):
                loss: torch.Tensor = step(model, inputs, num_items_in_batch)
            if is_last:
                self._sums.close()
            return loss
        if not self._micro_losses:
            # The first call of a step runs all its micro-batches; the later calls return their losses.
            self._micro_losses.extend(
                run_overlapped(
                    [partial(step, model, sample, num_items_in_batch) for sample in self._samples],
                    in_flight=self.overlap,
                )
            )
        return self._micro_losses.popleft()
