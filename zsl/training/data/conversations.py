"""Read conversations from rows in the layouts of TRL and ShareGPT, and check their messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zsl.errors import DataError
from zsl.training.data.columns import Column

Messages = list[dict[str, Any]]

# ShareGPT's names of roles, and those of chat templates.
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"} | {
    "chatgpt": "assistant",
    "tool": "tool",
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, of which those after the first `prompt` are learnt, and the template's `variables`."""

    messages: Messages
    prompt: int = 0
    variables: dict[str, Any] = field(default_factory=dict)

    @property
    def weighted_answers(self) -> int:
        """Number of answers with a `weight` other than 1, as in OpenAI's files."""
        answers = (message for message in self.messages[self.prompt :] if message["role"] == "assistant")
        return sum(answer.get("weight", 1) != 1 for answer in answers)


def conversation_of(row: Mapping[str, Any], column: Column) -> Conversation:
    """Read the conversation in `row`. Raises `DataError` for an invalid one."""
    prompt = messages_of(row[column.prompt]) if column.prompt else []
    messages = messages_of(row[column.name])
    given = _json(row, "chat_template_kwargs", dict) or {}
    variables = {key: value for key, value in given.items() if value is not None}
    if tools := _json(row, "tools", list):
        variables["tools"] = tools  # for an empty list some templates write a header for tools
    return Conversation([*prompt, *messages], len(prompt), variables)


def messages_of(value: Any) -> Messages:
    """Read messages from a list or JSON text, each with a role and content or tool_calls; drop keys with None."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError("text, and no JSON list of messages; name a column of text with data.text_column") from None
    if not isinstance(value, list):
        raise DataError(f"{type(value).__name__}, not a list of messages")
    return [_message(number, message) for number, message in enumerate(value, 1)]


def _message(number: int, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise DataError(f"message {number}: a message without role and content")
    message = {key: value for key, value in given.items() if value is not None}
    if "from" in message and "role" not in message:
        speaker = str(message.pop("from"))
        if speaker not in ROLES:
            raise DataError(f"message {number} is from {speaker!r}, not one of {', '.join(ROLES)}; rename it")
        message["role"] = ROLES[speaker]
    if "value" in message and "content" not in message:
        message["content"] = message.pop("value")
    if not message.get("tool_calls", True):
        del message["tool_calls"]
    speaks = "content" in message or (message.get("role") == "assistant" and "tool_calls" in message)
    if not isinstance(message.get("role"), str) or not speaks:
        raise DataError(f"message {number}: a message without role and content")
    if "content" in message:
        message["content"] = _content(number, message["content"])
    return message


def _content(number: int, content: Any) -> str | list[dict[str, str]]:
    """Check that a content is text or a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"message {number} has a content of type {type(content).__name__}: write it as text")
    parts = []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise DataError(f"message {number} has content of type {kind!r}, and only text is learnt from")
        parts.append({"type": "text", "text": part["text"]})
    return parts


def texts_of(content: str | list[dict[str, str]]) -> list[str]:
    """Return the texts of a content."""
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _json(row: Mapping[str, Any], name: str, kind: type) -> Any:
    """Read a value of `row` that may be JSON text. Raises `DataError` if it is not of type `kind`."""
    value = row.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError:
            raise DataError(f"{name} is text, and invalid JSON") from None
    if value is not None and not isinstance(value, kind):
        raise DataError(f"{name} is a {type(value).__name__}, not a {kind.__name__}")
    return value
