"""Requests as the wire allows them, and a daemon's server that computes just those together that a test names."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st

from zsl.client.replayable_step import Answer, Step, read_answer
from zsl.client.trunk_client import TrunkClient
from zsl.split.cut import parse_cut
from zsl.trunk.daemon.load import plan_trunk
from zsl.trunk.settings import ServerSettings, TrunkTraits
from zsl.trunk.work import Batch, Compute, Outcome
from zsl.wire.frames import Message

from .echo import EchoServer
from .models import CUT, POSITIONS

HIDDEN = 32
WAIT_SECONDS = 60
MAX_REQUESTS, MAX_ROWS, MAX_TOKENS = 6, 3, 12
MASKS = ("none", "ones", "left", "right", "holes", "row without tokens")
POSITION_IDS = ("none", "shared", "per row", "restarting", "shifted", "any")


@dataclass(frozen=True)
class Request:
    """Forward and backward of one client. `poisoned`: huge activations and infinite gradients where its mask is 0, or
    everywhere if it has none; its own numbers are nobody's then."""

    activations: torch.Tensor  # [rows, tokens, HIDDEN]
    gradients: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    lengths: torch.Tensor | None
    keep: bool
    poisoned: bool
    form: str

    def __repr__(self) -> str:
        return f"<{self.form}>"


@st.composite
def requests(draw: st.DrawFn, *, packs: bool) -> Request:
    """Any request that a trunk takes; only a trunk that packs takes `lengths`."""
    rows, tokens = draw(st.integers(1, MAX_ROWS)), draw(st.integers(1, MAX_TOKENS))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    lengths = mask = None
    mask_form, positions_form = draw(st.sampled_from(MASKS)), draw(st.sampled_from(POSITION_IDS))
    if packs and mask_form == "none" and rows == 1 and draw(st.booleans()):
        lengths = torch.tensor(_parts(tokens, random), dtype=torch.int32)
    else:
        mask = _mask(mask_form, rows, tokens, random)
    positions = _positions(positions_form, rows, tokens, random)
    activations, gradients = (torch.randn(rows, tokens, HIDDEN, generator=random) for _ in range(2))
    poisoned = draw(st.integers(0, 5)) == 0
    if poisoned:
        at = torch.ones(rows, tokens, dtype=torch.bool) if mask is None else mask == 0
        activations[at] *= 1e4
        gradients[at] = draw(st.sampled_from([float("inf"), float("nan"), 1e30]))
    if mask is not None:
        mask = mask.to(draw(st.sampled_from([torch.int64, torch.int32, torch.bool, torch.uint8])))
    if positions is not None:
        positions = positions.to(draw(st.sampled_from([torch.int64, torch.int32, torch.int16])))
    keep = draw(st.booleans())
    form = (
        f"{rows}x{tokens} mask={mask_form if lengths is None else None} positions={positions_form} "
        f"lengths={None if lengths is None else lengths.tolist()} {dtype} {keep=} {poisoned=}"
    )
    return Request(activations.to(dtype), gradients.to(dtype), mask, positions, lengths, keep, poisoned, form)


def _parts(tokens: int, random: torch.Generator) -> list[int]:
    """Lengths of sequences that add up to `tokens`."""
    starts = [0, *(at for at in range(1, tokens) if _below(3, random) == 0), tokens]
    return [end - start for start, end in pairwise(starts)]


def _mask(form: str, rows: int, tokens: int, random: torch.Generator) -> torch.Tensor | None:
    if form == "none":
        return None
    mask, at = torch.ones(rows, tokens, dtype=torch.long), torch.arange(tokens)
    for row in range(rows):
        padding = _below(tokens, random)
        if form == "left":
            mask[row, at < padding] = 0
        elif form == "right":
            mask[row, at >= tokens - padding] = 0
        elif form == "holes":
            mask[row, torch.rand(tokens, generator=random) < 0.4] = 0
    if form == "row without tokens":
        mask[_below(rows, random)] = 0
    return mask


def _positions(form: str, rows: int, tokens: int, random: torch.Generator) -> torch.Tensor | None:
    at = torch.arange(tokens)
    if form == "none":
        return None
    if form == "shared":
        return at.unsqueeze(0)
    if form == "per row":
        return at.repeat(rows, 1)
    if form == "shifted":
        return torch.stack([at + _below(POSITIONS - tokens, random) for _ in range(rows)])
    if form == "restarting":
        each = [torch.cat([torch.arange(n) for n in _parts(tokens, random)]) for _ in range(rows)]
        return torch.stack(each if _below(2, random) else each[:1])
    return torch.randint(0, POSITIONS, (rows, tokens), generator=random)


def _below(stop: int, random: torch.Generator) -> int:
    return int(torch.randint(0, stop, (), generator=random))


class GatedCompute:
    """Runs the batches of another computation while its gate is open."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._gate = threading.Event()
        self._gate.set()
        self._begun = threading.Semaphore(0)

    @property
    def traits(self) -> TrunkTraits:
        return self._compute.traits

    def run(self, batch: Batch) -> list[Outcome]:
        self._begun.release()
        assert self._gate.wait(WAIT_SECONDS), "the test never opened the gate"
        return self._compute.run(batch)

    @contextmanager
    def held_by(self, request: Future[Message] | Any) -> Iterator[None]:
        """Within it the batch of `request` (a function that submits it) stays in the computation, and all wait."""
        while self._begun.acquire(blocking=False):
            pass
        self._gate.clear()
        try:
            request()
            assert self._begun.acquire(timeout=WAIT_SECONDS), "nothing came to the computation"
            yield
        finally:
            self._gate.set()


class FailedPasses(logging.Handler):
    """Passes that the computation logs as failed: it runs their requests one by one then, which would hide a fault."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class Trunk:
    """A served trunk, and clients enough for a request each. `largest_pass`: how many requests shared one."""

    def __init__(self, compute: GatedCompute, clients: Sequence[TrunkClient]) -> None:
        self.largest_pass = 1
        self.failed_passes = FailedPasses()
        self.traits = compute.traits
        self.half = clients[0].welcome.dtype != "f32"
        self._compute = compute
        self._blocker, *self._clients = clients

    def forward_alone(self, place: int, request: Request) -> Step:
        return self._clients[place].forward(**_inputs(request))

    def backward_alone(self, place: int, step: Step, request: Request) -> Answer:
        return self._clients[place].backward(step, request.gradients)

    def forward_together(self, requests: dict[int, Request]) -> dict[int, Step]:
        """The steps of these requests, by place: computed in one pass, as far as they may share one."""
        clients = self._clients
        submitted = self._together(
            {place: lambda p=place, r=one: clients[p].submit_forward(**_inputs(r)) for place, one in requests.items()}
        )
        for place, (step, future) in submitted.items():
            clients[place].finish_forward(step, clients[place].wait(future))
            assert step.answer is not None
            self.largest_pass = max(self.largest_pass, step.answer.merged)
        return {place: step for place, (step, _) in submitted.items()}

    def backward_together(self, requests: dict[int, Request], steps: dict[int, Step]) -> dict[int, Answer]:
        """The answers to the backwards of these steps, computed in one pass, as far as they may share one."""
        clients = self._clients
        submitted = self._together(
            {
                place: lambda p=place, r=one: clients[p].submit_backward(steps[p], r.gradients)
                for place, one in requests.items()
            }
        )
        return {place: read_answer(clients[place].wait(future), "gradients") for place, future in submitted.items()}

    def _together(self, submits: dict[int, Any]) -> dict[int, Any]:
        """Submit while another pass runs, so that all are queued when it ends."""
        held: list[Future[Message]] = []

        def block() -> None:
            held.append(self._blocker.submit_forward(torch.zeros(1, 1, HIDDEN))[1])

        with self._compute.held_by(block):
            submitted = {place: submit() for place, submit in submits.items()}
            while self._blocker.status().queued_requests < len(submits):
                pass
        self._blocker.wait(held[0])
        return submitted


@contextmanager
def served_trunk(
    path: str, *, dtype: torch.dtype = torch.float32, deterministic: bool = False, stash_memory_bytes: int = 4 << 30
) -> Iterator[Trunk]:
    """The trunk of a checkpoint behind a real server, with a client for each request and one more."""
    plan = plan_trunk(path, parse_cut(CUT), dtype, "cpu", forward_only=False)
    compute = GatedCompute(plan.load(max_batch_tokens=256, merge_below_tokens=96, deterministic=deterministic))
    server = EchoServer(
        compute=compute,
        model=plan.info.model,
        cut=plan.info.cut,
        dtype=plan.info.dtype,
        row_tokens=plan.info.max_row_tokens,
        settings=ServerSettings(stash_memory_bytes=stash_memory_bytes),
    )
    with ExitStack() as stack:
        stack.enter_context(server)
        clients = [stack.enter_context(TrunkClient(server.endpoint)) for _ in range(MAX_REQUESTS + 1)]
        for client in clients:
            client.connect()
        trunk = Trunk(compute, clients)
        logger = logging.getLogger("zsl.trunk.compute.engine")
        logger.addHandler(trunk.failed_passes)
        stack.callback(logger.removeHandler, trunk.failed_passes)
        yield trunk


def _inputs(request: Request) -> dict[str, Any]:
    return {
        "activations": request.activations,
        "attention_mask": request.attention_mask,
        "position_ids": request.position_ids,
        "lengths": request.lengths,
        "keep": request.keep,
    }
