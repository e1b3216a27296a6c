"""The parts that `zsl split` makes of a checkpoint, and `zsl.json`, which says of which model and cut a part is.

A part is a checkpoint directory that lacks the other side's tensors. What it says of the whole model counts in the
handshake as if the whole were there; that its own tensors are those that were written, `zsl.models.identity` checks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers.utils.hub import cached_file

from zsl.errors import ModelError
from zsl.wire.messages import Cut, Digest, ModelIdentity

RECORD = "zsl.json"
# In the names of a part's files of weights, so that a plain `from_pretrained`, which would fill the part up with random
# layers, does not find them.
VARIANT = "part"

PartName = Literal["client", "trunk"]


class Part(BaseModel):
    """What `zsl.json` holds. `digest` is over all else in it, over `config.json`, and over the part's tensors.

    In `format` 1 the weights had the names of a whole checkpoint's.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: Literal[1, 2] = 2
    part: PartName
    cut: Cut
    model: ModelIdentity  # of the whole
    hub_id: str | None = Field(default=None, max_length=200)
    digest: Digest

    @property
    def variant(self) -> str | None:
        """What `from_pretrained` is to look for in the names of the files of weights."""
        return VARIANT if self.format == 2 else None

    def cut_for(self, text: str, wanted: PartName, cut: Cut | None = None) -> Cut:
        """The cut of this part, which `text` names, as it is to be used for `wanted`; `cut`, if one was asked for.

        Raises `ModelError` if it is the other part, or of another cut.
        """
        if self.part != wanted:
            raise ModelError(f"{self.described(text)}: {_WHAT_IS_NEEDED[wanted]}")
        if cut not in (None, self.cut):
            raise ModelError(f"{self.described(text)}, not {cut}: give no other cut, or split the model at that one")
        return self.cut

    def described(self, text: str) -> str:
        """What this is, which `text` names."""
        whose = "client's" if self.part == "client" else "trunk's"
        return f"{text} is the {whose} part of a {self.model.model_type} model, for the cut {self.cut}"


_WHAT_IS_NEEDED = {
    "client": "a client needs the client's part, or the whole model",
    "trunk": "a daemon needs the trunk's part, or the whole model; to train with this one, name a daemon with "
    "--server HOST:PORT",
}


def read_part(location: str) -> Part | None:
    """What `zsl.json` at a location says, or None for a whole checkpoint. Raises `ModelError` for one that is none."""
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
        raise ModelError(f"{file} is not as zsl split wrote it ({reason}): split the model again") from error


def _first_of(error: ValidationError) -> str:
    found = error.errors()[0]
    where = ".".join(map(str, found["loc"]))
    return f"{where}: {found['msg']}" if where else found["msg"]
