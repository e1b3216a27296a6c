"""Clients that share passes get the numbers that they get alone."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

import zsl
from support import batches
from support.compare import numbers_of, within
from support.daemon import Daemon
from support.models import with_lora
from zsl.client.replayable_step import Answer, read_answer
from zsl.split.cut import parse_cut
from zsl.trunk.compute import attention, attention_by_scores
from zsl.trunk.compute.engine import TorchCompute
from zsl.trunk.compute.graph_sizes import NODE_BYTES, nodes_in
from zsl.trunk.compute.linear_outputs import LinearLayers, LinearOutputs
from zsl.trunk.compute.packing import packed
from zsl.trunk.compute.passes import Pass, Rows, sequences_of
from zsl.trunk.compute.stash import STEP_BYTES, TorchStash
from zsl.trunk.compute.trunk_model import Graph, TrunkModel
from zsl.trunk.costs import Costs, PassCost
from zsl.trunk.daemon.load import plan_trunk
from zsl.trunk.work import Batch, Done, Keep, Kind, Outcome, Packed, Shape, Sharing, Work
from zsl.wire.frames import Message
from zsl.wire.messages import Role
from zsl.wire.tensors import decode_tensor, encode_tensor

TOLERANCE = 1e-5
STEPS = 15
PACKED = Packed()


def client_model(path: str, endpoint: str, seed: int) -> PeftModel:
    return with_lora(zsl.load_client(path, zsl.RemoteTrunk(endpoint)), seed=seed)


def train(model: PeftModel, seed: int, barrier: threading.Barrier | None = None) -> list[float]:
    """Fifteen steps of one client; with a barrier each step begins together with the others'."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        if barrier is not None:
            barrier.wait(60)
        losses.append(float(numbers_of(model, batches.plain(seed=100 * seed + step)).loss))
        optimizer.step()
    return losses


@pytest.mark.parametrize("clients", [pytest.param(2, marks=pytest.mark.long), 4])
def test_clients_that_train_at_once_get_the_losses_that_they_get_alone(
    clients: int, serve: Callable[..., Daemon], checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, endpoint = str(checkpoints("llama")), serve("llama").endpoint
    seeds = range(1, clients + 1)
    alone = [train(client_model(path, endpoint, seed), seed) for seed in seeds]
    merged = []

    def note(message: Message, role: Role, **how: bool) -> Answer:
        answer = read_answer(message, role, **how)
        merged.append(answer.merged)
        return answer

    monkeypatch.setattr("zsl.client.trunk_client.read_answer", note)
    models = [client_model(path, endpoint, seed) for seed in seeds]
    barrier = threading.Barrier(clients)
    with ThreadPoolExecutor(clients) as pool:
        together = list(pool.map(train, models, seeds, [barrier] * clients))
    for mine, other in zip(alone, together, strict=True):
        assert within(TOLERANCE)(torch.tensor(mine), torch.tensor(other))
    assert len({tuple(losses) for losses in alone}) == clients, "clients with the same losses would hide a mix-up"
    if clients > 2:
        assert max(merged) > 1, "nothing was merged: the test would show nothing"


CUT = parse_cut("2:4")


def compute_of(path: Path, **changes: object) -> TorchCompute:
    plan = plan_trunk(str(path), CUT, torch.float32, "cpu", forward_only=False)
    compute = plan.load(max_batch_tokens=512, merge_below_tokens=64)
    compute.traits = replace(compute.traits, **changes)  # type: ignore[arg-type]
    return compute


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2", "mistral"])
def compute(request: pytest.FixtureRequest, checkpoints: Callable[..., Path]) -> TorchCompute:
    found = compute_of(checkpoints(request.param))
    assert found.traits.packs
    return found


def run(compute: TorchCompute, works: Sequence[Work]) -> list[Outcome]:
    return compute.run(Batch(tuple(works)))


def forward_work(
    seed: int,
    rows: int = 1,
    tokens: int = 8,
    *,
    value: float | None = None,
    keep: Keep = Keep.LINEAR_OUTPUTS,
    sharing: Sharing = PACKED,
) -> Work:
    torch.manual_seed(seed)
    shape = (rows, tokens, 32)
    activations = torch.randn(shape) if value is None else torch.full(shape, value)
    buffers = {"activations": encode_tensor("activations", activations)}
    return Work(Kind.FORWARD, buffers, Shape(rows, tokens, (tokens,) * rows), sharing, keep)  # type: ignore[arg-type]


def backward_work(work: Work, done: object, seed: int) -> Work:
    assert isinstance(done, Done), done
    torch.manual_seed(seed)
    gradients = torch.randn(work.shape.rows, work.shape.tokens, 32)
    return Work(
        Kind.BACKWARD, {"gradients": encode_tensor("gradients", gradients)}, work.shape, work.sharing, stash=done.stash
    )


def tensors(outcomes: list[object]) -> list[torch.Tensor]:
    found = []
    for outcome in outcomes:
        assert isinstance(outcome, Done), outcome
        ((descriptor, buffer),) = outcome.buffers.values()
        found.append(decode_tensor(descriptor, buffer).clone())
    return found


def alone(compute: TorchCompute, work: Work, seed: int) -> list[torch.Tensor]:
    """Output and gradient of a request that shares nothing, from its graph."""
    (done,) = run(compute, [replace(work, keep=Keep.GRAPH)])
    return [*tensors([done]), *tensors(run(compute, [backward_work(work, done, seed)]))]


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.calls = 0
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self._function(*args, **kwargs)


def split_randomly(count: int, source: random.Random) -> list[list[int]]:
    """The numbers below `count` in random order, in random batches."""
    order, batches = source.sample(range(count), count), []
    while order:
        size = source.randint(1, len(order))
        batches.append(order[:size])
        del order[:size]
    return batches


@pytest.mark.parametrize("keep", [Keep.INPUT, Keep.LINEAR_OUTPUTS, Keep.GRAPH_AND_LINEAR_OUTPUTS])
def test_what_is_kept_of_a_step_changes_the_time_of_its_backward_not_a_bit_of_its_result(
    compute: TorchCompute, keep: Keep
) -> None:
    work = forward_work(1)
    expected = alone(compute, work, 9)
    (done,) = run(compute, [replace(work, keep=keep)])
    assert isinstance(done, Done) and done.stash is not None and done.stash.keep is keep
    stash: object = done.stash
    while stash is not None:  # as it is, and demoted step by step
        assert isinstance(stash, TorchStash)
        back = run(compute, [replace(backward_work(work, done, 9), stash=stash)])
        assert torch.equal(tensors(list(back))[0], expected[1])
        stash = stash.demoted()


def test_requests_that_come_back_together_share_their_graph(
    compute: TorchCompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = [forward_work(seed, tokens=5 + seed, keep=Keep.GRAPH_AND_LINEAR_OUTPUTS) for seed in range(3)]
    expected = [alone(compute, work, seed) for seed, work in enumerate(works)]
    done = run(compute, works)
    backs = [backward_work(works[seed], done[seed], seed) for seed in (2, 0, 1)]
    monkeypatch.setattr(TrunkModel, "graph", lambda *_: pytest.fail("the forward was computed again"))
    for ours, seed in zip(tensors(list(run(compute, backs))), (2, 0, 1), strict=True):
        assert within(TOLERANCE)(ours, expected[seed][1])


@pytest.mark.parametrize(("fixed_seconds", "passes"), [(0.0, [20]), (1.0, [40])])
def test_those_who_shared_a_forward_go_by_its_graph_beside_others_if_that_is_cheaper(
    compute: TorchCompute, monkeypatch: pytest.MonkeyPatch, fixed_seconds: float, passes: list[int]
) -> None:
    """Two of one forward, one of three of another, and one that was alone."""
    monkeypatch.setattr(compute, "traits", replace(compute.traits, costs=costs_of(fixed_seconds)))
    works = [
        forward_work(seed, tokens=tokens, keep=Keep.GRAPH_AND_LINEAR_OUTPUTS)
        for seed, tokens in enumerate([8, 8, 20, 5, 5, 4])
    ]
    expected = [alone(compute, work, seed) for seed, work in enumerate(works)]
    done = [*run(compute, works[:2]), *run(compute, works[2:5]), *run(compute, works[5:])]
    again: list[int] = []
    graph = TrunkModel.graph

    def note(trunk: TrunkModel, inputs: Pass, linear_outputs: LinearOutputs | None = None) -> Graph:
        again.append(inputs.rows * inputs.tokens)
        return graph(trunk, inputs, linear_outputs)

    monkeypatch.setattr(TrunkModel, "graph", note)
    coming = (5, 1, 2, 0)
    backs = [backward_work(works[seed], done[seed], seed) for seed in coming]
    for ours, seed in zip(tensors(list(run(compute, backs))), coming, strict=True):
        assert within(TOLERANCE)(ours, expected[seed][1])
    assert again == passes, "tokens that were computed again"


def costs_of(fixed_seconds: float) -> Costs:
    """Costs of a trunk that takes twice as long from linear outputs, with this fixed cost a pass."""
    return Costs(PassCost(fixed_seconds, 1e-3), PassCost(fixed_seconds, 1e-3), PassCost(fixed_seconds, 2e-3))


def test_who_stays_away_holds_no_more_memory_than_its_own(compute: TorchCompute) -> None:
    works = [
        forward_work(seed, tokens=tokens, keep=Keep.GRAPH_AND_LINEAR_OUTPUTS) for seed, tokens in ((0, 2), (1, 60))
    ]
    expected = alone(compute, works[0], 0)
    done = run(compute, works)
    stays = done[0].stash if isinstance(done[0], Done) else None
    assert isinstance(stays, TorchStash) and stays.shared is not None
    run(compute, [backward_work(works[1], done[1], 1)])
    assert stays.shared.graph is None and stays.shared.merged is None
    linear_outputs = stays.shared.linear_outputs_of(0)
    assert linear_outputs is not None
    in_storages = sum(o.untyped_storage().nbytes() for o in linear_outputs.outputs)
    assert in_storages + linear_outputs.overhead_bytes == linear_outputs.nbytes <= stays.nbytes
    assert within(TOLERANCE)(tensors(run(compute, [backward_work(works[0], done[0], 0)]))[0], expected[1])


def test_a_step_that_is_dropped_costs_its_neighbours_time_and_nothing_else(compute: TorchCompute) -> None:
    works = [forward_work(seed, keep=Keep.GRAPH_AND_LINEAR_OUTPUTS) for seed in range(3)]
    expected = [alone(compute, work, seed) for seed, work in enumerate(works)]
    done = run(compute, works)
    assert isinstance(done[1], Done) and done[1].stash is not None
    done[1].stash.drop()
    backs = [backward_work(works[seed], done[seed], seed) for seed in (0, 2)]
    for ours, seed in zip(tensors(list(run(compute, backs))), (0, 2), strict=True):
        assert within(TOLERANCE)(ours, expected[seed][1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_kernel_for_sequences_of_any_lengths_does_what_one_call_a_group_does(
    family: str, checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replace CUDA's kernel by a stand-in with the arguments that torch documents."""
    compute = compute_of(checkpoints(family))
    works = [forward_work(seed, rows, tokens) for seed, (rows, tokens) in enumerate([(1, 7), (2, 3), (1, 3), (1, 12)])]

    def forward_and_backward() -> list[torch.Tensor]:
        done = run(compute, works)
        backs = [backward_work(work, one, seed) for seed, (work, one) in enumerate(zip(works, done, strict=True))]
        return [*tensors(done), *tensors(run(compute, backs))]

    expected = forward_and_backward()
    calls = []

    def stand_in(
        query: torch.Tensor,  # [tokens, heads, dim]
        key: torch.Tensor,
        value: torch.Tensor,
        query_starts: torch.Tensor,
        key_starts: torch.Tensor,
        longest_query: int,
        longest_key: int,
        *,
        scale: float,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> torch.Tensor:
        assert torch.equal(query_starts, key_starts) and query_starts.dtype == torch.int32
        assert longest_query == longest_key == 12 and window_size == (-1, 0)
        calls.append(query_starts.tolist())
        lengths = query_starts.diff().tolist()
        rows = zip(*(tensor.transpose(0, 1).split(lengths, 1) for tensor in (query, key, value)), strict=True)
        each = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa)
            for q, k, v in rows
        ]
        return torch.cat(each, 1).transpose(0, 1)

    monkeypatch.setattr("zsl.trunk.compute.attention._kernel_takes", lambda query, value: True)
    monkeypatch.setattr("zsl.trunk.compute.attention.varlen_attn", stand_in)
    for ours, theirs in zip(forward_and_backward(), expected, strict=True):
        assert within(TOLERANCE)(ours, theirs)
    assert calls == [[0, 3, 6, 9, 16, 28]] * 4, "two layers, forward and backward"


def test_sequences_of_equal_length_are_attended_to_at_once_in_whatever_order_they_stand(
    compute: TorchCompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zsl.trunk.compute.attention._attend", attend := Counted(attention._attend))
    monkeypatch.setattr(torch, "arange", arange := Counted(torch.arange))
    lengths, start = (1, 2) * 30, 0
    in_order: dict[int, list[int]] = {1: [], 2: []}
    for length in lengths:
        in_order[length] += range(start, start + length)
        start += length
    order = torch.tensor(in_order[1] + in_order[2])
    activations = torch.randn(1, start, 32)

    def outputs_and_gradients(lengths: tuple[int, ...], activations: torch.Tensor) -> list[torch.Tensor]:
        sequences = sequences_of(Rows(activations, None, torch.zeros(1, start).long()), Shape(1, start, lengths))
        graph = compute.trunk.graph(sequences)
        return [graph.output.detach(), graph.gradients(activations)]

    alternating = outputs_and_gradients(lengths, activations)
    assert attend.calls == 2 * 2, "layers and lengths"
    assert arange.calls < 30, "no tensor a sequence"
    sorted_by_length = outputs_and_gradients(tuple(sorted(lengths)), activations[:, order])
    for ours, theirs in zip(alternating, sorted_by_length, strict=True):
        assert torch.equal(ours[:, order], theirs)


def test_the_masks_of_a_pass_are_shared_by_its_layers_and_end_with_it(
    compute: TorchCompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    make = attention_by_scores._bias_without_mask

    def remembered(*form: object) -> torch.Tensor:
        bias = make(*form)  # type: ignore[arg-type]
        made.append(weakref.ref(bias))
        return bias

    monkeypatch.setattr("zsl.trunk.compute.attention_by_scores._bias_without_mask", remembered)
    monkeypatch.setattr(compute.trunk.model.config, "_attn_implementation", "sdpa")
    part = sequences_of(Rows(torch.randn(1, 40, 32)), Shape(1, 40, (40,)))
    graph = compute.trunk.graph(packed([part], pass_tokens=64).inputs)
    assert len(made) <= 2, "one for the request, one for the filling"
    assert graph.output.requires_grad and all(bias() is None for bias in made)
    if compute.trunk.model.config.model_type in ("llama", "gpt2"):
        assert made, "the test would show nothing"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_neighbour_of_nan_changes_nothing(compute: TorchCompute, bad: float) -> None:
    works = [forward_work(1), forward_work(2, tokens=5), forward_work(3)]
    poisoned = [works[0], forward_work(2, tokens=5, value=bad), works[2]]
    results = []
    for mix in (works, poisoned):
        done = run(compute, mix)
        backs = [backward_work(work, one, 4) for work, one in zip(mix, done, strict=True)]
        results.append([*tensors(list(done)), *tensors(list(run(compute, backs)))])
    for mine in (0, 2, 3, 5):
        assert torch.equal(results[0][mine], results[1][mine])


def test_a_neighbour_that_leaves_between_forward_and_backward_changes_nothing(compute: TorchCompute) -> None:
    works = [forward_work(seed, tokens=5 + seed) for seed in range(3)]
    expected = [alone(compute, work, seed) for seed, work in enumerate(works)]
    done = run(compute, works)
    backs = [backward_work(works[seed], done[seed], seed) for seed in (0, 2)]
    del done
    for ours, seed in zip(tensors(list(run(compute, backs))), (0, 2), strict=True):
        assert within(TOLERANCE)(ours, expected[seed][1])


def test_a_request_that_fails_in_a_merged_pass_fails_alone(
    compute: TorchCompute, caplog: pytest.LogCaptureFixture
) -> None:
    good = forward_work(1)
    bad = replace(good, buffers={"activations": encode_tensor("activations", torch.randn(1, 8, 31))})
    outcomes = run(compute, [good, bad])
    assert torch.equal(tensors(outcomes[:1])[0], tensors(list(run(compute, [good])))[0])
    assert getattr(outcomes[1], "code", None) == "INTERNAL"
    assert "running them one by one" in caplog.text


def test_linear_outputs_that_the_model_has_written_into_are_not_kept() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).add_(1)

    model = InPlace().requires_grad_(False)
    layers = LinearLayers(model.named_modules())
    with layers.recording(1, 3) as linear_outputs, torch.no_grad():
        model(torch.randn(1, 3, 4))
    assert linear_outputs() is None


def test_the_memory_of_a_graph_is_measured_on_that_graph(compute: TorchCompute) -> None:
    sizes = []
    for rows in (1, 4):
        for _ in range(2):  # the second of a shape is remembered
            (done,) = run(compute, [forward_work(1, rows, keep=Keep.GRAPH)])
            assert isinstance(done, Done) and isinstance(done.stash, TorchStash)
            assert done.stash.shared is not None and done.stash.shared.graph is not None
            nodes = nodes_in(done.stash.shared.graph.output)
            assert nodes > 50
            sizes.append(done.stash.nbytes - NODE_BYTES * nodes - STEP_BYTES)
            demoted = done.stash.demoted()
            assert demoted is not None and done.stash.nbytes > 5 * demoted.nbytes
    assert sizes[0] == sizes[1] and sizes[2] == sizes[3]
    assert 3 < sizes[2] / sizes[0] < 5


def test_a_graph_that_is_dropped_without_a_backward_is_freed(compute: TorchCompute) -> None:
    gc.collect()
    gc.disable()  # so that only reference counts free
    try:
        (done,) = run(compute, [forward_work(1, keep=Keep.GRAPH_AND_LINEAR_OUTPUTS)])
        assert isinstance(done, Done) and isinstance(done.stash, TorchStash)
        assert done.stash.shared is not None and done.stash.shared.graph is not None
        output = weakref.ref(done.stash.shared.graph.output)
        assert output() is not None
        del done
        assert output() is None
    finally:
        gc.enable()
