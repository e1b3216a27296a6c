"""Make the generation job of a request to one of the served models, and the form of its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from zsl.errors import ZslError
from zsl.generation.generate import generate
from zsl.generation.pieces import Generated, Piece
from zsl.generation.prompts import ContextError, room_for_answer, tokens_of_chat, tokens_of_text
from zsl.generation.sampling import Sampling
from zsl.link.cancellation import Cancellation
from zsl.serving.answers import Answer, ChatAnswer, CompletionAnswer
from zsl.serving.api_errors import ApiError
from zsl.serving.request_schemas import ChatRequest, CompletionRequest, Request
from zsl.serving.service import Job

COMPLETION_TOKENS = 16  # of a completion whose request names no number, as in OpenAI's API


@dataclass(frozen=True)
class ServedModels:
    """Models by name, with one tokenizer. `most_tokens`: of any answer."""

    models: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerBase
    context_tokens: int
    most_tokens: int

    def prepare(self, request: Request) -> tuple[Job, Answer]:
        """Make a request's job, and the form of its answer. Takes as long as tokenizing does. Raises `ApiError`."""
        model = self.models.get(request.model)
        if model is None:
            known = ", ".join(self.models)
            raise ApiError(
                404,
                f"the model {request.model!r} does not exist; there are {known}",
                param="model",
                code="model_not_found",
            )
        if isinstance(request, ChatRequest):
            form: Callable[..., Answer] = ChatAnswer
            tokens = self._tokens_of_chat(request)
            default = self.most_tokens
        else:
            assert isinstance(request, CompletionRequest)
            form = CompletionAnswer
            tokens = self._tokens_of_prompt(request)
            default = min(COMPLETION_TOKENS, self.most_tokens)
        limit = self._limit(len(tokens), request.limit, default, "messages" if form is ChatAnswer else "prompt")
        top = request.top
        answer = form(
            request.model,
            len(tokens),
            self._text_of_token,
            with_logprobs=top is not None,
            tells_usage=request.tells_usage,
        )
        sampling = Sampling(
            1.0 if request.temperature is None else request.temperature,
            1.0 if request.top_p is None else request.top_p,
            request.seed,
        )

        def job(on_piece: Callable[[Piece], None], cancellation: Cancellation) -> Generated:
            return generate(
                model,
                self.tokenizer,
                tokens,
                max_tokens=limit,
                sampling=sampling,
                stops=request.stops,
                logprobs=top,
                on_piece=on_piece,
                cancellation=cancellation,
            )

        return job, answer

    def _tokens_of_chat(self, request: ChatRequest) -> list[int]:
        messages = [message.for_template() for message in request.messages]
        return _or_refuse(partial(tokens_of_chat, self.tokenizer, messages), "messages")

    def _tokens_of_prompt(self, request: CompletionRequest) -> list[int]:
        prompt = request.prompt
        if not isinstance(prompt, str):
            tokens = [token for token in prompt if isinstance(token, int)]
            if not prompt:
                raise ApiError(400, "the prompt is empty", param="prompt")
            if tokens:
                size = len(self.tokenizer)
                if max(tokens) >= size:
                    raise ApiError(400, f"the tokenizer has {size} tokens, and no {max(tokens)}", param="prompt")
                return tokens
        text = prompt if isinstance(prompt, str) else str(prompt[0])
        return _or_refuse(partial(tokens_of_text, self.tokenizer, text), "prompt")

    def _limit(self, prompt_tokens: int, asked: int | None, default: int, param: str) -> int:
        if asked is not None and asked > self.most_tokens:
            raise ApiError(400, f"max_tokens is {asked}, and {self.most_tokens} are served at most", param="max_tokens")
        try:
            return room_for_answer(prompt_tokens, self.context_tokens, asked, default=default)
        except ContextError as error:
            raise ApiError(400, str(error), param=param, code="context_length_exceeded") from error

    def _text_of_token(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


def _or_refuse(tokenize: Callable[[], list[int]], param: str) -> list[int]:
    try:
        return tokenize()
    except ZslError as error:
        raise ApiError(400, str(error), param=param) from error
