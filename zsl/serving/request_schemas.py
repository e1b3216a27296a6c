"""Requests of OpenAI's API, as far as they are served. Fields that would change the answer otherwise are refused.

Imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

# Fields that nothing here depends on.
_IGNORED = frozenset(
    [
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    ]
)
# Fields that are not served, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_MOST_STOPS, _LONGEST_STOP = 16, 1000

Stop = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]
Token = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    """Part of a message's content. Only texts are served."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """Message of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """Return the message as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class Request(BaseModel):
    """Fields that both kinds of requests have."""

    model_config = ConfigDict(extra="forbid")

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=_MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_served(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        left = {}
        for name, value in values.items():
            if name in cls.model_fields:
                left[name] = value
            elif name in _NEUTRAL:
                if value is not None and value not in _NEUTRAL[name]:
                    raise PydanticCustomError("unsupported", "{field} is not supported", {"field": name})
            elif name not in _IGNORED:
                raise PydanticCustomError("unknown", "unknown field {field}", {"field": name})
        return left

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def tells_usage(self) -> bool:
        """True if a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Request):
    """Request of `/v1/completions`: one prompt, a text or tokens."""

    prompt: str | list[Token] | Annotated[list[str], Field(min_length=1, max_length=1)]
    logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def top(self) -> int | None:
        """Number of most probable tokens to report, or None for no report."""
        return self.logprobs

    @property
    def limit(self) -> int | None:
        """Largest number of tokens of the answer, or None."""
        return self.max_tokens


class ChatRequest(Request):
    """Request of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("combination", "{field} needs logprobs", {"field": "top_logprobs"})
        return self

    @property
    def top(self) -> int | None:
        """Number of most probable tokens to report, or None for no report."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        """Largest number of tokens of the answer, or None."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
