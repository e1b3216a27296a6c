"""Memory: what is held is counted as what the process grows by, and what is freed is given back."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support.daemon import Daemon
from test_merging import forward_work
from zsl.client.trunk_client import TrunkClient
from zsl.errors import TooLargeError
from zsl.split.cut import parse_cut
from zsl.split.stack import find_stack
from zsl.trunk.compute.passes import Rows, sequences_of
from zsl.trunk.costs import GraphMemory, PassMemory
from zsl.trunk.daemon.load import plan_trunk
from zsl.trunk.malloc import IDLE_SECONDS, KEPT_BYTES, TrimPolicy
from zsl.trunk.work import Shape

MIB = 1 << 20
# A request's tensors, its answer, and the daemon's copies of them; what threads and allocator take once.
IN_FLIGHT_BYTES = 24 * MIB

HOLD_MANY_SMALL_STEPS = """
import gc, json, sys
import torch
from zsl.split.cut import parse_cut
from zsl.trunk.daemon.load import plan_trunk
from zsl.trunk.malloc import give_back_freed_memory, keep_freed_memory, resident_bytes
from zsl.trunk.sessions.sessions import Sessions
from zsl.trunk.access.tenants import Tenant
from zsl.trunk.work import Batch, Held, Keep, Kind, Packed, Shape, Work
from zsl.wire.tensors import encode_tensor

keep_freed_memory()
sessions = Sessions(
    lease_seconds=60, max_sessions=1, stash_memory_bytes=1 << 40, new_id=lambda: bytes(16)
)
tenant = Tenant("alice", "key", 1.0, 1, 1, 1 << 40)
torch.set_num_threads(1)
plan = plan_trunk(sys.argv[1], parse_cut("2:4"), torch.float32, "cpu", forward_only=False)
compute = plan.load(max_batch_tokens=256, merge_below_tokens=64)

def stash(keep):
    buffers = {"activations": encode_tensor("activations", torch.randn(1, 1, 32))}
    (done,) = compute.run(Batch((Work(Kind.FORWARD, buffers, Shape(1, 1, (1,)), Packed(), keep),)))
    return done.stash

found = {}
steps_of = {Keep.INPUT: 2000, Keep.LINEAR_OUTPUTS: 400, Keep.GRAPH: 200, Keep.GRAPH_AND_LINEAR_OUTPUTS: 200}
for keep, steps in steps_of.items():
    [stash(keep) for _ in range(20)]
    gc.collect()
    give_back_freed_memory()
    before = resident_bytes()
    session = sessions.open(b"peer", 0.0, tenant=tenant)
    for step in range(steps):
        sessions.hold(session, step, Held(stash(keep), Shape(1, 1, (1,)), Packed()))
    grown, counted = resident_bytes() - before, sessions.held_bytes
    sessions.close(session.id)
    del session
    gc.collect()
    give_back_freed_memory()
    found[keep.name] = counted, grown, resident_bytes() - before
print(json.dumps(found))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("family", ["llama"])
def test_many_small_steps_are_counted_as_what_the_process_grows_by_and_are_given_back(
    family: str, checkpoints: Callable[..., Path]
) -> None:
    command = [sys.executable, "-c", HOLD_MANY_SMALL_STEPS, str(checkpoints(family))]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(ran.stdout)
    assert set(found) == {"INPUT", "LINEAR_OUTPUTS", "GRAPH", "GRAPH_AND_LINEAR_OUTPUTS"}
    for keep, (counted, grown, stays) in found.items():
        assert grown / 2 <= counted <= 3 * grown, (keep, counted, grown)
        assert stays <= max(grown / 4, 8 << 20), (keep, grown, stays)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_memory_of_a_graph_is_known_before_its_pass_and_one_too_large_is_computed_layer_by_layer(
    family: str, checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_trunk(str(checkpoints(family)), parse_cut("2:4"), torch.float32, "cpu", forward_only=False)
    compute = plan.load(max_batch_tokens=256, merge_below_tokens=64, pass_memory_bytes=300_000)
    trunk, memory = compute.trunk, compute.traits.graph_memory
    rows = Rows(torch.randn(1, 60, 32))
    graph, linear_outputs = trunk.graph_to_keep(rows, with_linear_outputs=True)
    assert linear_outputs is not None
    assert memory.nbytes((60,)) == pytest.approx(graph.nbytes + linear_outputs.nbytes, rel=0.05)
    gradients = torch.randn(1, 60, 32)
    mlp_calls: Counter[str] = Counter()
    for name, module in trunk.model.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_pre_hook(lambda *_, name=name: mlp_calls.update([name]))
    packed_rows = sequences_of(rows, Shape(1, 60, (7, 40, 13)))
    for inputs in (rows, packed_rows):
        whole, (by_layers, _) = mlp_calls.copy(), trunk.gradients_by_layers(inputs, gradients)
        assert (mlp_calls - whole).total() == 3, "the first of the two layers is computed again for its gradient"
        assert torch.equal(trunk.graph(inputs).gradients(gradients), by_layers)
    assert compute._fits([forward_work(0, tokens=5)]) and not compute._fits([forward_work(0, tokens=60)])
    most = len(trunk.graph_sizes) + 1
    monkeypatch.setattr("zsl.trunk.compute.graph_sizes.MAX_SIZES_REMEMBERED", most)
    for tokens in (11, 12, 13):
        trunk.graph_to_keep(Rows(torch.randn(1, tokens, 32)), with_linear_outputs=False)
    assert len(trunk.graph_sizes) == most


def is_due(given: TrimPolicy, now: float, *, busy: bool = False, resident_bytes: int = 0) -> bool:
    return given.is_due(now, busy=busy, held_bytes=10, resident_bytes=resident_bytes)


TAKE_A_LARGE_BLOCK_AGAIN = """
import ctypes, resource
from zsl.trunk.malloc import keep_freed_memory

assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(64 << 20)))
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults * resource.getpagesize())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="options of glibc")
def test_a_large_block_that_was_freed_is_taken_again_without_page_faults() -> None:
    command = [sys.executable, "-c", TAKE_A_LARGE_BLOCK_AGAIN]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert int(ran.stdout) < 1 << 20


COUNT_ARENAS_OF_A_DAEMON = """
import ctypes, sys, threading
import zsl.trunk.daemon.process
from zsl.cli.trunkd import trunkd

def count_arenas(options):
    thread = threading.Thread(target=lambda: bytes(100_000))
    thread.start()
    thread.join()
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
    assert libc.malloc_info(0, file) == 0
    libc.fclose(file)

zsl.trunk.daemon.process.run_daemon = count_arenas
trunkd(["--model", "random:llama"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="options of glibc")
def test_all_threads_of_a_daemon_share_one_arena(tmp_path: Path) -> None:
    found = tmp_path / "malloc.xml"
    command = [sys.executable, "-c", COUNT_ARENAS_OF_A_DAEMON, str(found)]
    subprocess.run(command, timeout=60, check=True, stderr=subprocess.DEVNULL)
    assert found.read_text().count("<heap nr=") == 1


def test_freed_memory_is_given_back_once_when_nothing_was_freed_for_a_while() -> None:
    given = TrimPolicy(resident_at_start=100, budget_bytes=2 * KEPT_BYTES)
    assert not is_due(given, 1000.0), "nothing was freed"
    given.freed(1000.0)
    assert not is_due(given, 1000.0 + IDLE_SECONDS / 2)
    assert not is_due(given, 1000.0 + IDLE_SECONDS, busy=True)
    assert is_due(given, 1000.0 + IDLE_SECONDS)
    assert not is_due(given, 1000.0 + 5 * IDLE_SECONDS), "once"


def test_far_more_memory_than_is_held_is_given_back_while_there_is_work_but_not_at_every_look() -> None:
    given, over = TrimPolicy(resident_at_start=100, budget_bytes=2 * KEPT_BYTES), 100 + 10 + KEPT_BYTES + 1
    given.freed(1000.0)
    assert not is_due(given, 1000.0, busy=True, resident_bytes=over - 1)
    assert is_due(given, 1000.0, busy=True, resident_bytes=over)
    assert not is_due(given, 1001.0, busy=True, resident_bytes=over)
    assert is_due(given, 1000.0 + IDLE_SECONDS, busy=True, resident_bytes=over)


def test_memory_over_the_budget_is_given_back_while_there_is_work() -> None:
    given = TrimPolicy(resident_at_start=100, budget_bytes=50)
    given.freed(1000.0)
    assert not is_due(given, 1000.0, busy=True, resident_bytes=150)
    assert is_due(given, 1000.0, busy=True, resident_bytes=151)


@pytest.mark.parametrize("per_pair", [0.0, 0.5])
def test_a_request_is_granted_as_many_tokens_as_a_pass_has_memory_for(per_pair: float) -> None:
    memory = PassMemory(GraphMemory(1000.0, 8.0, per_pair), kept_bytes_per_token=2)
    granted = memory.most_tokens(100_000, 64, least=16, most=32_768)
    assert memory.nbytes_of_rows(granted, 64) <= 100_000 < memory.nbytes_of_rows(granted + 1, 64)
    assert memory.most_tokens(0, 64, least=16, most=32_768) == 16, "there is a least"
    assert memory.most_tokens(1 << 60, 64, least=16, most=32_768) == 32_768


def test_layers_with_something_between_them_are_not_called_separately(checkpoints: Callable[..., Path]) -> None:
    plan = plan_trunk(str(checkpoints("llama")), parse_cut("2:4"), torch.float32, "cpu", forward_only=False)
    trunk = plan.load(max_batch_tokens=256, merge_below_tokens=64).trunk
    rows, gradients = Rows(torch.randn(1, 9, 32)), torch.randn(1, 9, 32)
    plain, _ = trunk.gradients_by_layers(rows, gradients)
    layers = find_stack(trunk.model).layers
    layers[2].register_forward_hook(lambda layer, args, output: output * 2)
    with trunk.separate_layers(rows) as separate:
        assert separate == []
    scaled, _ = trunk.gradients_by_layers(rows, gradients)
    assert torch.equal(scaled, trunk.graph(rows).gradients(gradients))
    assert not torch.equal(scaled, plain)


def kernel_bytes(pid: int, field: str) -> int:
    """A size from the kernel's status of a process: VmRSS now, VmHWM at its peak."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_largest_request_that_is_granted_takes_what_the_daemon_said_and_leaves_no_more_than_its_budget(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8, "max_position_embeddings": 512}
    serving = ("--model", str(checkpoints("llama", **sizes)), "--cut", "1:7", "--threads", "2")
    batches = ("--max-batch-tokens", "512", "--merge-below-tokens", "32")
    budget = 32 * MIB
    with Daemon(*serving, *batches, "--stash-memory", str(budget), log=tmp_path / "log") as daemon:
        pid = daemon.process.pid
        (told,) = re.findall(r"take up to (\d+) MiB", (tmp_path / "log").read_text())
        assert int(told) * MIB > budget
        start = kernel_bytes(pid, "VmRSS")
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew
        with TrunkClient(daemon.endpoint) as trunk:
            granted = trunk.connect().limits.max_request_tokens
            assert granted == 4096
            with pytest.raises(TooLargeError):
                trunk.forward(torch.randn(1, granted + 1, 128))
            small, rows = torch.randn(1, 64, 128), torch.randn(granted // 512, 512, 128)
            others = [trunk.forward(small, keep=True) for _ in range(4)]
            assert trunk.status().held_bytes > budget / 4, "graphs are held"
            forward = trunk.forward(rows, keep=True)
            trunk.backward(forward, torch.randn_like(rows))
            assert trunk.status().held_bytes < 2 * sum(one.nbytes for one in (small,) * len(others))
            peak, stays = kernel_bytes(pid, "VmHWM") - start, kernel_bytes(pid, "VmRSS") - start
    assert peak <= int(told) * MIB + IN_FLIGHT_BYTES, (peak / MIB, told)
    assert stays <= budget + IN_FLIGHT_BYTES, stays / MIB
