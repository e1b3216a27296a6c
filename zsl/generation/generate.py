"""Generate one text: tokens of a prompt in, pieces of text out, until an end, a limit or a stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from traceback import clear_frames
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from zsl.errors import CancelledByClientError
from zsl.generation.pieces import Finish, Generated, Piece, TokenLogprob
from zsl.generation.reuse import Reusable
from zsl.generation.sampling import Chooser, Sampling
from zsl.generation.text_stream import TextStream
from zsl.link.cancellation import Cancellation


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    stops: Sequence[str] = (),
    logprobs: int | None = None,
    on_piece: Callable[[Piece], None] = lambda piece: None,
    cancellation: Cancellation | None = None,
    reusable: Reusable | None = None,
) -> Generated:
    """Generate up to `max_tokens` tokens behind `prompt` with transformers' `generate`.

    `on_piece` is called for each token, by this thread. `cancellation` ends the text after the token that is computed
    here, or while the daemon has a request of it. `logprobs`: the number of most probable tokens to report with each
    piece. `reusable`: keys and values of an earlier call, for the next one. The text does not depend on torch's global
    generator, so that threads may call this at once.
    """
    if cancellation is None:
        cancellation = Cancellation()
    if cancellation.is_set():
        return Generated("", 0, "cancelled")

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

    chooser = Chooser(sampling, top=logprobs)
    progress = _Progress(
        TextStream(decode, stops),
        ends_of(model, tokenizer),
        chooser,
        on_piece,
        cancellation,
    )
    ids = torch.tensor([list(prompt)], device=model.device)
    config, output = model.generation_config, None
    cached = {} if reusable is None else reusable.for_prompt(prompt)
    with torch.no_grad(), progress.until_cancelled():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            # A model's own settings of sampling would warn beside do_sample=False.
            temperature=None,
            top_p=None,
            top_k=None,
            num_beams=1,
            eos_token_id=sorted(progress.ends) or None,
            pad_token_id=tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id,
            logits_processor=LogitsProcessorList([chooser]),
            stopping_criteria=StoppingCriteriaList([progress]),
            return_dict_in_generate=True,
            **cached,
        )
    if reusable is not None and output is not None:
        reusable.keep(output.past_key_values, output.sequences[0].tolist())
    return progress.finished()


def ends_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end a text, of the model and of its tokenizer."""
    named = model.generation_config.eos_token_id
    ends = {named} if isinstance(named, int) else set(named or ())
    return ends if tokenizer.eos_token_id is None else ends | {tokenizer.eos_token_id}


class _Progress(StoppingCriteria):
    """Follows the generation: transformers asks after each token whether to stop."""

    def __init__(
        self,
        stream: TextStream,
        ends: set[int],
        chooser: Chooser,
        on_piece: Callable[[Piece], None],
        cancellation: Cancellation,
    ) -> None:
        self._stream = stream
        self.ends = ends
        self._chooser = chooser
        self._on_piece = on_piece
        self._cancellation = cancellation
        self._texts: list[str] = []
        self._tokens = 0
        self._finish: Finish = "length"

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        token = int(input_ids[0, -1])
        self._tokens += 1
        if token in self.ends:
            self._finish = "stop"
        else:
            self._tell(self._stream.add(token), self._chooser.last)
            if self._stream.stopped:
                self._finish = "stop"
            elif self._cancellation.is_set():
                self._finish = "cancelled"
        done = self._finish != "length"
        return torch.full((1,), done, device=input_ids.device)  # type: ignore[return-value]

    @contextmanager
    def until_cancelled(self) -> Iterator[None]:
        """End `with` when the text is cancelled, while it waits for the daemon."""
        try:
            with self._cancellation.of_requests():
                yield
        except CancelledByClientError as error:
            clear_frames(error.__traceback__)  # in a cycle with the error, which would keep their tensors
            if not self._cancellation.is_set():
                raise
            self._finish = "cancelled"

    def finished(self) -> Generated:
        """Tell the text that was held back, and return the whole."""
        rest = self._stream.end()
        if rest:
            self._tell(rest, None)
        return Generated("".join(self._texts), self._tokens, self._finish)

    def _tell(self, text: str, logprob: TokenLogprob | None) -> None:
        self._texts.append(text)
        self._on_piece(Piece(text, logprob))
