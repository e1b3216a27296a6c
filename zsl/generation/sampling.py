"""Choose each next token: the most probable one, or one drawn by a generator that belongs to one request."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from zsl.generation.pieces import TokenLogprob

LOWEST = -9999.0  # of log-probabilities
LEAST_TEMPERATURE = 1e-5  # logits divided by less may be infinite


@dataclass(frozen=True, slots=True)
class Sampling:
    """Choice of tokens. Without `temperature` the most probable ones; without `seed` each text is another."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


class Chooser(LogitsProcessor):
    """Logits processor that leaves one token, which greedy decoding then takes.

    transformers' own sampling draws from torch's global generator, whose state all threads share: a seed would give
    another text with every neighbour. `top`: the number of most probable tokens to report, or None for no report. The
    report is of the model's own distribution, before temperature and `top_p`.
    """

    def __init__(self, sampling: Sampling, *, top: int | None = None) -> None:
        self._sampling = sampling
        self._is_greedy = sampling.temperature < LEAST_TEMPERATURE
        self._top = top
        self._generator: torch.Generator | None = None
        self._warpers = LogitsProcessorList()
        if not self._is_greedy and sampling.temperature != 1.0:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if not self._is_greedy and sampling.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        self.last: TokenLogprob | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return `scores` `[1, vocabulary]` with minus infinity everywhere but at the chosen token."""
        if self._is_greedy:
            chosen = scores.argmax(-1, keepdim=True)
        else:
            probabilities = self._warpers(input_ids, scores).softmax(-1)
            chosen = torch.multinomial(probabilities, 1, generator=self._generator_on(scores.device))
        if self._top is not None:
            self.last = self._report(scores[0].log_softmax(-1), int(chosen), self._top)
        only = torch.full_like(scores, -torch.inf)
        only.scatter_(1, chosen, 0.0)
        return only  # type: ignore[return-value]

    def _generator_on(self, device: torch.device) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator(device)
            if self._sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self._sampling.seed)
        return self._generator

    @staticmethod
    def _report(logprobs: torch.Tensor, chosen: int, top: int) -> TokenLogprob:
        logprobs = logprobs.clamp(min=LOWEST)  # JSON has no infinity
        values, tokens = logprobs.topk(min(top, logprobs.numel()))
        best = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
        return TokenLogprob(chosen, float(logprobs[chosen]), best)
