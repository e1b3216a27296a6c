"""Bytes that leave the client, and parameters that it never allocates."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest
import torch

import zsl
from support import batches
from support.compare import numbers_of
from support.daemon import Daemon
from support.embedded import served
from support.models import LAYERS, with_lora
from support.relay import Relay

INTEGER_TYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)


def encodings(ids: torch.Tensor) -> list[bytes]:
    """The bytes of the first four ids in every integer type that can hold them, both byte orders, and as text."""
    found = []
    for dtype in INTEGER_TYPES:
        array = ids[:4].to(dtype).numpy()
        found += [array.tobytes(), array.byteswap().tobytes()]
    return [*found, " ".join(map(str, ids[:4].tolist())).encode(), msgpack.packb(ids[:4].tolist())[1:]]


def test_no_frame_holds_token_ids_or_labels(checkpoints: Callable[..., Path]) -> None:
    path = str(checkpoints("llama"))
    batch = batches.padded("right")
    # Unlike the ids, so that each is searched for.
    labels = batches.tokens(3, 16, seed=5).masked_fill(batch["attention_mask"] == 0, -100)
    with served(path) as endpoint, Relay(endpoint) as relay:
        trunk = zsl.RemoteTrunk(relay.endpoint)
        numbers_of(with_lora(zsl.load_client(path, trunk)), {**batch, "labels": labels})
        trunk.close()
        sent = relay.from_client
    # Ones that were real: activations, mask and gradients went through the relay.
    roles = [t["role"] for f in sent if len(f) > 40 for t in _tensors_of(f)]
    assert {"activations", "position_ids", "lengths", "gradients"} == set(roles)
    for row in [*batch["input_ids"], *labels]:
        for encoded in encodings(row):
            assert not any(encoded in frame for frame in sent)


def test_the_search_would_find_ids() -> None:
    """So that the test before this one could fail."""
    ids = batches.tokens(1, 16)[0]
    assert any(encoded in ids.numpy().tobytes() for encoded in encodings(ids))
    assert any(encoded in msgpack.packb({"ids": ids.tolist()}) for encoded in encodings(ids))


def _tensors_of(frame: bytes) -> list[dict[str, object]]:
    try:
        header = msgpack.unpackb(frame)
    except ValueError:
        return []
    return header.get("tensors", []) if isinstance(header, dict) else []


PEAK_OF_A_CLIENT = """
import resource, sys, torch
import zsl
from zsl.models.identity import identify
from zsl.models.reference import resolve

path, endpoint = sys.argv[1:]
reference = resolve(path)
identify(reference)  # reads the whole file once, so that this memory is in the base line
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.zeros(64, 64) @ torch.zeros(64, 64)
trunk = zsl.RemoteTrunk(endpoint)
before = peak()
model = zsl.load_client(reference, trunk)
ids = torch.arange(16).view(1, 16)
model(input_ids=ids, labels=ids).loss.backward()
owned = sum(p.untyped_storage().nbytes() for p in model.parameters())  # ghosts of the trunk's weights among them
print(peak() - before, owned)
"""


@pytest.mark.long
def test_the_client_process_never_allocates_the_trunks_parameters(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """A client of two small layers beside a trunk of 200 MB: the peak of the process stays far below the trunk."""
    path = checkpoints(
        "llama", hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_key_value_heads=16
    )
    whole = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    cut = f"1:{LAYERS}"
    with Daemon("--model", str(path), "--cut", cut, log=tmp_path / "daemon.log") as daemon:
        trunk_bytes = daemon.ready["parameters"] * 4
        arguments = [sys.executable, "-c", PEAK_OF_A_CLIENT, str(path), daemon.endpoint]
        finished = subprocess.run(arguments, capture_output=True, text=True, timeout=100, check=False)
    assert finished.returncode == 0, finished.stderr
    peak, owned = map(int, finished.stdout.split())
    assert trunk_bytes > 300_000_000
    assert owned + trunk_bytes <= whole * 1.01
    assert peak < trunk_bytes / 2, f"{peak:,} bytes at the peak beside a trunk of {trunk_bytes:,}"
