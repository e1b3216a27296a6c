"""`zsl serve` when a client hangs up or the daemon goes away: what is freed, and what clients get."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from peft import PeftModel
from transformers import AutoModelForCausalLM

from support.data import PLAIN, SENTENCES, write_model
from support.echo import EchoServer
from support.faulty_link import FaultyLink
from support.killable import Killable
from support.models import CUT, local_model, with_lora
from support.waiting import wait_until
from zsl.generation.generate import generate
from zsl.generation.prompts import tokens_of_text
from zsl.models.reference import resolve
from zsl.serving.generation_jobs import ServedModels
from zsl.serving.open_model import open_model
from zsl.serving.server import make_server
from zsl.serving.service import Generation
from zsl.split.cut import parse_cut
from zsl.training.config.config import TrunkTable
from zsl.training.directory.trained import find_trained
from zsl.transport.listening import listen
from zsl.trunk.daemon.load import plan_trunk
from zsl.trunk.work import Batch, Outcome

SECONDS = 60.0
MOST = 30
GONE_SECONDS = 1.0  # until a request gives a lost daemon up

until = partial(wait_until, SECONDS)

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model"), PLAIN))


class Trunk:
    """The trunk of a checkpoint in this process. `gate` holds its passes back while it is cleared."""

    def __init__(self, path: str) -> None:
        plan = plan_trunk(path, parse_cut(CUT), torch.float32, "cpu", forward_only=False)
        self._compute = plan.load(max_batch_tokens=64, merge_below_tokens=16)
        self.traits = self._compute.traits
        self.gate = threading.Event()
        self.gate.set()
        self.once = threading.Semaphore(0)  # lets one pass through the closed gate
        self.begun = threading.Semaphore(0)
        self.passes = 0
        self.server = EchoServer(
            compute=self,
            model=plan.info.model,
            cut=plan.info.cut,
            row_tokens=plan.info.max_row_tokens,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compute, name)

    def run(self, batch: Batch) -> list[Outcome]:
        self.passes += 1
        self.begun.release()
        until(lambda: self.gate.is_set() or self.once.acquire(blocking=False))
        return self._compute.run(batch)

    @property
    def cache_bytes(self) -> int:
        return self.server.server.caches.nbytes


@pytest.fixture
def trunk(path: str) -> Iterator[Trunk]:
    made = Trunk(path)
    with made.server:
        yield made
        made.gate.set()


@contextmanager
def served(
    path: str, endpoint: str, adapters: Mapping[str, Path] | None = None, *, parallel: int = 4, **table: float
) -> Iterator[str]:
    """The address of a server of the model, `base`, and of these adapters."""
    reference, ready = resolve(path), threading.Event()
    with open_model(reference, TrunkTable(endpoint=endpoint, cut=CUT, **table), dtype="float32") as opened:
        named = {name: find_trained([place]) for name, place in (adapters or {}).items()}
        models = {"base": opened.base, **opened.copies(named)}
        prepare = ServedModels(models, reference.tokenizer(), opened.context_tokens, 40).prepare
        server = make_server(list(models), prepare, api_key=None, parallel=parallel, on_ready=ready.set)
        listening, address = listen("127.0.0.1", 0)
        with listening:
            thread = threading.Thread(target=server.run, args=([listening],))
            thread.start()
            try:
                assert ready.wait(SECONDS)
                yield f"{address.replace('tcp', 'http')}/v1"
            finally:
                server.should_exit = True
                thread.join(SECONDS)
                assert not thread.is_alive()


def post(address: str, *, stream: bool, prompt: str = SENTENCES[0]) -> socket.socket:
    request = {"model": "base", "prompt": prompt, "max_tokens": MOST, "temperature": 0, "stream": stream}
    body = json.dumps(request).encode()
    connection = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2].partition("/")[0])), SECONDS)
    head = [
        "POST /v1/completions HTTP/1.1",
        "Host: localhost",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    connection.sendall("\r\n".join([*head, "", ""]).encode() + body)
    return connection


@pytest.fixture
def cancelled(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a generation is cancelled."""
    event, cancel = threading.Event(), Generation.cancel

    def noted(generation: Generation) -> None:
        cancel(generation)
        event.set()

    monkeypatch.setattr(Generation, "cancel", noted)
    return event


@pytest.mark.parametrize("passes", [1, 4], ids=["within the prompt", "within the text"])
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_the_daemon_is_free_after_the_pass_in_which_a_client_hung_up(
    stream: bool, passes: int, path: str, trunk: Trunk, cancelled: threading.Event
) -> None:
    with served(path, trunk.server.endpoint) as address:
        gc.disable()
        try:
            trunk.gate.clear()
            connection = post(address, stream=stream)
            assert trunk.begun.acquire(timeout=SECONDS)
            for _ in range(passes - 1):
                trunk.once.release()
                assert trunk.begun.acquire(timeout=SECONDS)
            connection.close()
            assert cancelled.wait(SECONDS)
            before = trunk.passes
            trunk.gate.set()
            until(lambda: trunk.cache_bytes == 0)
            assert trunk.passes == before
        finally:
            gc.enable()


def test_a_client_that_hangs_up_before_its_turn_costs_the_daemon_nothing(
    path: str, trunk: Trunk, cancelled: threading.Event
) -> None:
    with served(path, trunk.server.endpoint, parallel=1) as address:
        trunk.gate.clear()
        first = post(address, stream=False)
        assert trunk.begun.acquire(timeout=SECONDS)
        post(address, stream=True, prompt=SENTENCES[1]).close()
        assert cancelled.wait(SECONDS)
        trunk.gate.set()
        with first, first.makefile("rb") as answer:
            assert b'"completion_tokens":' in answer.read()
        until(lambda: trunk.cache_bytes == 0)
    assert trunk.passes <= MOST


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_prompt_that_waits_at_the_daemon_is_taken_out_when_its_client_hangs_up(
    stream: bool, path: str, trunk: Trunk, cancelled: threading.Event
) -> None:
    with served(path, trunk.server.endpoint) as address:
        trunk.gate.clear()
        first = post(address, stream=False)
        assert trunk.begun.acquire(timeout=SECONDS)
        second = post(address, stream=stream, prompt=SENTENCES[1])
        until(lambda: trunk.server.requests.queued == 1)
        second.close()
        assert cancelled.wait(SECONDS)
        until(lambda: trunk.server.requests.queued == 0)
        trunk.gate.set()
        with first, first.makefile("rb") as answer:
            assert b'"completion_tokens":' in answer.read()
        until(lambda: trunk.cache_bytes == 0)
    assert trunk.passes <= MOST


def test_a_daemon_that_goes_away_ends_a_stream_with_an_error_and_serves_again_when_it_is_back(
    path: str, trunk: Trunk
) -> None:
    how: dict[str, Any] = {"model": "base", "prompt": SENTENCES[0], "max_tokens": MOST, "temperature": 0}
    with (
        FaultyLink(trunk.server.port) as link,
        served(path, link.endpoint, request_timeout_seconds=GONE_SECONDS) as address,
        OpenAI(base_url=address, api_key="none", max_retries=0, timeout=SECONDS) as client,
    ):
        expected = client.completions.create(**how).choices[0].text
        streamed = client.completions.create(**how, stream=True)
        trunk.gate.clear()
        next(streamed)
        link.refuse()
        link.cut()
        trunk.gate.set()
        with pytest.raises(openai.APIError) as ended:
            list(streamed)
        assert ended.value.code == "trunk_unavailable"
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(**how)
        assert (refused.value.status_code, refused.value.code) == (503, "trunk_unavailable")
        link.heal()
        assert client.completions.create(**how).choices[0].text == expected


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_streams_of_several_adapters_are_undisturbed_by_a_hangup_and_a_killed_daemon(
    path: str, tmp_path: Path
) -> None:
    adapters = {"all": tmp_path / "all", "own": tmp_path / "own"}
    tokenizer, whole = resolve(path).tokenizer(), {"base": AutoModelForCausalLM.from_pretrained(path)}
    for seed, (name, layers) in enumerate({"all": range(6), "own": (0, 1, 4, 5)}.items()):
        with_lora(local_model(path), seed=seed, layers=layers).save_pretrained(str(adapters[name]))
        whole[name] = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), adapters[name])
    names, count, chunks = list(whole), 9, 0
    running = [Killable(path)]

    with FaultyLink(running[0].port) as link:

        def restart() -> None:
            running[-1].kill()
            running.append(Killable(path))
            link.retarget(running[-1].port)

        async def text(number: int) -> str:
            nonlocal chunks
            streamed = await client.completions.create(
                model=names[number % 3], prompt=SENTENCES[number], max_tokens=MOST, temperature=0, stream=True
            )
            made = ""
            async for chunk in streamed:
                made += chunk.choices[0].text
                chunks += 1
                if chunks == count * MOST // 3:
                    await asyncio.to_thread(restart)
                if number == 4 and len(made) > 3:
                    await streamed.close()  # hangs up
                    break
            return made

        with served(path, link.endpoint, adapters, parallel=count) as address:
            async with AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=500) as client:
                found = await asyncio.gather(*map(text, range(count)))
            running[-1].kill()
    assert len(running) == 2
    for number, one in enumerate(found):
        tokens = tokens_of_text(tokenizer, SENTENCES[number])
        expected = generate(whole[names[number % 3]], tokenizer, tokens, max_tokens=MOST).text
        assert one == expected or (number == 4 and expected.startswith(one)), number
