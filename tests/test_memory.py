"""Memory: what is held is counted as what the process grows by, and what is freed is given back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from zsl.split.cut import parse_cut
from zsl.trunk.assemble import plan_trunk
from zsl.trunk.memory import IDLE_SECONDS, KEPT_BYTES, GiveBack
from zsl.trunk.passes import Rows, sequences_of
from zsl.trunk.work import Shape

HOLD_MANY_SMALL_STEPS = """
import gc, json, sys
import torch
from zsl.split.cut import parse_cut
from zsl.trunk.assemble import plan_trunk
from zsl.trunk.memory import give_back_freed_memory, keep_freed_memory, resident_bytes
from zsl.trunk.work import Batch, Keep, Kind, Packed, Shape, Work
from zsl.wire.tensors import encode_tensor

keep_freed_memory()
torch.set_num_threads(1)
plan = plan_trunk(sys.argv[1], parse_cut("2:4"), torch.float32, "cpu", forward_only=False)
compute = plan.load(max_batch_tokens=256, merge_below_tokens=64)

def stash(keep):
    buffers = {"activations": encode_tensor("activations", torch.randn(1, 1, 32))}
    (done,) = compute.run(Batch((Work(Kind.FORWARD, buffers, Shape(1, 1, (1,)), Packed(), keep),)))
    return done.stash

found = {}
for keep, steps in ((Keep.INPUT, 2000), (Keep.PRODUCTS, 400), (Keep.GRAPH, 200), (Keep.GRAPH_AND_PRODUCTS, 200)):
    [stash(keep) for _ in range(20)]
    gc.collect()
    give_back_freed_memory()
    before = resident_bytes()
    held = [stash(keep) for _ in range(steps)]
    grown, counted = resident_bytes() - before, sum(one.nbytes for one in held)
    del held
    gc.collect()
    give_back_freed_memory()
    found[keep.name] = counted, grown, resident_bytes() - before
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("family", ["llama"])
def test_many_small_steps_are_counted_as_what_the_process_grows_by_and_are_given_back(
    family: str, checkpoints: Callable[..., Path]
) -> None:
    command = [sys.executable, "-c", HOLD_MANY_SMALL_STEPS, str(checkpoints(family))]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(ran.stdout)
    assert set(found) == {"INPUT", "PRODUCTS", "GRAPH", "GRAPH_AND_PRODUCTS"}
    for keep, (counted, grown, stays) in found.items():
        assert grown / 2 <= counted <= 3 * grown, (keep, counted, grown)
        assert stays <= max(grown / 4, 8 << 20), (keep, grown, stays)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_memory_of_a_graph_is_known_before_its_pass_and_one_too_large_is_computed_layer_by_layer(
    family: str, checkpoints: Callable[..., Path]
) -> None:
    plan = plan_trunk(str(checkpoints(family)), parse_cut("2:4"), torch.float32, "cpu", forward_only=False)
    compute = plan.load(max_batch_tokens=256, merge_below_tokens=64, pass_memory_bytes=300_000)
    middle, memory = compute._middle, compute.traits.graph_memory
    rows = Rows(torch.randn(1, 60, 32))
    graph, products = middle.graph_to_keep(rows, with_products=True)
    assert products is not None
    assert memory.nbytes((60,)) == pytest.approx(graph.nbytes + products.nbytes, rel=0.05)
    gradients = torch.randn(1, 60, 32)
    mlp_calls: Counter[str] = Counter()
    for name, module in middle._model.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_pre_hook(lambda *_, name=name: mlp_calls.update([name]))
    packed_rows = sequences_of(rows, Shape(1, 60, (7, 40, 13)))
    for inputs in (rows, packed_rows):
        whole, by_layers = mlp_calls.copy(), middle.gradients_by_layers(inputs, gradients)
        assert (mlp_calls - whole).total() == 3, "the first of the two layers is computed again for its gradient"
        assert torch.equal(middle.graph(inputs).gradients(gradients), by_layers)
    assert compute._fits((5,)) and not compute._fits((60,))


def is_due(given: GiveBack, now: float, *, busy: bool = False, resident_bytes: int = 0) -> bool:
    return given.is_due(now, busy=busy, held_bytes=10, resident_bytes=resident_bytes)


def test_freed_memory_is_given_back_once_when_nothing_was_freed_for_a_while() -> None:
    given = GiveBack(resident_at_start=100)
    assert not is_due(given, 1000.0), "nothing was freed"
    given.freed(1000.0)
    assert not is_due(given, 1000.0 + IDLE_SECONDS / 2)
    assert not is_due(given, 1000.0 + IDLE_SECONDS, busy=True)
    assert is_due(given, 1000.0 + IDLE_SECONDS)
    assert not is_due(given, 1000.0 + 5 * IDLE_SECONDS), "once"


def test_far_more_memory_than_is_held_is_given_back_while_there_is_work_but_not_at_every_look() -> None:
    given, over = GiveBack(resident_at_start=100), 100 + 10 + KEPT_BYTES + 1
    given.freed(1000.0)
    assert not is_due(given, 1000.0, busy=True, resident_bytes=over - 1)
    assert is_due(given, 1000.0, busy=True, resident_bytes=over)
    assert not is_due(given, 1001.0, busy=True, resident_bytes=over)
    assert is_due(given, 1000.0 + IDLE_SECONDS, busy=True, resident_bytes=over)
