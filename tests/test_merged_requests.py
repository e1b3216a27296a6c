"""Whatever clients send, and whoever they share a pass with, they get what they get alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from support.compare import within
from support.requests import HIDDEN, MAX_REQUESTS, Request, Trunk, requests, served_trunk
from test_merging import split_randomly
from zsl.trunk.compute.calibrate import PackedForms

# Of the largest value. A trunk of half precision rounds each product by 2**-9, and answers in half precision by itself.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
HALF_TRUNK_TOLERANCE = 0.1

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 2.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 8,
}
ALL, NONE = PackedForms(plain=True, masks=True, restarts=True), PackedForms()
# Family, fields of its configuration, how it is served, and which requests it packs. Those with ALiBi cannot be split.
# Weights so large that attention is not near its mean: what a token may attend to, and where it stands, must show.
SHARP = {"initializer_range": 0.3}
TRUNKS: dict[str, tuple[str, dict[str, Any], dict[str, Any], PackedForms]] = {
    "rotary": ("llama", SHARP, {}, ALL),
    "absolute": ("gpt2", SHARP, {}, ALL),
    "sliding window": ("mistral", SHARP, {}, ALL),
    "soft cap": ("gemma2", {**SHARP, "attn_logit_softcapping": 1.0}, {}, ALL),
    "attention sinks": ("gpt_oss", SHARP, {}, PackedForms(plain=True, masks=True)),
    "mixture of experts": ("mixtral", SHARP, {}, ALL),
    "chunked": ("llama4_text", SHARP, {}, PackedForms(plain=True)),
    "own positions": ("biogpt", SHARP, {}, PackedForms(plain=True, masks=True)),
    "own attention": ("xglm", {"init_std": 0.3}, {}, NONE),
    "rotary by the longest row": ("llama", {**SHARP, "rope_parameters": LONGROPE}, {}, NONE),
    "little memory": ("llama", SHARP, {"stash_memory_bytes": 20_000}, ALL),
    "half precision": ("llama", SHARP, {"dtype": torch.bfloat16}, ALL),
    "deterministic": ("llama", SHARP, {"deterministic": True}, ALL),
    "deterministic, eager": ("gemma2", {**SHARP, "attn_logit_softcapping": 1.0}, {"deterministic": True}, ALL),
}


@pytest.fixture(scope="module", params=TRUNKS)
def trunk(request: pytest.FixtureRequest, checkpoints: Callable[..., Path]) -> Iterator[Trunk]:
    family, changes, how, packs = TRUNKS[request.param]
    with served_trunk(str(checkpoints(family, **changes)), **how) as served:
        traits = served.traits
        assert PackedForms(traits.packs, traits.packs_masks, traits.packs_restarts) == packs
        assert traits.deterministic == how.get("deterministic", False)
        one = Request(torch.ones(1, 2, HIDDEN), torch.ones(1, 2, HIDDEN), None, None, None, True, False, "plain")
        served.forward_together({0: one, 1: one})
        assert (served.largest_pass == 2) == traits.merges, "nothing merges: the test would show nothing"
        yield served


def check_merging(trunk: Trunk, data: st.DataObject) -> None:
    """Compare requests that share passes, forwards with some and backwards with others, with each alone."""
    packs = trunk.traits.packs
    mix: list[Request] = data.draw(st.lists(requests(packs=packs), min_size=2, max_size=MAX_REQUESTS))
    source = random.Random(data.draw(st.integers(0, 2**31)))
    alone = []
    for place, one in enumerate(mix):
        step = trunk.forward_alone(place, one)
        output = step.output.clone()
        alone.append((output, trunk.backward_alone(place, step, one).tensor.clone()))
    steps, outputs, gradients = {}, {}, {}
    for batch in split_randomly(len(mix), source):
        steps.update(trunk.forward_together({place: mix[place] for place in batch}))
    outputs = {place: step.output.clone() for place, step in steps.items()}
    for batch in split_randomly(len(mix), source):
        answers = trunk.backward_together({place: mix[place] for place in batch}, steps)
        gradients.update({place: answer.tensor for place, answer in answers.items()})
    assert trunk.failed_passes.records == []
    for place, one in enumerate(mix):
        if not one.poisoned:
            for ours, theirs in zip((outputs[place], gradients[place]), alone[place], strict=True):
                assert same(trunk, ours, theirs), f"{one}, beside {mix}"


def same(trunk: Trunk, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if trunk.traits.deterministic:
        return torch.equal(ours, theirs)
    tolerance = HALF_TRUNK_TOLERANCE if trunk.half else TOLERANCES[ours.dtype]
    return within(tolerance)(ours.float(), theirs.float())


@settings(max_examples=12, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(data=st.data())
def test_requests_of_any_form_share_passes_and_get_what_they_get_alone(trunk: Trunk, data: st.DataObject) -> None:
    check_merging(trunk, data)
