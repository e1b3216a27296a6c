"""Generate a sample text before, during and after a training, and report it as losses are."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from zsl.generation.generate import generate
from zsl.generation.prompts import room_for_answer, tokens_of_text
from zsl.text.printable import printable
from zsl.training.report.metrics import RunMetrics
from zsl.training.report.screen import sample_line

SAMPLE_TOKENS = 64


class SampleCallback(TrainerCallback):
    """Continues `prompt`, greedily, before the first step, at each validation, and at the end.

    Draws no random number, so that the training is the same with it. Raises `DataError` for a prompt that is empty or
    longer than `context_tokens`.
    """

    def __init__(
        self, prompt: str, tokenizer: PreTrainedTokenizerBase, metrics: RunMetrics, *, context_tokens: int
    ) -> None:
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._tokens = tokens_of_text(tokenizer, prompt)
        self._limit = room_for_answer(len(self._tokens), context_tokens, None, default=SAMPLE_TOKENS)
        self._last: tuple[int, str] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.global_step:
            self._sample(state, kwargs["model"])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._sample(state, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._sample(state, kwargs["model"])

    def _sample(self, state: TrainerState, model: Any) -> None:
        """Report the text, unless it is that of the last report, of the same step."""
        trains = model.training
        model.eval()
        try:
            made = generate(model, self._tokenizer, self._tokens, max_tokens=self._limit)
        finally:
            model.train(trains)
        sampled = state.global_step, made.text
        if sampled != self._last:  # the best model, loaded at the end, has another text
            self._last = sampled
            self._metrics.add_sample(state.global_step, float(state.epoch or 0), made.text)
            tqdm.write(sample_line(state.global_step, state.max_steps, printable(self._prompt), printable(made.text)))
