"""Texts of `zsl.generation` are those of transformers' `generate`: greedy, seeded, in threads, with reused keys."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import zsl
from support.data import PLAIN, SENTENCES, write_model
from support.embedded import served
from zsl.errors import DataError, ModelError
from zsl.generation.generate import generate
from zsl.generation.pieces import Piece
from zsl.generation.prompts import ContextError, room_for_answer, tokens_of_chat, tokens_of_text
from zsl.generation.reuse import Reusable
from zsl.generation.sampling import Sampling
from zsl.generation.text_stream import INCOMPLETE, TextStream
from zsl.link.cancellation import Cancellation
from zsl.models.reference import resolve

TOKENS = 12


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), PLAIN)


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> PreTrainedTokenizerBase:
    return resolve(str(path)).tokenizer()


@pytest.fixture(scope="module")
def whole(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.fixture(scope="module")
def split(path: Path) -> Iterator[Any]:
    with served(str(path)) as endpoint, zsl.RemoteTrunk(endpoint) as trunk:
        yield zsl.load_client(str(path), trunk).eval()


def tokens_by_transformers(model: Any, prompt: list[int], **how: Any) -> list[int]:
    ids = torch.tensor([prompt])
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, top_k=0, pad_token_id=0, **how
    )
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(1e-30), Sampling(0.8, 0.9, 5), Sampling(1.0, 1.0, 7)], ids=str
)
def test_a_split_model_has_the_text_that_transformers_generates_on_the_whole_one(
    sampling: Sampling, whole: Any, split: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = tokens_of_text(tokenizer, SENTENCES[0])
    torch.manual_seed(sampling.seed or 0)
    how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    expected = tokens_by_transformers(whole, prompt, **(how if sampling.temperature > 0.1 else {"do_sample": False}))
    before = torch.get_rng_state()
    pieces: list[Piece] = []
    made = generate(split, tokenizer, prompt, max_tokens=TOKENS, sampling=sampling, logprobs=0, on_piece=pieces.append)
    assert torch.equal(torch.get_rng_state(), before), "torch's own generator is not drawn from"
    assert [piece.logprob.token for piece in pieces if piece.logprob] == expected
    assert "".join(piece.text for piece in pieces) == made.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert (made.tokens, made.finish) == (TOKENS, "length")


def test_a_seed_gives_its_text_whatever_other_threads_draw(whole: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = [tokens_of_text(tokenizer, text) for text in SENTENCES[:4]]

    def text(number: int) -> str:
        sampling = Sampling(1.2, 1.0, number)
        return generate(whole, tokenizer, prompts[number], max_tokens=TOKENS, sampling=sampling).text

    alone = list(map(text, range(len(prompts))))
    assert len(set(alone)) == len(prompts)
    with ThreadPoolExecutor(len(prompts)) as threads:
        assert list(threads.map(text, range(len(prompts)))) == alone


def test_log_probabilities_are_those_of_the_models_own_distribution(
    whole: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = tokens_of_text(tokenizer, SENTENCES[1])
    pieces: list[Piece] = []
    sampling = Sampling(0.5, 0.5, 3)
    generate(whole, tokenizer, prompt, max_tokens=4, sampling=sampling, logprobs=3, on_piece=pieces.append)
    found = [piece.logprob for piece in pieces if piece.logprob]
    ids = torch.tensor([[*prompt, *(one.token for one in found)]])
    with torch.no_grad():
        expected = whole(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for one, row in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(float(row[one.token]), abs=1e-5)
        assert [token for token, _ in one.top] == row.topk(3).indices.tolist()


def test_the_turns_of_a_chat_that_reuse_keys_and_values_have_the_same_answers(
    whole: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    def answers(reusable: Reusable | None) -> list[str]:
        messages: list[dict[str, str]] = []
        found = []
        for text in ("Yes", "No", "the moon"):
            messages.append({"role": "user", "content": text})
            prompt = tokens_of_chat(tokenizer, messages)
            made = generate(whole, tokenizer, prompt, max_tokens=5, reusable=reusable)
            messages.append({"role": "assistant", "content": made.text})
            found.append(made.text)
        return found

    assert answers(Reusable()) == answers(None)


def test_what_is_reused_is_a_beginning_of_the_prompt_and_nothing_else(whole: Any) -> None:
    class Cache:
        def get_seq_length(self) -> int:
            return 3

    def given(prompt: list[int]) -> bool:
        reusable = Reusable()
        reusable.keep(Cache(), [5, 6, 7, 8])
        return bool(reusable.for_prompt(prompt)) and not reusable.for_prompt(prompt)

    assert given([5, 6, 7, 9])
    assert not given([5, 6, 7])
    assert not given([5, 6, 9, 9])
    reusable = Reusable()
    reusable.keep(None, [5, 6])
    assert reusable.for_prompt([5, 6, 7]) == {}


def test_a_generation_ends_at_a_stop_string_and_when_it_is_cancelled(
    whole: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = tokens_of_text(tokenizer, SENTENCES[2])
    text = generate(whole, tokenizer, prompt, max_tokens=TOKENS).text
    stop = text[4:7]
    made = generate(whole, tokenizer, prompt, max_tokens=TOKENS, stops=["never", stop])
    assert (made.text, made.finish) == (text[: text.index(stop)], "stop")
    assert made.tokens < TOKENS
    pieces: list[Piece] = []
    cancellation = Cancellation()

    def take_three(piece: Piece) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            cancellation.set()

    how: dict[str, Any] = {"max_tokens": TOKENS, "cancellation": cancellation}
    cancelled = generate(whole, tokenizer, prompt, on_piece=take_three, **how)
    assert (cancelled.tokens, cancelled.finish) == (3, "cancelled")
    assert generate(whole, tokenizer, prompt, **how).tokens == 0


@pytest.mark.parametrize(
    "text", ["plain words", "日本語のテキスト", "naïve 🌒🌓 café", "a\nb\n", "\udcff".encode(errors="replace").decode()]
)
def test_pieces_of_a_stream_are_whole_characters_and_make_the_text(text: str) -> None:
    data = text.encode()

    def decode(tokens: Any) -> str:
        return bytes(tokens).decode(errors="replace")

    stream = TextStream(decode)
    pieces = [*map(stream.add, data), stream.end()]
    assert "".join(pieces) == text
    assert not any(INCOMPLETE in piece for piece in pieces)


def test_bytes_that_are_no_character_hold_the_stream_up_for_four_tokens_only() -> None:
    stream = TextStream(lambda tokens: bytes(tokens).decode(errors="replace"))
    pieces = [stream.add(0xFF) for _ in range(9)]
    assert sum(map(len, pieces)) >= 8 - 4
    assert "".join([*pieces, stream.end()]) == INCOMPLETE * 9


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("aab", ["ab"], "a"),
        ("ends with a begun sto", ["stop"], "ends with a begun sto"),
        ("nothing", ["x"], "nothing"),
    ],
)
def test_a_stream_ends_before_the_first_stop_string(text: str, stops: list[str], expected: str) -> None:
    stream = TextStream(lambda tokens: "".join(map(chr, tokens)), stops)
    assert "".join([*map(stream.add, map(ord, text)), stream.end()]) == expected
    assert stream.stopped == (expected != text)


def test_a_prompt_that_leaves_no_room_or_cannot_be_made_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    assert room_for_answer(60, 64, None, default=10) == 4
    assert room_for_answer(60, 64, 4, default=10) == 4
    assert room_for_answer(3, 64, 20, default=10) == 20
    for tokens, asked in ((64, None), (60, 5)):
        with pytest.raises(ContextError, match="64 together"):
            room_for_answer(tokens, 64, asked, default=10)
    with pytest.raises(DataError, match="empty"):
        tokens_of_text(tokenizer, "")
    with pytest.raises(DataError, match="template"):
        tokens_of_chat(tokenizer, [{"role": "user"}])
    tokenizer.chat_template, template = None, tokenizer.chat_template
    try:
        with pytest.raises(ModelError, match="template"):
            tokens_of_chat(tokenizer, [{"role": "user", "content": "x"}])
    finally:
        tokenizer.chat_template = template
