"""Try requests behind caches on a loaded trunk, at start: their outputs, their memory, the passes that they share, and
the time that this saves.

Runs a few passes with random inputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from zsl.trunk.compute.calibrate import SEED, Form, is_close, plain, random_request, timed
from zsl.trunk.compute.keys_and_values import KeysAndValues, packed_caches
from zsl.trunk.compute.packing import packed_behind_caches
from zsl.trunk.compute.passes import Rows
from zsl.trunk.compute.trunk_model import TrunkModel
from zsl.trunk.costs import CacheMemory
from zsl.trunk.work import Shape

# Requests behind caches of different lengths: one token, two padded rows, and one without a cache before it.
FORMS = (plain(1, 1), Form(Shape(2, 2, (2, 2)), ((0, 0, 1, 1, 1, 1, 1), (1, 1, 1, 1, 1, 1, 1))), plain(1, 3))
LENGTHS = (3, 5, 0)
# Decode steps whose shared pass is timed, and the tokens behind which they are. The fastest of the repeats counts.
DECODE_STEPS, DECODE_LENGTH, DECODE_REPEATS = 4, 16, 5


def measure_cache_memory(trunk: TrunkModel) -> CacheMemory | None:
    """Test that two rows, one padded, have the outputs of the whole in two parts.

    Return the memory of their keys and values; None if they have not, or if the trunk's layers keep something else.
    """
    cache = trunk.no_keys_and_values()
    if cache is None:
        return None
    form = Form(Shape(2, 5, (5, 5)), ((0, 1, 1, 1, 1), (1, 1, 1, 1, 1)))
    whole = random_request(trunk, form, torch.Generator().manual_seed(SEED))
    mask = whole.attention_mask
    assert mask is not None
    first, second = whole.activations.split((3, 2), dim=1)
    try:
        with trunk.behind(cache):
            outputs = [trunk.forward(Rows(first, mask[:, :3])), trunk.forward(Rows(second, mask))]
        memory = cache.memory(rows=2)
    except Exception:  # any error of the family's code with a cache
        return None
    ours, theirs = (output[mask != 0] for output in (torch.cat(outputs, 1), trunk.forward(whole)))
    return memory if is_close(ours, theirs, _tolerance(trunk)) else None


def merges_caches(trunk: TrunkModel) -> bool:
    """Test that requests behind caches have the same outputs packed as alone."""
    if trunk.mixes_rows or trunk.masks_by_padding:
        return False
    random = torch.Generator().manual_seed(SEED)
    parts = [random_request(trunk, form, random) for form in FORMS]
    alone, caches = [], []
    for part, length in zip(parts, LENGTHS, strict=True):
        prompt = random_request(trunk, plain(part.rows, length), random)
        with trunk.behind(_cache_of(trunk, prompt)):
            alone.append(trunk.forward(part))
        caches.append(_cache_of(trunk, prompt))
    together = packed_behind_caches(parts, LENGTHS)
    try:
        with trunk.behind(packed_caches(caches, parts)):
            found = together.split(trunk.forward(together.inputs))
    except Exception:  # any error of the family's code on a packed row
        return False
    return all(is_close(ours, theirs, _tolerance(trunk)) for ours, theirs in zip(found, alone, strict=True))


def measure_shared_decode(trunk: TrunkModel, clock: Callable[[], float] = time.perf_counter) -> float:
    """Measure the seconds that each decode step saves by sharing a pass with others; 0 if none."""
    random = torch.Generator().manual_seed(SEED)
    steps = [random_request(trunk, plain(1, 1), random) for _ in range(DECODE_STEPS)]
    caches = [_cache_of(trunk, random_request(trunk, plain(1, DECODE_LENGTH), random)) for _ in steps]

    def alone() -> torch.Tensor:
        with trunk.behind(caches[0].behind(DECODE_LENGTH, None)):
            return trunk.forward(steps[0])

    def shared() -> torch.Tensor:
        behind = [cache.behind(DECODE_LENGTH, None) for cache in caches]
        with trunk.behind(packed_caches(behind, steps)):
            return trunk.forward(packed_behind_caches(steps, [DECODE_LENGTH] * DECODE_STEPS).inputs)

    alone_seconds, shared_seconds = (
        min(timed(run, trunk.device, clock)[1] for _ in range(DECODE_REPEATS)) for run in (alone, shared)
    )
    return max((DECODE_STEPS * alone_seconds - shared_seconds) / (DECODE_STEPS - 1), 0.0)


def _cache_of(trunk: TrunkModel, prompt: Rows) -> KeysAndValues:
    """Return the cache behind a prompt, which may be empty."""
    cache = trunk.no_keys_and_values()
    assert cache is not None
    if prompt.tokens:
        with trunk.behind(cache):
            trunk.forward(prompt)
    return cache


def _tolerance(trunk: TrunkModel) -> float:
    return math.sqrt(torch.finfo(trunk.dtype).eps)
