"""Whatever happens to the keys and values at the daemon, the text is that of the whole local model."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel

import zsl
from support import batches
from support.compare import within
from support.daemon import Daemon
from support.echo import EchoServer
from support.faulty_link import FaultyLink
from support.killable import Killable
from support.models import CUT, local_model, with_lora
from support.requests import HIDDEN
from support.waiting import wait_until
from zsl.client.replayable_step import Answer, read_answer
from zsl.client.trunk_cache import MAX_LOSSES
from zsl.errors import ModelError, OverloadedError, TooLargeError
from zsl.split.cut import parse_cut
from zsl.trunk.daemon.load import plan_trunk
from zsl.trunk.sessions.sessions import Session
from zsl.trunk.settings import ServerSettings
from zsl.trunk.work import CacheUse
from zsl.wire.frames import Message
from zsl.wire.messages import Role

SHARP = {"initializer_range": 0.3}
TOKENS = 16
LENGTH = 8 + TOKENS
WAIT_SECONDS = 30

until = partial(wait_until, WAIT_SECONDS)


class At(LogitsProcessor):
    """Calls something once, before the token of this number."""

    def __init__(self, token: int, act: Callable[[], None]) -> None:
        self._left, self._act = token, act

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self._left -= 1
        if self._left == 0:
            self._act()
        return scores


def text(model: Any, seed: int = 0, at: LogitsProcessor | None = None, **how: Any) -> list[int]:
    ids = batches.tokens(1, 8, seed)
    kwargs = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **how}
    processors = [] if at is None else [at]
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), logits_processor=processors, **kwargs)
    return found[0].tolist()


@pytest.fixture(scope="module")
def path(checkpoints: Callable[..., Path]) -> str:
    return str(checkpoints("llama", **SHARP))


@pytest.fixture(scope="module")
def whole(path: str) -> PreTrainedModel:
    return with_lora(local_model(path), layers=range(6)).eval()


@contextmanager
def server_of(path: str, cache_memory_bytes: int = 1 << 30) -> Iterator[EchoServer]:
    """The trunk of a checkpoint in this process, whose store can be looked into."""
    plan = plan_trunk(path, parse_cut(CUT), torch.float32, "cpu", forward_only=False)
    with EchoServer(
        compute=plan.load(max_batch_tokens=64, merge_below_tokens=16),
        model=plan.info.model,
        cut=plan.info.cut,
        row_tokens=plan.info.max_row_tokens,
        settings=ServerSettings(cache_memory_bytes=cache_memory_bytes),
    ) as server:
        yield server


@contextmanager
def split_model(path: str, endpoint: str, **how: Any) -> Iterator[Any]:
    with zsl.RemoteTrunk(endpoint, **how) as trunk:
        yield with_lora(zsl.load_client(path, trunk), layers=range(6)).eval()


def trunk_of(model: Any) -> zsl.RemoteTrunk:
    return next(module for module in model.modules() if isinstance(module, zsl.RemoteTrunk))


@pytest.fixture(scope="module")
def served(path: str) -> Iterator[tuple[EchoServer, Any]]:
    with server_of(path) as server, split_model(path, server.endpoint) as split:
        yield server, split


@pytest.mark.long
def test_a_daemon_that_is_killed_within_a_text_costs_time_only(
    path: str, whole: PreTrainedModel, tmp_path: Path
) -> None:
    arguments = ["--model", path, "--cut", CUT, "--threads", "1"]
    with Daemon(*arguments, log=tmp_path / "first.log") as first, FaultyLink(first.port) as link:
        with split_model(path, link.endpoint, connect_timeout_seconds=60) as split:
            second = Daemon(*arguments, log=tmp_path / "second.log")

            def replace() -> None:
                first.kill()
                link.retarget(second.start().port)

            try:
                assert text(split, at=At(7, replace), num_beams=3) == text(whole, num_beams=3)
            finally:
                second.__exit__(None, None, None)


@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "beams", "lookup"]
)
def test_keys_and_values_that_are_lost_after_each_request_change_no_token(
    served: tuple[EchoServer, Any], whole: PreTrainedModel, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, split = served
    caches = server.server.caches
    end_request = caches.end_request

    def end_and_lose(session: Session, use: CacheUse, kept: object | None, **sizes: int) -> None:
        end_request(session, use, kept, **sizes)
        caches.close(session)

    monkeypatch.setattr(caches, "end_request", end_and_lose)
    assert text(split, **how) == text(whole, **how)


def test_tokens_of_other_adapters_are_computed_again_with_theirs(
    served: tuple[EchoServer, Any], whole: PreTrainedModel
) -> None:
    """The second part runs without its adapter; before the third everything is lost."""
    server, split = served
    ids, results = batches.tokens(1, 12), []
    for model in (split, whole):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids[:, :5], past_key_values=cache, use_cache=True)
            with model.disable_adapter():
                model(input_ids=ids[:, 5:9], past_key_values=cache, use_cache=True)
            for session in list(server.server.sessions):
                server.loop.call_soon_threadsafe(server.server.caches.close, session)
            results.append(model(input_ids=ids[:, 9:], past_key_values=cache, use_cache=True).logits)
    assert within(1e-5)(*results)


def test_a_session_that_ends_within_a_text_changes_no_token(
    served: tuple[EchoServer, Any], whole: PreTrainedModel
) -> None:
    server, split = served
    session = trunk_of(split).client.welcome.session
    assert text(split, at=At(5, lambda: server.close_session(session))) == text(whole)


def test_the_memory_is_free_again_when_a_text_is_done(served: tuple[EchoServer, Any]) -> None:
    server, split = served
    held = []
    text(split, at=At(9, lambda: held.append(server.server.caches.nbytes)))
    gc.collect()
    assert held[0] > 0
    until(lambda: server.server.caches.nbytes == 0)


async def test_the_asyncio_face_runs_behind_its_own_cache(served: tuple[EchoServer, Any]) -> None:
    activations = torch.randn(3, 7, HIDDEN, generator=torch.Generator().manual_seed(1))
    async with zsl.AsyncTrunkClient(served[0].endpoint) as client:
        cache = client.new_cache()
        assert client.has(cache)
        await client.forward(activations[:, :5], cache=cache)
        behind = await client.forward(activations[[2, 0], 5:], cache=cache, rows=[2, 0])
        whole = await client.forward(activations)
        assert cache.length == 7 and within(1e-5)(behind.output, whole.output[[2, 0], 5:])


def send_in_pieces(split: Any, monkeypatch: pytest.MonkeyPatch, tokens: int = 3) -> None:
    """Make the client send at most so many tokens in a request."""
    client = trunk_of(split).client
    limits = client.welcome.limits.model_copy(update={"max_request_tokens": tokens})
    monkeypatch.setattr(client._connection, "_welcome", client.welcome.model_copy(update={"limits": limits}))


def test_a_prompt_longer_than_a_request_comes_in_pieces(
    served: tuple[EchoServer, Any], whole: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, split = served
    send_in_pieces(split, monkeypatch)
    assert text(split) == text(whole)


@contextmanager
def losing(server: EchoServer, lost: set[int] | None) -> Iterator[list[int]]:
    """Lose all keys and values after the requests of these numbers (None: after each). Yield the numbers so far."""
    caches = server.server.caches
    end_request, numbers = caches.end_request, []

    def end_and_lose(session: Session, use: CacheUse, kept: object | None, **sizes: int) -> None:
        end_request(session, use, kept, **sizes)
        numbers.append(len(numbers) + 1)
        if lost is None or numbers[-1] in lost:
            caches.close(session)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(caches, "end_request", end_and_lose)
        yield numbers


def test_pieces_that_are_lost_between_each_other_change_no_token(
    served: tuple[EchoServer, Any], whole: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt of eight tokens takes three requests: twice the first is lost, then the second, then all of a text."""
    server, split = served
    send_in_pieces(split, monkeypatch)
    lost = {1, 2, 4, 12, 13, 15}
    with losing(server, lost) as numbers:
        assert text(split) == text(whole)
    assert numbers[-1] > max(lost)


def test_pieces_that_are_always_lost_end_in_an_error_that_names_the_memory_and_the_next_text_is_right(
    served: tuple[EchoServer, Any], whole: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, split = served
    send_in_pieces(split, monkeypatch)
    monkeypatch.setattr("zsl.client.trunk_cache.LONGEST_PAUSE_SECONDS", 0.0)
    with losing(server, None) as numbers:
        with pytest.raises(OverloadedError, match="--cache-memory"):
            text(split)
    assert len(numbers) == 1 + MAX_LOSSES
    assert text(split) == text(whole)


def test_texts_of_one_session_that_take_each_others_memory_in_turn_all_end(
    path: str, whole: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each needs several requests to be computed again, and the memory has room for two of sixteen."""
    budget, count = 5 * _bytes_of_a_text(path) // 2, 16
    with server_of(path, budget) as server, split_model(path, server.endpoint) as split:
        send_in_pieces(split, monkeypatch)
        barrier = threading.Barrier(count)

        def write(seed: int) -> list[int]:
            barrier.wait(WAIT_SECONDS)
            return text(split, seed)

        with ThreadPoolExecutor(count) as threads:
            found = list(threads.map(write, range(count)))
        assert found == [text(whole, seed) for seed in range(count)]


@pytest.mark.long
def test_a_daemon_that_is_killed_between_pieces_changes_no_token(
    path: str, whole: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill behind the second piece of the prompt, and one behind the second of the text that is computed again."""
    running, kills, sent = [Killable(path)], {2, 12}, []

    def answered(message: Message, role: Role, **how: Any) -> Answer:
        sent.append(message)
        if len(sent) in kills:
            running[-1].kill()
            running.append(Killable(path))
            link.retarget(running[-1].port)
        return read_answer(message, role, **how)

    try:
        with FaultyLink(running[0].port) as link:
            with split_model(path, link.endpoint, connect_timeout_seconds=300) as split:
                send_in_pieces(split, monkeypatch)
                monkeypatch.setattr("zsl.client.trunk_client.read_answer", answered)
                assert text(split) == text(whole)
    finally:
        running[-1].kill()
    assert len(running) == 1 + len(kills)


@pytest.mark.parametrize("lost", [set(), {5}, {5, 6}], ids=["kept", "lost", "lost twice"])
@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_the_memory_is_free_when_a_text_ends_without_the_garbage_collector(
    served: tuple[EchoServer, Any], lost: set[int], fails: bool
) -> None:
    server, split = served
    until(lambda: gc.collect() >= 0 and server.server.caches.nbytes == 0)
    gc.disable()
    try:
        with losing(server, lost):
            if fails:
                with pytest.raises(TooLargeError) as failed, pytest.MonkeyPatch.context() as patched:
                    text(split, at=At(9, lambda: patched.setattr(server.server.caches, "_memory_bytes", 0)))
                assert failed.value is not None
            else:
                text(split)
        until(lambda: server.server.caches.nbytes == 0)
    finally:
        gc.enable()


def test_more_texts_than_fit_into_the_memory_wait_for_each_other(path: str, whole: PreTrainedModel) -> None:
    bytes_of_a_text = _bytes_of_a_text(path)
    budget = 5 * bytes_of_a_text // 2
    seen: list[int] = []
    with server_of(path, budget) as server, ExitStack() as stack:

        def write(seed: int) -> list[int]:
            barrier.wait(WAIT_SECONDS)
            return text(splits[seed], seed, at=At(9, lambda: seen.append(server.server.caches.nbytes)))

        splits = [stack.enter_context(split_model(path, server.endpoint)) for _ in range(3)]
        barrier = threading.Barrier(3)
        with ThreadPoolExecutor(3) as threads:
            found = list(threads.map(write, range(3)))
        assert found == [text(whole, seed) for seed in range(3)]
        assert 0 < max(seen) <= budget


def test_clients_that_write_at_once_share_passes_and_each_gets_its_local_text(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"max_new_tokens": 7}]
    merged: list[int] = []

    def note(message: Message, role: Role, **how: Any) -> Answer:
        answer = read_answer(message, role, **how)
        merged.append(answer.merged)
        return answer

    with server_of(path) as server, ExitStack() as stack:
        wholes = [with_lora(local_model(path), seed=seed, layers=range(6), rank=2 + seed).eval() for seed in range(4)]
        trunks = [stack.enter_context(zsl.RemoteTrunk(server.endpoint)) for _ in ways]
        splits = [
            with_lora(zsl.load_client(path, trunk), seed=seed, layers=range(6), rank=2 + seed).eval()
            for seed, trunk in enumerate(trunks)
        ]
        expected = [text(whole, seed, **ways[seed]) for seed, whole in enumerate(wholes)]
        monkeypatch.setattr("zsl.client.trunk_client.read_answer", note)
        barrier = threading.Barrier(4)

        def write(seed: int) -> list[int]:
            barrier.wait(WAIT_SECONDS)
            return text(splits[seed], seed, **ways[seed])

        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(write, range(4)))
    assert found == expected
    assert len({tuple(one) for one in expected}) == 4, "clients with one text would hide a mix-up"
    assert max(merged) > 1, "nothing was merged: the test would show nothing"


def test_a_text_that_needs_more_than_the_whole_memory_is_refused_by_name(path: str) -> None:
    with server_of(path, _bytes_of_a_text(path)) as server, split_model(path, server.endpoint) as split:
        with pytest.raises(TooLargeError, match="--cache-memory"):
            text(split)
        assert len(text(split, use_cache=False)) == LENGTH


def _bytes_of_a_text(path: str) -> int:
    """Keys and values of the cut's two layers, of 2 heads of 8, in single precision."""
    return 2 * LENGTH * 2 * 2 * 8 * 4


def test_a_daemon_that_keeps_no_keys_and_values_has_generate_run_without(path: str, whole: PreTrainedModel) -> None:
    with server_of(path, 0) as server, split_model(path, server.endpoint) as split:
        assert text(split) == text(whole)
        with pytest.raises(ModelError, match="--cache-memory"):
            text(split, use_cache=True)
