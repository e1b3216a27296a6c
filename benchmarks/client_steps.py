"""Training steps of a benchmark's client, for each kind of client and each kind of trunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from time import perf_counter
from typing import Any

import torch
from trainee import trainee
from turns import StepSeconds, Turn

import zsl
from zsl.models.loading import load_whole
from zsl.models.reference import resolve
from zsl.split.cut import parse_cut
from zsl.split.stack import layer_count

Step = Callable[[], StepSeconds]

resolved = cache(resolve)


@contextmanager
def client_step(turn: Turn, seed: int, merged: list[int]) -> Iterator[Step]:
    """Build the step function of a client for one turn. The daemon's answers add to `merged`."""
    with ExitStack() as stack:
        yield (_trunk_step if turn.kind == "trunk" else _whole_step)(turn, seed, merged, stack)


def _trunk_step(turn: Turn, seed: int, merged: list[int], stack: ExitStack) -> Step:
    """Forward and backward of the trunk alone.

    The tensors are normal: what dense layers cost does not depend on the values.
    """
    shape = (turn.rows, turn.tokens, resolved(turn.model).config.get_text_config().hidden_size)
    random = torch.Generator().manual_seed(seed)
    activations, gradients = torch.randn(shape, generator=random), torch.randn(shape, generator=random)
    forward: Callable[[torch.Tensor], Any]
    backward: Callable[[Any, torch.Tensor], Any]
    if turn.through == "grpc":
        from baselines.grpc_trunk import GrpcTrunk  # here, or it would count in the memory of all others

        grpc = stack.enter_context(GrpcTrunk(str(turn.endpoint)))
        forward, backward = (lambda tensor: grpc.forward(tensor)[0]), grpc.backward
    else:
        trunk = stack.enter_context(zsl.TrunkClient(str(turn.endpoint), cut=parse_cut(turn.cut)))
        _note_merged(trunk, merged)
        mask = None
        if turn.left_padding:
            mask = torch.ones(turn.rows, turn.tokens, dtype=torch.long)
            mask[:, : turn.left_padding] = 0
        forward = lambda tensor: trunk.forward(tensor, attention_mask=mask, keep=True)  # noqa: E731
        backward = trunk.backward

    def step() -> StepSeconds:
        began = perf_counter()
        kept: Any = forward(activations)
        forwarded = perf_counter()
        backward(kept, gradients)
        ended = perf_counter()
        return StepSeconds(forwarded - began, ended - forwarded, ended - began)

    return step


def _whole_step(turn: Turn, seed: int, merged: list[int], stack: ExitStack) -> Step:
    """Training on random tokens, with LoRA on the layers outside the cut."""
    reference, cut = resolved(turn.model), parse_cut(turn.cut)
    if turn.through == "local":
        model = load_whole(reference)
    else:
        trunk = zsl.RemoteTrunk(str(turn.endpoint))
        stack.callback(trunk.close)
        model = zsl.load_client(reference, trunk, cut=cut)
        _note_merged(trunk.client, merged)
    layers = [layer for layer in range(layer_count(reference.config)) if not cut.start <= layer < cut.stop]
    trains = trainee(model, layers, seed)
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(reference.config.get_text_config().vocab_size, (turn.rows, turn.tokens), generator=random)
    return lambda: trains.step(ids)[1]


def _note_merged(trunk: zsl.TrunkClient, merged: list[int]) -> None:
    """Have every answer add to `merged` how many requests shared its pass; a model would throw that away."""
    forward, backward = trunk.forward, trunk.backward

    def forward_and_note(*arguments: Any, **options: Any) -> Any:
        step = forward(*arguments, **options)
        assert step.answer is not None
        merged.append(step.answer.merged)
        return step

    def backward_and_note(*arguments: Any, **options: Any) -> Any:
        answer = backward(*arguments, **options)
        merged.append(answer.merged)
        return answer

    trunk.forward, trunk.backward = forward_and_note, backward_and_note  # type: ignore[method-assign]
