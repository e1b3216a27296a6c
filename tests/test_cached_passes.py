"""Requests behind caches that share a pass get what they get alone, and a pass that fails changes no cache."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.adapters import random_version
from support.compare import within
from test_merging import compute_of
from zsl.errors import InternalError
from zsl.trunk.adapter import AdapterUse
from zsl.trunk.compute.engine import TorchCompute
from zsl.trunk.compute.try_caches import DECODE_REPEATS, measure_shared_decode
from zsl.trunk.work import Alone, Batch, BehindCache, CacheUse, Done, Kind, Shape, Sharing, Work
from zsl.wire.tensors import decode_tensor, encode_tensor

HIDDEN = 32
FAMILIES = ["llama", "gemma2", *(pytest.param(one, marks=pytest.mark.long) for one in ("gpt2", "mistral", "gpt_oss"))]
UNMERGED = ["llama4_text", pytest.param("xglm", marks=pytest.mark.long)]


@pytest.fixture(scope="module", params=FAMILIES)
def compute(request: pytest.FixtureRequest, checkpoints: Callable[..., Path]) -> TorchCompute:
    found = compute_of(checkpoints(request.param))
    assert found.traits.cache_memory is not None and found.traits.merges_caches
    found.trunk.most_swapped_rows = 8  # whatever was measured, so that passes of both kinds are drawn
    return found


@pytest.mark.parametrize("family", UNMERGED)
def test_a_family_whose_requests_cannot_be_told_apart_keeps_caches_and_merges_none(
    family: str, checkpoints: Callable[..., Path]
) -> None:
    traits = compute_of(checkpoints(family)).traits
    assert traits.cache_memory is not None and not traits.merges_caches


@pytest.mark.parametrize(
    ("alone_seconds", "shared_seconds", "saved"), [(2.0, 2.0, 2.0), (2.0, 5.0, 1.0), (1.0, 5.0, 0.0)]
)
def test_a_decode_step_saves_its_part_of_what_four_alone_take_longer_than_together(
    alone_seconds: float, shared_seconds: float, saved: float, compute: TorchCompute
) -> None:
    passes = [alone_seconds] * DECODE_REPEATS + [shared_seconds] * DECODE_REPEATS
    times = iter([time for at, seconds in enumerate(passes) for time in (10.0 * at, 10.0 * at + seconds)])
    assert measure_shared_decode(compute.trunk, times.__next__) == pytest.approx(saved)


class Text:
    """A session's requests, one behind the other, with random edits of its cache between them."""

    def __init__(self, compute: TorchCompute, seed: int, steps: int) -> None:
        source = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        adapter = random_version(compute.traits.adaptable, seed, rank=1 + seed % 5) if seed % 3 else None
        rows, length, last, mask = source.randint(1, 3), 0, 0, None
        if source.random() < 0.4:
            mask = torch.ones(rows, 0, dtype=torch.bool)
        self.requests: list[dict[str, Any]] = []
        for step in range(steps):
            tokens = source.randint(2, 9) if step == 0 else source.choice([1, 1, 1, 3])
            chosen = None
            if step and source.random() < 0.3:
                chosen = tuple(source.randrange(rows) for _ in range(source.randint(1, 3)))
                rows = len(chosen)
                mask = None if mask is None else mask[list(chosen)]
            if step and source.random() < 0.3 and last > 1:
                length -= 1
                mask = None if mask is None else mask[:, :-1]
            last = tokens
            if mask is not None:
                new = torch.ones(rows, tokens, dtype=torch.bool)
                if step == 0:
                    new[:, : tokens // 2] = torch.rand(rows, tokens // 2, generator=generator) < 0.5
                mask = torch.cat([mask, new], 1)
            activations = torch.randn(rows, tokens, HIDDEN, generator=generator)
            tensors = {"activations": activations, "attention_mask": mask}
            if source.random() < 0.5:
                tensors["position_ids"] = torch.arange(length, length + tokens).unsqueeze(0)
            given: dict[Any, torch.Tensor] = {role: one for role, one in tensors.items() if one is not None}
            buffers = {role: encode_tensor(role, one) for role, one in given.items()}
            self.requests.append(
                {
                    "buffers": buffers,
                    "shape": Shape(rows, tokens, (tokens,) * rows),
                    "length": length,
                    "rows": chosen,
                    "adapter": None if adapter is None else AdapterUse(adapter),
                }
            )
            length += tokens

    def length_after(self, step: int) -> int:
        request = self.requests[step]
        return int(request["length"] + request["shape"].tokens)

    def work(self, step: int, kept: object | None, sharing: Sharing) -> Work:
        request = self.requests[step]
        cache = CacheUse(1, kept, request["length"], request["rows"], 0, 0)
        return Work(Kind.DECODE, request["buffers"], request["shape"], sharing, adapter=request["adapter"], cache=cache)


def output(done: object) -> torch.Tensor:
    assert isinstance(done, Done), done
    return decode_tensor(*done.buffers["activations"]).clone()


def alone(compute: TorchCompute, text: Text) -> list[torch.Tensor]:
    """The outputs, while the caches hold what is counted for them."""
    kept, outputs, memory = None, [], compute.traits.cache_memory
    assert memory is not None
    for step, request in enumerate(text.requests):
        before = storages(kept)
        (done,) = compute.run(Batch((text.work(step, kept, Alone()),)))
        outputs.append(output(done))
        kept = done.kept  # type: ignore[union-attr]
        rows, length, new = request["shape"].rows, request["length"], request["shape"].tokens
        after = storages(kept)
        assert sum(after.values()) == memory.nbytes(rows, length + new, new)
        if step and request["rows"] is None and length == text.length_after(step - 1):
            added = sum(nbytes for place, nbytes in after.items() if place not in before)
            assert added <= memory.added_nbytes(rows, length + new, new)
    return outputs


def storages(kept: object | None) -> dict[int, int]:
    """The bytes of the memory that a cache holds, by address."""
    layers = () if kept is None else kept.layers  # type: ignore[attr-defined]
    found = [one.untyped_storage() for layer in layers for one in (layer.keys, layer.values)]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def test_the_tokens_of_a_text_are_copied_at_fewer_than_half_of_the_new_ones(compute: TorchCompute) -> None:
    buffers = {"activations": encode_tensor("activations", torch.randn(1, 1, HIDDEN))}
    work = Work(Kind.DECODE, buffers, Shape(1, 1, (1,)), Alone())
    kept: Any = None
    moves, place = 0, None
    for length in range(40):
        (done,) = compute.run(Batch((replace(work, cache=CacheUse(1, kept, length, None, 0, 0)),)))
        kept = done.kept  # type: ignore[union-attr]
        now = kept.layers[-1].keys.untyped_storage().data_ptr()
        moves, place = moves + (now != place), now
    assert moves < 20  # each token was copied at 40; the room for more grows with the text, or is that of a window


@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 6)), min_size=2, max_size=5), st.integers(0, 10_000))
def test_texts_that_share_passes_get_what_they_get_alone(
    compute: TorchCompute, drawn: list[tuple[int, int]], seed: int
) -> None:
    source = random.Random(seed)
    texts = [Text(compute, *one) for one in drawn]
    expected = [alone(compute, text) for text in texts]
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    kept: list[object | None] = [None] * len(texts)
    while waiting := [index for index, text in enumerate(texts) if len(found[index]) < len(text.requests)]:
        chosen = source.sample(waiting, source.randint(1, len(waiting)))
        works = [texts[index].work(len(found[index]), kept[index], BehindCache()) for index in chosen]
        for index, done in zip(chosen, compute.run(Batch(tuple(works))), strict=True):
            found[index].append(output(done))
            kept[index] = done.kept  # type: ignore[union-attr]
    for ours, theirs in zip(found, expected, strict=True):
        assert all(within(1e-5)(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_request_that_fails_leaves_its_cache_and_those_of_its_neighbours_as_they_were(
    checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = compute_of(checkpoints("llama"))
    texts = [Text(compute, seed, 2) for seed in (1, 2)]
    expected = [alone(compute, text) for text in texts]
    kept = [compute.run(Batch((text.work(0, None, Alone()),)))[0].kept for text in texts]  # type: ignore[union-attr]
    works = tuple(text.work(1, cache, BehindCache()) for text, cache in zip(texts, kept, strict=True))
    with monkeypatch.context() as patch:
        patch.setattr(compute, "_replies", lambda *_: 1 / 0)
        assert all(isinstance(outcome, InternalError) for outcome in compute.run(Batch(works)))
    for work, theirs in zip(works, expected, strict=True):
        (done,) = compute.run(Batch((replace(work, sharing=Alone()),)))
        assert torch.equal(output(done), theirs[1])
