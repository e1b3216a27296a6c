"""Clients that share passes get the numbers that they get alone."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import zsl
from support import batches
from support.compare import numbers_of, within
from support.daemon import Daemon
from support.models import with_lora
from zsl.client.trunk_client import Answer, read_answer
from zsl.split.cut import parse_cut
from zsl.split.loading import load_trunk_part
from zsl.split.reference import resolve
from zsl.trunk.compute import TorchCompute, TorchStash
from zsl.trunk.middle import Middle
from zsl.trunk.work import Done, Keep, Kind, Work
from zsl.wire.frames import Message
from zsl.wire.tensors import decode_tensor, encode_tensor

TOLERANCE = 1e-5
STEPS = 15


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


@pytest.mark.parametrize("clients", [2, 4])
def test_clients_that_train_at_once_get_the_losses_that_they_get_alone(
    clients: int, serve: Callable[..., Daemon], checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, endpoint = str(checkpoints("llama")), serve("llama").endpoint
    seeds = range(1, clients + 1)
    alone = [train(client_model(path, endpoint, seed), seed) for seed in seeds]
    merged = []

    def note(message: Message) -> Answer:
        answer = read_answer(message)
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


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def compute(request: pytest.FixtureRequest, checkpoints: Callable[..., Path]) -> TorchCompute:
    cut = parse_cut("2:4")
    return TorchCompute(Middle(load_trunk_part(resolve(str(checkpoints(request.param))), cut), cut))


def forward_work(seed: int, rows: int = 1, value: float | None = None, mask: bool = False) -> Work:
    torch.manual_seed(seed)
    activations = torch.randn(rows, 8, 32) if value is None else torch.full((rows, 8, 32), value)
    buffers = {"activations": encode_tensor("activations", activations)}
    if mask:
        ones = torch.ones(rows, 8, dtype=torch.long)
        ones[:, : seed % 4] = 0
        buffers["attention_mask"] = encode_tensor("attention_mask", ones)
    return Work(Kind.FORWARD, buffers, Keep.INPUT)  # type: ignore[arg-type]


def backward_work(done: Done, seed: int) -> Work:
    torch.manual_seed(seed)
    descriptor, _ = done.buffers["activations"]
    gradients = torch.randn(descriptor.shape)
    return Work(Kind.BACKWARD, {"gradients": encode_tensor("gradients", gradients)}, stash=done.stash)


def tensors(outcomes: list[object]) -> list[torch.Tensor]:
    found = []
    for outcome in outcomes:
        assert isinstance(outcome, Done), outcome
        ((descriptor, buffer),) = outcome.buffers.values()
        found.append(decode_tensor(descriptor, buffer).clone())
    return found


@pytest.mark.parametrize("mask", [False, True])
def test_a_merged_pass_gives_each_request_what_it_gets_alone(compute: TorchCompute, mask: bool) -> None:
    works = [forward_work(seed, rows, mask=mask) for seed, rows in ((1, 1), (2, 3), (3, 2))]
    merged, alone = compute.run(works), [compute.run([work])[0] for work in works]
    assert all(within(TOLERANCE)(*pair) for pair in zip(tensors(merged), tensors(alone), strict=True))
    backs = [backward_work(done, seed) for seed, done in enumerate(merged) if isinstance(done, Done)]
    merged_back, alone_back = compute.run(backs), [compute.run([work])[0] for work in backs]
    assert all(within(TOLERANCE)(*pair) for pair in zip(tensors(merged_back), tensors(alone_back), strict=True))


def test_a_backward_from_the_input_is_that_from_the_graph(compute: TorchCompute) -> None:
    """What is kept of a step changes the time of its backward, not a bit of its result."""
    work = forward_work(1)
    gradients = []
    for keep in (Keep.GRAPH, Keep.INPUT):
        (done,) = compute.run([Work(Kind.FORWARD, work.buffers, keep)])
        assert isinstance(done, Done) and done.stash is not None
        assert done.stash.has_graph == (keep is Keep.GRAPH)
        gradients += tensors(compute.run([backward_work(done, 9)]))
    assert torch.equal(*gradients)


def test_a_neighbour_of_nan_changes_nothing(compute: TorchCompute) -> None:
    good = forward_work(1)
    clean = tensors(compute.run([good, forward_work(2)]))[0]
    beside_nan = tensors(compute.run([good, forward_work(2, value=float("nan"))]))[0]
    assert torch.equal(clean, beside_nan)


def test_a_request_that_fails_in_a_merged_pass_fails_alone(
    compute: TorchCompute, caplog: pytest.LogCaptureFixture
) -> None:
    good = forward_work(1)
    bad = Work(Kind.FORWARD, {"activations": encode_tensor("activations", torch.randn(1, 8, 31))}, Keep.INPUT)
    outcomes = compute.run([good, bad])
    assert torch.equal(tensors(outcomes[:1])[0], tensors(compute.run([good]))[0])
    assert getattr(outcomes[1], "code", None) == "INTERNAL"
    assert "running them one by one" in caplog.text


def test_the_memory_of_a_graph_is_measured_on_that_graph(compute: TorchCompute) -> None:
    sizes = []
    for rows in (1, 4):
        (done,) = compute.run([Work(Kind.FORWARD, forward_work(1, rows).buffers, Keep.GRAPH)])
        assert isinstance(done, Done) and done.stash is not None
        sizes.append(done.stash.nbytes)
        assert done.stash.nbytes > 5 * done.stash.without_graph().nbytes
    assert 3 < sizes[1] / sizes[0] < 5


def test_a_graph_that_is_dropped_without_a_backward_is_freed(compute: TorchCompute) -> None:
    gc.collect()
    gc.disable()  # so that only reference counts free
    try:
        (done,) = compute.run([Work(Kind.FORWARD, forward_work(1).buffers, Keep.GRAPH)])
        assert isinstance(done, Done) and isinstance(done.stash, TorchStash) and done.stash.graph is not None
        output = weakref.ref(done.stash.graph.output)
        assert output() is not None
        del done
        assert output() is None
    finally:
        gc.enable()
