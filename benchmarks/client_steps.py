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
from zsl.client.replayable_step import CallAdapter
from zsl.link.adapter_versions import EncodedAdapter
from zsl.models.loading import load_whole
from zsl.models.reference import resolve
from zsl.split.cut import parse_cut
from zsl.split.meta_model import meta_model
from zsl.split.stack import find_stack, layer_count
from zsl.wire.adapter_layout import AdapterLayout, LoraModule, version_of
from zsl.wire.tensors import encode_tensor

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
    if turn.through == "grpc":
        from baselines.grpc_trunk import GrpcTrunk  # here, or it would count in the memory of all others

        grpc = stack.enter_context(GrpcTrunk(str(turn.endpoint)))
        return _timed(lambda: grpc.forward(activations)[0], lambda kept: grpc.backward(kept, gradients))
    trunk = stack.enter_context(zsl.TrunkClient(str(turn.endpoint), cut=parse_cut(turn.cut)))
    _note_merged(trunk, merged)
    mask = None
    if turn.left_padding:
        mask = torch.ones(turn.rows, turn.tokens, dtype=torch.long)
        mask[:, : turn.left_padding] = 0
    versions = None if not turn.adapter_rank else _adapter_versions(turn, seed)

    def forward() -> Any:
        adapter = None if versions is None else next(versions)
        return trunk.forward(activations, attention_mask=mask, keep=True, adapter=adapter)

    return _timed(forward, lambda kept: trunk.backward(kept, gradients, adapter_gradients=versions is not None))


def _timed(forward: Callable[[], Any], backward: Callable[[Any], Any]) -> Step:
    def step() -> StepSeconds:
        began = perf_counter()
        kept = forward()
        forwarded = perf_counter()
        backward(kept)
        ended = perf_counter()
        return StepSeconds(forwarded - began, ended - forwarded, ended - began)

    return step


def _adapter_versions(turn: Turn, seed: int) -> Iterator[CallAdapter]:
    """LoRA on all linear layers of the trunk, with other weights at each step, as an optimizer leaves them."""
    cut = parse_cut(turn.cut)
    layers = find_stack(meta_model(resolved(turn.model).config)).layers
    modules = []
    for index in range(cut.start, cut.stop):
        for path, module in layers[index].named_modules():
            if type(module).__name__ in ("Linear", "Conv1D"):
                outputs, inputs = module.weight.shape[:: -1 if type(module).__name__ == "Conv1D" else 1]
                fields = {"inputs": inputs, "outputs": outputs, "rank": turn.adapter_rank}
                sizes = {**fields, "scaling": 2.0, "dropout": 0.0, "has_bias": False, "has_magnitude": False}
                modules.append(LoraModule.model_validate({"path": f"{index}.{path}", **sizes}))
    layout = AdapterLayout(dtype="f32", modules=tuple(modules))
    encoded = layout.encoded()
    weights = torch.randn(layout.elements, generator=torch.Generator().manual_seed(seed)) * 0.01
    while True:
        weights = weights * 0.999
        _, buffer = encode_tensor("weights", weights)
        yield CallAdapter(EncodedAdapter(version_of(encoded, "f32", buffer), encoded, "f32", buffer))


def _whole_step(turn: Turn, seed: int, merged: list[int], stack: ExitStack) -> Step:
    """Training on random tokens, with LoRA on the layers outside the cut."""
    reference, cut, dtype = resolved(turn.model), parse_cut(turn.cut), getattr(torch, turn.dtype)
    if turn.through == "local":
        model = load_whole(reference, dtype)
    else:
        trunk = zsl.RemoteTrunk(str(turn.endpoint))
        stack.callback(trunk.close)
        model = zsl.load_client(reference, trunk, cut=cut, dtype=dtype, layers="client")
        _note_merged(trunk.client, merged)
    model.to(torch.device(turn.device))  # type: ignore[arg-type]
    layers = [layer for layer in range(layer_count(reference.config)) if not cut.start <= layer < cut.stop]
    trains = trainee(model, layers, seed)
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(reference.config.get_text_config().vocab_size, (turn.rows, turn.tokens), generator=random)
    on_device = ids.to(turn.device)
    return lambda: trains.step(on_device)[1]


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
