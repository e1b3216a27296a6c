"""Adapter memory of a daemon with keys stays below its budget, whatever tenants come and go, with or without a word."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import zsl
from support.adapters import random_version
from support.daemon import Daemon
from support.models import CUT
from support.peer import Peer, forward
from test_access import Keys
from test_leaks import resident_kb
from zsl.client.replayable_step import CallAdapter
from zsl.link.adapter_versions import EncodedAdapter
from zsl.transport.curve_keys import write_key_pair
from zsl.wire.messages import Result

TENANTS = 200
AT_ONCE = 4
VERSIONS = 2  # of a tenant
BUDGET_BYTES = 16 << 20
# Connections, passes and holes of malloc. All adapters together take 300 MB.
RESIDENT_BYTES = 64 << 20
HIDDEN = 32
MODULES = {f"{layer}.self_attn.{name}_proj": (HIDDEN, HIDDEN) for layer in (2, 3) for name in "qo"}


def version(seed: int) -> EncodedAdapter:
    made = random_version(MODULES, seed, rank=256)
    return EncodedAdapter(made.version, made.layout.encoded(), made.dtype, made.weights)


def trains_and_says_bye(endpoint: str, keys: Keys, name: str, number: int) -> None:
    options = {"server_key": keys.public("server"), "client_key": str(keys.secret(name))}
    with zsl.TrunkClient(endpoint, **options) as client:
        x = torch.randn(1, 4, HIDDEN, generator=torch.Generator().manual_seed(number))
        for seed in range(VERSIONS):
            sent = version(TENANTS * seed + number)
            step = client.forward(x, keep=True, adapter=CallAdapter(sent))
            gradients = client.backward(step, x, adapter_gradients=True).adapter_gradients
            assert gradients is not None and gradients.any()


def leaves_without_a_word(endpoint: str, keys: Keys, name: str, number: int) -> None:
    """With whole versions, and one whose last piece never comes."""
    with Peer(endpoint, keys.of(name)) as peer:
        welcome = peer.hello()
        for seed in range(VERSIONS):
            sent = version(TENANTS * seed + number)
            for message in sent.pieces(welcome, seed):
                peer.send(*message)
            named = {"version": sent.digest, "dropout_seed": None}
            assert isinstance(peer.ask(*forward(welcome, seed, hidden=HIDDEN, adapter=named)), Result)
        header, buffers = next(iter(version(-number - 1).pieces(welcome, VERSIONS)))
        first = [
            one.model_copy(update={"shape": (4,), "nbytes": 4}) if one.role == "weights" else one
            for one in header.tensors
        ]
        half = [
            memoryview(part)[:4] if one.role == "weights" else part
            for one, part in zip(header.tensors, buffers, strict=True)
        ]
        peer.send(header.model_copy(update={"tensors": first}), half)
        peer.status()  # so that it has arrived


@pytest.mark.timeout(300)
@pytest.mark.long
def test_two_hundred_tenants_that_come_and_go_leave_the_daemon_within_its_adapter_memory(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    keys, names = Keys(tmp_path), [f"tenant{number}" for number in range(TENANTS)]
    for name in names:
        write_key_pair(tmp_path, name)
    keys.write_list("alice", *names)
    options = ["--model", str(checkpoints("llama")), "--cut", CUT, "--threads", "1", "--max-batch-tokens", "512"]
    options += ["--merge-below-tokens", "64", "--keys", str(tmp_path), "--tenants", str(keys.list)]
    with Daemon(*options, "--adapter-memory", str(BUDGET_BYTES), log=tmp_path / "log") as daemon:
        seen: list[tuple[int, int]] = []
        over = threading.Event()

        def watch() -> None:
            with Peer(daemon.endpoint, keys.of("alice")) as watcher:
                while not over.wait(0.005):
                    seen.append((watcher.status().adapter_bytes, resident_kb(daemon.process.pid) * 1024))

        with ThreadPoolExecutor(AT_ONCE) as tenants, ThreadPoolExecutor(1) as other:
            trains_and_says_bye(daemon.endpoint, keys, "alice", 0)
            start = resident_kb(daemon.process.pid) * 1024
            watching = other.submit(watch)
            ways = (trains_and_says_bye, leaves_without_a_word)
            gone = [
                tenants.submit(ways[number % 2], daemon.endpoint, keys, name, number)
                for number, name in enumerate(names)
            ]
            for one in gone:
                one.result(120)
            over.set()
            watching.result(30)
        most, resident = (max(numbers) for numbers in zip(*seen, strict=True))
        together = 3 * TENANTS * VERSIONS * len(version(0).weights)  # with the copy of the computation, and a sum
        assert BUDGET_BYTES / 2 < most <= BUDGET_BYTES
        assert resident - start < BUDGET_BYTES + RESIDENT_BYTES < together
