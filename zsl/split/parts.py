"""Read `zsl.json`, which records the model and the cut of a part that `zsl split` wrote.

A part is a checkpoint directory that lacks the other side's tensors. The handshake compares the recorded identity of
the whole model; `zsl.models.identity` checks that the part's own tensors are those that were written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers.utils.hub import cached_file

from zsl.errors import ModelError
from zsl.wire.messages import Cut, Digest, ModelIdentity

RECORD = "zsl.json"
# Part of the names of the weight files, so that a plain `from_pretrained`, which would initialize the missing layers at
# random, does not find them.
VARIANT = "part"

PartName = Literal["client", "trunk"]


class Part(BaseModel):
    """Content of `zsl.json`. `digest` covers all other fields, `config.json`, and the part's tensors.

    In `format` 1 the weight files had the names of a whole checkpoint's.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: Literal[1, 2] = 2
    part: PartName
    cut: Cut
    model: ModelIdentity  # of the whole model
    hub_id: str | None = Field(default=None, max_length=200)
    digest: Digest

    @property
    def variant(self) -> str | None:
        """Variant that `from_pretrained` needs to find the weight files."""
        return VARIANT if self.format == 2 else None

    def cut_for(self, text: str, wanted: PartName, cut: Cut | None = None) -> Cut:
        """Return the cut of this part, after a check that it is the `wanted` part, for `cut` if one is given.

        `text` names the part in errors. Raises `ModelError` for the other part, or another cut.
        """
        if self.part != wanted:
            raise ModelError(f"{self.described(text)}: {_NEEDED[wanted]}")
        if cut not in (None, self.cut):
            raise ModelError(f"{self.described(text)}, not {cut}: give no other cut, or split the model at that one")
        return self.cut

    def described(self, text: str) -> str:
        """Return a description of this part for errors, beginning with `text`."""
        whose = "client's" if self.part == "client" else "trunk's"
        return f"{text} is the {whose} part of a {self.model.model_type} model, for the cut {self.cut}"


_NEEDED = {
    "client": "a client needs the client's part, or the whole model",
    "trunk": "a daemon needs the trunk's part, or the whole model; to train with this one, name a daemon with "
    "--server HOST:PORT",
}


def read_part(location: str) -> Part | None:
    """Read `zsl.json` at a location; None for a whole checkpoint. Raises `ModelError` for an invalid file."""
    file = cached_file(
        location,
        RECORD,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return None
    try:
        return Part.model_validate_json(Path(file).read_bytes())
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else _first_of(error)
        raise ModelError(f"{file} is not as `zsl split` wrote it ({reason}): split the model again") from error


def _first_of(error: ValidationError) -> str:
    found = error.errors()[0]
    where = ".".join(map(str, found["loc"]))
    return f"{where}: {found['msg']}" if where else found["msg"]
