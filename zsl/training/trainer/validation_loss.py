"""The validation loss of a token, for Hugging Face `Trainer`.

Trainer takes the mean over the rows of what is the mean over the learnt tokens of each batch: rows of few tokens count
as much as long ones, and the result depends on which rows share a batch. A perplexity is e to the loss of a token.
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
    """Put in front of `Trainer`: a validation's loss is the mean over the tokens that are predicted, of all batches.

    It is the cross-entropy, also where the training's loss is smoothed.
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
            if tokens:  # the mean over none is not a number
                # What the sum was divided by: Trainer's count, which leaves out each row's first token, or the model's.
                self._loss_sum += float(loss) * (behind_the_first if self.model_accepts_loss_kwargs else tokens)
                self._tokens += tokens
        return loss, logits, predicted

    def _predicts_the_first_token(self) -> bool:
        """From virtual tokens in front of the row. Those of prefix tuning are keys and values, and predict nothing."""
        config: Any = getattr(self.model, "active_peft_config", None)
        return config is not None and config.is_prompt_learning and config.peft_type != PeftType.PREFIX_TUNING
