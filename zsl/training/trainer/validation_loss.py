"""Mixin for Hugging Face `Trainer` that computes the validation loss as the mean over all tokens.

Trainer averages the batches' mean losses, weighted by rows: short rows weigh as much as long ones, and the result
depends on which rows share a batch. Perplexity needs the mean over tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import PeftType
from torch import nn

from zsl.training.data.rows import NO_LABEL

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class TokenLossMixin(_Base):
    """Mixin before `Trainer`: the validation loss is the mean over the predicted tokens of all batches.

    It is the cross-entropy without label smoothing.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._loss_sum = self._tokens = 0.0

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self._loss_sum = self._tokens = 0.0
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._tokens and output.metrics is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = self._loss_sum / self._tokens
        return output

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        labels: torch.Tensor | None = inputs.get("labels")
        smoother, self.label_smoother = self.label_smoother, None
        try:
            loss, logits, predicted = super().prediction_step(model, inputs, *arguments, **options)
        finally:
            self.label_smoother = smoother
        if loss is not None and labels is not None:
            learnt = labels != NO_LABEL  # [rows, tokens]
            behind_the_first = float(learnt[:, 1:].sum())
            tokens = float(learnt.sum()) if self._predicts_the_first_token() else behind_the_first
            if tokens:  # the mean over no tokens is NaN
                # Multiply by the divisor of that mean: Trainer's count, without each row's first token, or the model's.
                self._loss_sum += float(loss) * (behind_the_first if self.model_accepts_loss_kwargs else tokens)
                self._tokens += tokens
        return loss, logits, predicted

    def _predicts_the_first_token(self) -> bool:
        """Return whether virtual tokens before the row predict it; those of prefix tuning are keys and values only."""
        config: Any = getattr(self.model, "active_peft_config", None)
        return config is not None and config.is_prompt_learning and config.peft_type != PeftType.PREFIX_TUNING
