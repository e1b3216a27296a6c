"""Schema of `[data]`: data to train and validate on, and checks of its keys. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from zsl.training.config.schema_base import Table

SYNTHETIC = "synthetic"
PYTHON_DOCS = "python-docs"
WIKITEXT = "wikitext"

# Keys that do not apply to a text: it has no columns, splits or configurations, and is read whole.
NOT_FOR_A_TEXT = ("config", "split", "text_column", "messages_column", "streaming")
NOT_FOR_SYNTHETIC = (*NOT_FOR_A_TEXT, "packing")


def _share_or_place(value: Any) -> Any:
    if value is None or value == 0:
        return None
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1:
        return float(value)
    raise PydanticCustomError(
        "validation", "a share of the rows between 0 and 1, the name of a split or the path of a file is needed"
    )


class DataTable(Table):
    """`[data]`: the rows to train and validate on. They stay in this process."""

    name: str = Field(
        default=SYNTHETIC,
        min_length=1,
        description="The data set: `synthetic`, `python-docs`, `wikitext`, a hub id `org/name`, or the path of a text "
        "(`.txt`, `.md`, `.rst`), of a file of rows (`.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv`, `.parquet`; a "
        "pattern for several; all but Parquet may be `.gz`, `.bz2`, `.xz` or `.zst`), or of a directory that is "
        "laid out as the hub lays out a data set; a path that exists is preferred to a hub id. Values of CSV are "
        "texts as they are written.",
    )
    config: str | None = Field(
        default=None, min_length=1, description="The data set's configuration, where it has more than one."
    )
    split: str = Field(default="train", min_length=1, description="The split to train on.")
    text_column: str | None = Field(
        default=None,
        min_length=1,
        description="The column that holds the text; without it `text`, or else the only column of strings, where the "
        "other columns hold neither lists nor tables and none is named as in a layout of chats.",
    )
    messages_column: str | None = Field(
        default=None,
        min_length=1,
        description="The column that holds conversations, lists of messages with `role` and `content` (or ShareGPT's "
        "`from` and `value`), of which only the assistant's answers are learnt; without it `messages`, "
        "`conversations`, or `prompt` and `completion`, texts or messages, of which the completion is learnt. The chat "
        "template is given `tools` and `chat_template_kwargs`, where there are such columns.",
    )
    streaming: bool = Field(
        default=False,
        description="Whether to read rows as they are needed instead of the whole data set first: with `samples` that "
        "many are read into memory, without it reading goes on for `train.max_steps`, with a shuffle buffer of 1,000 "
        "documents.",
    )
    packing: bool | None = Field(
        default=None,
        description="Whether to concatenate documents (texts with the end-of-text token between them) and cut them "
        "into rows of exactly `max_length` tokens, instead of one row for each, truncated to `max_length`; without it "
        "true for text and false for conversations and completions.",
    )
    validation: Annotated[float | str | None, BeforeValidator(_share_or_place)] = Field(
        default=None,
        description="The rows to validate on: a fraction of the rows (drawn with `seed`, and not trained on), the name "
        "of a split, or the path of a file; 0 for none.",
    )
    validation_samples: int | None = Field(
        default=None, ge=1, description="The largest number of rows to validate on; without it all."
    )
    samples: int | None = Field(
        default=None,
        ge=1,
        description="The largest number of rows to train on; without it 20 of `synthetic`, and all of any other.",
    )
    max_length: int = Field(default=128, ge=2, description="The largest number of tokens in a row.")
    seed: int = Field(
        default=0,
        ge=0,
        description="The seed of the synthetic language, of the draw of validation rows, and of a stream's order.",
    )

    @property
    def streams(self) -> bool:
        """True if the training data has no length, so that `train.max_steps` is required."""
        return self.streaming and self.samples is None

    def given(self, keys: Iterable[str]) -> list[str]:
        """Return the keys among `keys` whose value is not the default."""
        return [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]

    @model_validator(mode="after")
    def _keys_that_go_together(self) -> DataTable:
        for problem in self._problems():
            raise PydanticCustomError("combination", "{problem}", {"problem": problem})
        return self

    def _problems(self) -> Iterable[str]:
        unfit = {SYNTHETIC: NOT_FOR_SYNTHETIC, PYTHON_DOCS: NOT_FOR_A_TEXT}.get(self.name, ())
        if given := self.given(unfit):
            yield f"{given[0]} has no meaning for name = {self.name!r}"
        if self.name == SYNTHETIC and isinstance(self.validation, str):
            yield f"validation of name = {SYNTHETIC!r} is a share, such as 0.1"
        if self.validation in (self.name, self.split):
            yield f"validation = {self.validation!r} is what is trained on"
        if self.text_column and self.messages_column:
            yield "text_column and messages_column exclude each other"
        if self.validation_samples is not None and self.validation is None:
            yield "validation_samples needs validation: a share, a split or a file"
        if self.streams and isinstance(self.validation, float):
            yield "validation as a share of a stream needs samples; or name a split or a file"
