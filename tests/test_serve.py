"""`zsl serve` with OpenAI's own client: the whole local model's texts, streamed and whole, and refusals in its form."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import openai
import pytest
import torch
from click.testing import CliRunner
from openai import AsyncOpenAI, OpenAI
from peft import PeftModel
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM

from support.data import PLAIN, SENTENCES, write_model
from support.models import local_model, with_lora
from support.serving import Server
from zsl.cli.zsl import zsl as command
from zsl.errors import EXIT_STARTUP_FAILED, EXIT_USAGE, ConnectionLost
from zsl.generation.generate import generate
from zsl.generation.pieces import Generated, Piece
from zsl.generation.prompts import tokens_of_chat, tokens_of_text
from zsl.generation.sampling import Sampling
from zsl.generation.text_stream import INCOMPLETE, TextStream
from zsl.link.cancellation import Cancellation
from zsl.models.reference import resolve
from zsl.serving.answers import ChatAnswer
from zsl.serving.app import MAX_BODY_BYTES, Api
from zsl.serving.server import make_server
from zsl.serving.service import Job, Service

KEY = "a key of this test"
MOST = 10
SECONDS = 60.0
MESSAGES = [{"role": "user", "content": "Line 1: the owl"}]

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), PLAIN)


@pytest.fixture(scope="module")
def adapters(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters, on all layers and on the client's alone."""
    made = {}
    for seed, (name, layers) in enumerate({"all": range(6), "own": (0, 1, 4, 5)}.items()):
        made[name] = tmp_path_factory.mktemp(name)
        with_lora(local_model(str(path)), seed=seed, layers=layers).save_pretrained(str(made[name]))
    return made


@pytest.fixture(scope="module")
def models(path: Path, adapters: dict[str, Path]) -> dict[str, Any]:
    """The whole local models, by the names under which the server has them."""
    whole = {str(path): AutoModelForCausalLM.from_pretrained(path)}
    for name, place in adapters.items():
        whole[name] = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), place)
    return whole


@pytest.fixture(scope="module")
def server(path: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    named = [word for name, place in adapters.items() for word in ("--adapter", f"{name}={place}")]
    log = tmp_path_factory.mktemp("server") / "log"
    options = ["--model", str(path), "--cut", "2:4", "--parallel", "4", "--max-tokens", "40", *named]
    with Server(*options, log=log, environment={"ZSL_API_KEY": KEY}) as started:
        yield started
    assert (started.process.returncode, log.read_text()) == (0, "")


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.address, api_key=KEY, max_retries=0, timeout=SECONDS) as made:
        yield made


@pytest.fixture(scope="module")
def local(path: Path, models: dict[str, Any]) -> Callable[..., str]:
    """`local(name, prompt, …)` is the text of the whole local model for a prompt, or for messages."""
    tokenizer = resolve(str(path)).tokenizer()

    def text(name: str, prompt: str | list[dict[str, str]], *, most: int = MOST, **sampling: Any) -> str:
        tokens = tokens_of_text(tokenizer, prompt) if isinstance(prompt, str) else tokens_of_chat(tokenizer, prompt)
        return generate(models[name], tokenizer, tokens, max_tokens=most, sampling=Sampling(**sampling)).text

    return text


def test_every_model_is_listed_and_found(client: OpenAI, path: Path) -> None:
    assert [model.id for model in client.models.list()] == [str(path), "all", "own"]
    for name in ("own", str(path)):
        assert client.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("none")
    assert refused.value.code == "model_not_found"


@pytest.mark.parametrize("name", ["base", "all", "own"])
def test_a_chat_is_the_whole_models_text_whole_and_streamed(
    name: str, client: OpenAI, path: Path, local: Callable[..., str]
) -> None:
    name = str(path) if name == "base" else name
    how: dict[str, Any] = {"model": name, "messages": MESSAGES, "max_tokens": MOST, "temperature": 0}
    whole = client.chat.completions.create(**how)
    (choice,) = whole.choices
    assert choice.message.content == local(name, MESSAGES)
    assert choice.finish_reason == "length" and choice.logprobs is None
    assert whole.usage is not None and whole.usage.completion_tokens == MOST
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + MOST
    chunks = list(client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    *texts, last = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert texts[0].delta.role == "assistant"
    assert "".join(one.delta.content or "" for one in texts) == choice.message.content
    assert last.finish_reason == "length" and not any(one.finish_reason for one in texts)
    assert chunks[-1].usage == whole.usage and len({chunk.id for chunk in chunks}) == 1


def test_a_completion_is_the_whole_models_text_of_a_text_or_of_tokens(
    client: OpenAI, path: Path, local: Callable[..., str]
) -> None:
    how: dict[str, Any] = {"model": "own", "max_tokens": MOST, "temperature": 0}
    expected = local("own", SENTENCES[0])
    tokens = resolve(str(path)).tokenizer()(SENTENCES[0])["input_ids"]
    for prompt in (SENTENCES[0], [SENTENCES[0]], tokens):
        made = client.completions.create(prompt=prompt, **how)
        assert made.choices[0].text == expected
        assert made.usage is not None and made.usage.prompt_tokens == len(tokens)
    streamed = client.completions.create(prompt=tokens, stream=True, **how)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected
    short = client.completions.create(model="own", prompt="x", temperature=0)
    assert short.usage is not None and short.usage.completion_tokens == 16


def test_a_text_ends_before_a_stop_string_and_with_the_reason(client: OpenAI, local: Callable[..., str]) -> None:
    text = local("all", SENTENCES[0])
    stop = text[3:6]
    how: dict[str, Any] = {"model": "all", "prompt": SENTENCES[0], "max_tokens": MOST, "temperature": 0}
    for stops in (stop, ["never", stop]):
        (choice,) = client.completions.create(stop=stops, **how).choices
        assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
    *texts, last = client.completions.create(stop=stop, stream=True, **how)
    assert "".join(chunk.choices[0].text for chunk in texts) == text[: text.index(stop)]
    assert last.choices[0].finish_reason == "stop"


def test_log_probabilities_are_the_models_own(client: OpenAI, path: Path, models: dict[str, Any]) -> None:
    tokenizer = resolve(str(path)).tokenizer()
    prompt = tokenizer(SENTENCES[0])["input_ids"]
    made = client.completions.create(model="own", prompt=prompt, max_tokens=4, temperature=0, logprobs=2)
    found = made.choices[0].logprobs
    assert found is not None and found.token_logprobs is not None and found.top_logprobs is not None
    chosen: list[int] = []
    for logprob, top in zip(found.token_logprobs, found.top_logprobs, strict=True):
        with torch.no_grad():
            row = models["own"](torch.tensor([[*prompt, *chosen]])).logits[0, -1].log_softmax(-1)
        chosen.append(int(row.argmax()))
        assert logprob == pytest.approx(float(row.max()), abs=1e-4)
        assert len(top) == 2 and max(top.values()) == logprob
    assert found.tokens == [tokenizer.decode([token]) for token in chosen]
    how: dict[str, Any] = {"model": "own", "messages": MESSAGES, "max_tokens": 4, "logprobs": True, "top_logprobs": 1}
    chat = client.chat.completions.create(**how, temperature=0).choices[0].logprobs
    assert chat is not None and chat.content is not None
    assert [(one.token, one.logprob) for one in chat.content] == [
        (one.top_logprobs[0].token, one.top_logprobs[0].logprob) for one in chat.content
    ]
    streamed = client.chat.completions.create(**how, temperature=0, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in streamed]
    assert [one for part in parts if part for one in part.content or ()] == chat.content


async def test_streams_at_once_with_other_prompts_adapters_and_seeds_are_each_as_alone(
    server: Server, path: Path, local: Callable[..., str]
) -> None:
    """Twice as many as run at once: the others wait for their turn."""
    names = [str(path), "all", "own"]
    async with AsyncOpenAI(base_url=server.address, api_key=KEY, max_retries=0, timeout=SECONDS) as client:

        async def text(number: int) -> str:
            sampling: dict[str, Any] = {"temperature": 0} if number % 2 else {"temperature": 1.2, "seed": number}
            streamed = await client.completions.create(
                model=names[number % 3], prompt=SENTENCES[number], max_tokens=MOST, stream=True, **sampling
            )
            return "".join([chunk.choices[0].text async for chunk in streamed])

        found = await asyncio.gather(*map(text, range(8)))
    for number, one in enumerate(found):
        how: dict[str, Any] = {} if number % 2 else {"temperature": 1.2, "seed": number}
        assert one == local(names[number % 3], SENTENCES[number], **how), number


def test_without_a_seed_texts_differ(client: OpenAI) -> None:
    texts = {client.completions.create(model="own", prompt="x", max_tokens=MOST).choices[0].text for _ in range(3)}
    assert len(texts) > 1


REFUSED: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"model": "none"}, 404, "model", "model_not_found"),
    ({"messages": [{"role": "user", "content": "moon " * 99}]}, 400, "messages", "context_length_exceeded"),
    ({"max_tokens": 41}, 400, "max_tokens", None),
    ({"max_tokens": 0}, 400, "max_tokens", None),
    ({"n": 2}, 400, "n", "unsupported_parameter"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty", "unsupported_parameter"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools", "unsupported_parameter"),
    ({"extra_body": {"guided": 1}}, 400, "guided", "unknown_parameter"),
    ({"temperature": 3}, 400, "temperature", None),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", None),
    ({"top_logprobs": 2}, 400, "top_logprobs", None),
    ({"messages": []}, 400, "messages", None),
    ({"messages": [{"role": "nobody", "content": "x"}]}, 400, "messages", None),
    ({"stop": ["x"] * 17}, 400, "stop", None),
]


@pytest.mark.parametrize(("changed", "status", "param", "code"), REFUSED, ids=lambda value: str(value)[:30])
def test_a_request_that_is_not_served_is_refused_in_the_apis_form(
    changed: dict[str, Any], status: int, param: str, code: str | None, client: OpenAI
) -> None:
    request: dict[str, Any] = {"model": "own", "messages": MESSAGES, "max_tokens": 2, **changed}
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as refused:
            client.chat.completions.create(**request, stream=stream)
        error = refused.value
        assert (error.status_code, error.code, error.type) == (status, code, "invalid_request_error")
        assert error.param == param


REFUSED_COMPLETIONS: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"model": "none"}, 404, "model", "model_not_found"),
    ({"prompt": ""}, 400, "prompt", None),
    ({"prompt": []}, 400, "prompt", None),
    ({"prompt": [9_999_999]}, 400, "prompt", None),
    ({"prompt": ["x", "y"]}, 400, "prompt", None),
    ({"prompt": "moon " * 99}, 400, "prompt", "context_length_exceeded"),
    ({"logprobs": 21}, 400, "logprobs", None),
    ({"logprobs": -1}, 400, "logprobs", None),
    ({"best_of": 2}, 400, "best_of", "unsupported_parameter"),
    ({"echo": True}, 400, "echo", "unsupported_parameter"),
    ({"stop": ""}, 400, "stop", None),
    ({"top_p": 0}, 400, "top_p", None),
    ({"seed": 2**63}, 400, "seed", None),
]


@pytest.mark.parametrize(("changed", "status", "param", "code"), REFUSED_COMPLETIONS, ids=lambda one: str(one)[:30])
def test_a_completion_that_is_not_served_is_refused_in_the_apis_form(
    changed: dict[str, Any], status: int, param: str, code: str | None, client: OpenAI
) -> None:
    request: dict[str, Any] = {"model": "own", "prompt": "x", "max_tokens": 2, **changed}
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as refused:
            client.completions.create(**request, stream=stream)
        error = refused.value
        assert (error.status_code, error.code, error.type) == (status, code, "invalid_request_error")
        assert error.param == param


def test_characters_of_several_tokens_arrive_whole_and_a_stop_string_of_several_tokens_ends_the_text() -> None:
    """The model is stood in for by its texts; decoding, stop strings, events and OpenAI's client are real."""
    written = "naïve 🌒🌓 日本 end"

    def spoken(stops: list[str]) -> Job:
        def job(on_piece: Callable[[Piece], None], _: Any) -> Generated:
            stream = TextStream(lambda tokens: bytes(tokens).decode(errors="replace"), stops)
            pieces = [*map(stream.add, written.encode()), stream.end()]
            for piece in pieces:
                on_piece(Piece(piece))
            return Generated("".join(pieces), len(pieces), "stop" if stream.stopped else "length")

        return job

    for stop, expected in (("🌓 日", "naïve 🌒"), ("never", written)):
        application, _ = api(lambda request: (spoken(request.stops), answer()))
        with TestClient(application, base_url="http://localhost") as http:
            client = OpenAI(base_url="http://localhost/v1", api_key="none", http_client=http, max_retries=0)
            how: dict[str, Any] = {"model": "m", "messages": MESSAGES, "stop": stop}
            chunks = list(client.chat.completions.create(**how, stream=True))
            texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
            assert "".join(texts) == client.chat.completions.create(**how).choices[0].message.content == expected
            assert not any(INCOMPLETE in text for text in texts)
            assert chunks[-1].choices[0].finish_reason == ("length" if stop == "never" else "stop")


def test_what_asks_for_nothing_is_accepted(client: OpenAI) -> None:
    made = client.chat.completions.create(
        model="own",
        messages=[{"role": "developer", "content": [{"type": "text", "text": "Yes"}]}, *MESSAGES],  # type: ignore[list-item]
        max_completion_tokens=1,
        n=1,
        presence_penalty=0,
        logit_bias={},
        user="somebody",
        response_format={"type": "text"},
    )
    assert made.usage is not None and made.usage.completion_tokens == 1


def test_another_key_and_another_path_are_refused(server: Server, client: OpenAI) -> None:
    with OpenAI(base_url=server.address, api_key="guess", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as refused:
            stranger.models.list()
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="own", input="x")


def job_that_waits(told: list[str]) -> Job:
    """Tells one piece, and then waits to be cancelled."""

    def job(on_piece: Callable[[Piece], None], cancellation: Cancellation) -> Generated:
        on_piece(Piece("x"))
        deadline = time.monotonic() + SECONDS
        while not cancellation.is_set() and time.monotonic() < deadline:
            os.sched_yield()
        told.append("cancelled" if cancellation.is_set() else "late")
        return Generated("x", 1, "cancelled")

    return job


def api(prepare: Callable[[Any], tuple[Job, Any]], *, parallel: int = 1, waiting: int = 0) -> tuple[Any, Service]:
    service = Service(parallel, most_waiting=waiting)

    @asynccontextmanager
    async def lifespan(application: Any) -> Any:
        yield
        service.close()

    return Api(["m"], prepare, service, api_key=None).application(lifespan), service


def answer() -> ChatAnswer:
    return ChatAnswer("m", 1, lambda token: "", with_logprobs=False)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_hangs_up_ends_its_generation_and_frees_its_place(stream: bool) -> None:
    told: list[str] = []
    application, service = api(lambda request: (job_that_waits(told), answer()))
    body = b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": %s}' % (
        b"true" if stream else b"false"
    )
    received = [{"type": "http.request", "body": body, "more_body": False}]
    begun = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if received:
            return received.pop()
        if stream:
            await begun.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if b'"x"' in message.get("body", b""):
            begun.set()

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "query_string": b""}
    await asyncio.wait_for(application(scope, receive, send), SECONDS)
    service._workers.shutdown()  # waits for the job
    assert told == ["cancelled"] and service.count == 0
    assert begun.is_set() == stream


def test_a_server_without_a_key_is_for_this_machine_and_for_json_alone() -> None:
    def prepare(request: Any) -> tuple[Job, Any]:
        raise ConnectionLost("the daemon is gone")

    with TestClient(api(prepare)[0], base_url="http://localhost:8000") as client:

        def post(**how: Any) -> tuple[int, Any]:
            answered = client.post("/v1/completions", **how)
            return answered.status_code, answered.json()["error"]["code"]

        request = {"model": "m", "prompt": "x"}
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/models", headers={"host": "[::1]:8000"}).status_code == 200
        assert client.get("/v1/models", headers={"host": "evil.example:8000"}).status_code == 403
        assert post(content="{}", headers={"content-type": "text/plain"}) == (415, None)
        assert post(content=b" " * (MAX_BODY_BYTES + 1), headers={"content-type": "application/json"}) == (413, None)
        assert post(content="{", headers={"content-type": "application/json"}) == (400, None)
        assert post(json=request) == (503, "trunk_unavailable")
        assert client.get("/v1/completions").status_code == 405


def test_one_request_more_than_may_wait_is_refused_and_an_unknown_error_tells_nothing() -> None:
    def fail(*_: Any) -> Generated:
        raise RuntimeError("a secret")

    request = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    full, _ = api(lambda _: (fail, answer()), parallel=1, waiting=-1)
    with TestClient(full, base_url="http://localhost") as client:
        refused = client.post("/v1/chat/completions", json=request)
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
    failing, _ = api(lambda _: (fail, answer()))
    with TestClient(failing, base_url="http://localhost") as client:
        for stream in (False, True):
            failed = client.post("/v1/chat/completions", json={**request, "stream": stream})
            assert (failed.status_code, failed.json()["error"]["type"]) == (500, "server_error")
            assert "secret" not in failed.text


def test_a_generation_that_fails_keeps_nothing_without_the_garbage_collector() -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def fail(on_piece: Callable[[Piece], None], _: Any) -> Generated:
        tensor = torch.zeros(1)
        kept.append(weakref.ref(tensor))
        raise ConnectionLost("the daemon is gone")

    request = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    with TestClient(api(lambda _: (fail, answer()))[0], base_url="http://localhost") as client:
        gc.disable()
        try:
            for stream in (False, True):
                assert client.post("/v1/chat/completions", json={**request, "stream": stream}).status_code == 503
            assert [one() for one in kept] == [None, None]
        finally:
            gc.enable()


def test_an_error_behind_the_first_piece_ends_a_stream_as_an_error() -> None:
    def fail(on_piece: Callable[[Piece], None], _: Any) -> Generated:
        on_piece(Piece("begun"))
        raise ConnectionLost("the daemon is gone")

    request = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}
    with TestClient(api(lambda _: (fail, answer()))[0], base_url="http://localhost") as client:
        events = client.post("/v1/chat/completions", json=request).text.split("\n\n")
    assert "begun" in events[1] and "trunk_unavailable" in events[-2] and "[DONE]" not in events


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--host", "0.0.0.0"], EXIT_STARTUP_FAILED, "--api-key-file"),
        (["--api-key-file", "missing"], EXIT_USAGE, "missing"),
        (["--adapter", "x"], EXIT_USAGE, "NAME=DIR"),
        (["--adapter", "x=a", "--adapter", "x=b"], EXIT_USAGE, "one name"),
        ([], EXIT_USAGE, "--model"),
    ],
)
def test_serve_refuses_what_it_cannot_do(
    arguments: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ZSL_API_KEY", raising=False)
    ended = CliRunner().invoke(command, ["serve", "--port", "0", *arguments])
    assert (ended.exit_code, said in ended.stderr) == (code, True), ended.output


def test_an_idle_connection_is_closed_by_the_client_first() -> None:
    server = make_server(["own"], Mock(), api_key=None, parallel=1, on_ready=Mock())
    kept_by_client_seconds = openai.DEFAULT_CONNECTION_LIMITS.keepalive_expiry
    assert kept_by_client_seconds is not None
    assert server.config.timeout_keep_alive > 2 * kept_by_client_seconds  # closed first here, requests would be reset


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_a_hundred_streams_at_once_break_nowhere_and_leave_no_memory_behind(
    server: Server, local: Callable[..., str]
) -> None:
    expected = [local("own", text, most=4) for text in SENTENCES]
    status = Path(f"/proc/{server.process.pid}/status")

    def resident_kilobytes() -> int:
        return int(re.findall(r"VmRSS:\s+(\d+)", status.read_text())[0])

    async with AsyncOpenAI(base_url=server.address, api_key=KEY, max_retries=0, timeout=500) as client:

        async def stream(number: int) -> None:
            for turn in range(4):
                index = (number + turn) % len(SENTENCES)
                streamed = await client.completions.create(
                    model="own", prompt=SENTENCES[index], max_tokens=4, temperature=0, stream=True
                )
                text = ""
                async for chunk in streamed:
                    text += chunk.choices[0].text
                    if number % 10 == 9:
                        break  # hangs up
                await streamed.close()
                assert text == expected[index] or number % 10 == 9

        sizes = []
        for _ in range(3):
            await asyncio.gather(*map(stream, range(100)))
            sizes.append(resident_kilobytes())
    assert sizes[2] - sizes[1] < 16 * 1024, f"{sizes} kB"
