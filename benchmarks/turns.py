"""Messages between a benchmark and its client processes: lines of JSON over stdin and stdout.

    client   {}                     torch, transformers and peft are imported, and nothing else
    parent   a `Turn`               take part in this measurement
    client   {"step_seconds": …}    built, and warm; how long a step took
    parent   {"seconds": …}         begin, for so long
    client   a `Window`             what was done; then the next turn, or the end of stdin

Imports no torch: the parent does not need it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["trunk", "whole"]
Through = Literal["zsl", "grpc", "local"]


@dataclass(frozen=True)
class Turn:
    """Parameters of one turn: the work of each step.

    `kind`: `trunk` sends tensors to a trunk and back, `whole` trains a model. `through`: where the model's middle is,
    at `endpoint` behind one of the two protocols, or here.
    """

    kind: Kind
    through: Through
    endpoint: str | None
    model: str
    cut: str
    rows: int
    tokens: int
    adapter_rank: int = 0  # of adapters on all linear layers of the trunk; for `trunk` through `zsl`; 0: none
    left_padding: int = 0  # of the tokens; for `trunk` through `zsl`
    dtype: str = "float32"  # of the model; for `whole`
    device: str = "cpu"  # of the client's layers; for `whole`


@dataclass(frozen=True)
class StepSeconds:
    """Durations of one step, in seconds. The rest of `total` is the optimizer's."""

    forward: float
    backward: float
    total: float


@dataclass(frozen=True)
class Window:
    """Work of one client in the measured seconds.

    `steps`: how many; the one that the end cuts counts for the part of it that lay before. The lists have an entry for
    each step that was begun. `merged`: for each answer, how many requests shared its pass. `device_bytes`: the most
    that torch reserved on a CUDA device.
    """

    steps: float
    forward_seconds: list[float]
    backward_seconds: list[float]
    step_seconds: list[float]
    merged: list[int]
    device_bytes: int = 0
