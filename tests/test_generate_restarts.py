"""Fifty texts, some at once, while the daemon is killed or short of memory: each is the undisturbed one."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

import zsl
from support import batches
from support.echo import EchoServer
from support.faulty_link import FaultyLink
from support.killable import Killable
from support.models import CUT, local_model, with_lora
from zsl.errors import TooLargeError
from zsl.generation.sampling import Chooser, Sampling
from zsl.split.cut import parse_cut
from zsl.trunk.daemon.load import plan_trunk
from zsl.trunk.settings import ServerSettings

TEXTS, AT_ONCE, TOKENS = 50, 5, 12
PROMPT = 8
WAYS: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"seed": 1}, {"prompt_lookup_num_tokens": 3}, {}]
KILLS = 5
CONNECT_SECONDS = 300.0  # a daemon starts meanwhile
# Keys and values of the cut's two layers, of 2 heads of 8, in single precision; before a token and after it.
BYTES_OF_A_ROW = 2 * 2 * (PROMPT + TOKENS) * 2 * 2 * 8 * 4

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


class Counted(LogitsProcessor):
    """Counts the tokens of all texts, and calls something with each number."""

    def __init__(self, act: Callable[[int], None]) -> None:
        self._lock, self._count, self._act = threading.Lock(), 0, act

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        with self._lock:
            self._count += 1
            count = self._count
        self._act(count)
        return scores


def text(model: Any, number: int, counted: Counted | None = None, **how: Any) -> list[int]:
    ids, how = batches.tokens(1, PROMPT, number), {**WAYS[number % len(WAYS)], **how}
    seed = how.pop("seed", None)
    processors = [] if counted is None else [counted]
    if seed is not None:  # with a generator of its own, as threads share torch's
        processors.append(Chooser(Sampling(1.0, 1.0, seed + number)))  # type: ignore[arg-type]
    kwargs = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **how}
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), logits_processor=processors, **kwargs)
    tokens: list[int] = found[0].tolist()
    return tokens


@pytest.fixture(scope="module")
def path(checkpoints: Callable[..., Path]) -> str:
    return str(checkpoints("llama", initializer_range=0.3))


@pytest.fixture(scope="module")
def expected(path: str) -> list[list[int]]:
    whole = with_lora(local_model(path), layers=range(6)).eval()
    texts = [text(whole, number) for number in range(TEXTS)]
    assert len(set(map(tuple, texts))) == TEXTS, "texts that are alike would hide a mix-up"
    return texts


def written(path: str, endpoint: str, counted: Counted, too_large: Collection[int] = ()) -> list[list[int] | None]:
    """Write all texts, each in a session of its own. None: refused, as is wanted of these."""

    def write(number: int) -> list[int] | None:
        with zsl.RemoteTrunk(endpoint, connect_timeout_seconds=CONNECT_SECONDS) as trunk:
            with loading:
                model = with_lora(zsl.load_client(path, trunk), layers=range(6)).eval()
            if number not in too_large:
                return text(model, number, counted)
            with pytest.raises(TooLargeError, match="--cache-memory"):
                text(model, number, num_beams=8)
            return None

    loading = threading.Lock()  # `with_lora` draws from torch's generator
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(write, range(TEXTS)))


def test_a_daemon_that_is_killed_again_and_again_changes_no_text(path: str, expected: list[list[int]]) -> None:
    kills = set(random.Random(0).sample(range(TOKENS, TEXTS * TOKENS * 3 // 4), KILLS))
    running = [Killable(path)]
    try:
        with FaultyLink(running[0].port) as link:

            def act(count: int) -> None:
                if count in kills:
                    running[-1].kill()
                    running.append(Killable(path))
                    link.retarget(running[-1].port)

            assert written(path, link.endpoint, Counted(act)) == expected
    finally:
        running[-1].kill()
    assert len(running) == 1 + KILLS


def test_too_little_memory_and_lost_keys_and_values_change_no_text(path: str, expected: list[list[int]]) -> None:
    """Five texts at once, one of which has three rows, do not all fit; one of eight rows never does."""
    budget, chance = 6 * BYTES_OF_A_ROW, random.Random(0)
    too_large = range(4, TEXTS, 10)
    plan = plan_trunk(path, parse_cut(CUT), torch.float32, "cpu", forward_only=False)
    held: list[int] = []
    with (
        EchoServer(
            compute=plan.load(max_batch_tokens=64, merge_below_tokens=16),
            model=plan.info.model,
            cut=plan.info.cut,
            row_tokens=plan.info.max_row_tokens,
            settings=ServerSettings(cache_memory_bytes=budget),
        ) as server,
        zsl.TrunkClient(server.endpoint) as observer,
    ):

        def act(count: int) -> None:
            held.append(observer.status().cache_bytes)
            if chance.random() < 0.1:
                session = chance.choice(list(server.server.sessions))
                server.loop.call_soon_threadsafe(server.server.caches.close, session)

        found = written(path, server.endpoint, Counted(act), too_large)
    assert found == [None if number in too_large else one for number, one in enumerate(expected)]
    assert budget / 2 < max(held) <= budget
