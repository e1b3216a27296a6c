"""Render conversations with a tokenizer's chat template, and detect messages that it leaves out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from zsl.errors import DataError
from zsl.text.first_line import first_line
from zsl.training.data.conversations import Conversation, texts_of

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Keys of an answer's reasoning, as transformers passes it to templates.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
QUOTED = re.compile(r"""['"]said['"]""")  # as Python and JSON write it


@dataclass(frozen=True)
class ChatTemplate:
    """Chat templates of a tokenizer: some have a separate one for tools."""

    tokenizer: PreTrainedTokenizerBase
    takes_text: bool = True
    takes_parts: bool = True  # a content that is a list of texts

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """Detect the content types that the template accepts. Raises `ValueError` for a tokenizer without one."""
        tokenizer.get_chat_template()
        template = cls(tokenizer)
        text, of_parts = (
            template._text_or_none(Conversation([{"role": "user", "content": content}])) or ""
            for content in ("said", [{"type": "text", "text": "said"}])
        )
        takes_parts = "said" in of_parts and not QUOTED.search(of_parts)
        return cls(tokenizer, takes_text="said" in text or not takes_parts, takes_parts=takes_parts)

    def taken(self, conversation: Conversation) -> Conversation:
        """Convert contents to a type that the template accepts: text, or a list of parts."""
        messages = [
            {**message, "content": self._content(message["content"])} if "content" in message else message
            for message in conversation.messages
        ]
        return replace(conversation, messages=messages)

    def _content(self, content: str | list[dict[str, str]]) -> str | list[dict[str, str]]:
        if isinstance(content, str):
            return content if self.takes_text else [{"type": "text", "text": content}]
        return content if self.takes_parts else "".join(texts_of(content))

    def text(self, conversation: Conversation, until: int | None = None, *, ask: bool = False) -> str:
        """Render the messages before index `until`; `ask` adds the generation prompt."""
        messages, variables = conversation.messages[:until], conversation.variables
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask, **variables))

    def is_marked(self, conversation: Conversation) -> bool:
        """Tell whether the template for this conversation marks the assistant's answers."""
        return GENERATION_MARK.search(self._source(conversation)) is not None

    def marks(self, conversation: Conversation) -> list[tuple[int, int]]:
        """Return the (start, end) characters of each marked answer.

        transformers' token mask is not used: it extends to the row's end if a mark's last character is in no token.
        """
        variables = {**self.tokenizer.special_tokens_map, **conversation.variables}
        variables["chat_template"] = self._source(conversation)
        rendered: Any = render_jinja_template([conversation.messages], return_assistant_tokens_mask=True, **variables)
        marks: list[tuple[int, int]] = rendered[1][0]
        return marks

    def left_out(self, conversation: Conversation) -> Iterator[str]:
        """Name each part that the rendered text lacks or changes: `message`, `tools`.

        Raises `DataError` if it lacks a tool call: the model would learn an empty answer.
        """
        text = self.text(conversation)
        messages, variables = conversation.messages, conversation.variables
        for message in messages:
            thoughts = [message[key] for key in THOUGHTS if isinstance(message.get(key), str)]
            if not all(_is_in(text, said) for said in [*texts_of(message.get("content", "")), *thoughts]):
                yield "message"
        if "tools" in variables and text == self._text_or_none(
            replace(conversation, variables={key: value for key, value in variables.items() if key != "tools"})
        ):
            yield "tools"
        if any("tool_calls" in message for message in messages) and text == self._text_or_none(
            replace(conversation, messages=[{"content": "", **message, "tool_calls": []} for message in messages])
        ):
            raise DataError(
                "the model's chat template leaves out the tool_calls of the assistant; take a template that writes "
                "them, or write them as content"
            )

    def _source(self, conversation: Conversation) -> str:
        variables = conversation.variables
        return self.tokenizer.get_chat_template(variables.get("chat_template"), variables.get("tools"))

    def _text_or_none(self, conversation: Conversation) -> str | None:
        try:
            return self.text(conversation)
        except Exception:  # a template may raise any type
            return None


@contextmanager
def template_errors() -> Iterator[None]:
    """Turn errors of a template into `DataError`."""
    try:
        yield
    except DataError:
        raise
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"the model's chat template does not take it: {first_line(error)}") from error


def _is_in(text: str, said: str) -> bool:
    return said.strip() in text or json.dumps(said, ensure_ascii=False)[1:-1] in text
