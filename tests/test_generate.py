"""A split model generates what the whole local model generates, with keys and values kept on both sides of the cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

import zsl
from support import batches
from support.embedded import served
from support.logprobs import sampled_and_trained
from support.models import local_model, tiny_model, with_lora
from zsl.errors import ModelError

SHARP = {"initializer_range": 0.3}  # so that texts do not repeat one token
# Family, cut, and layers with adapters.
MODELS = {
    "llama": ("llama", "2:4", (0, 1, 4, 5)),
    "gpt2 from its first layer": ("gpt2", "0:3", (4, 5)),
    "qwen3 with adapters in the trunk": ("qwen3", "1:5", range(6)),
    "gemma2, all of it": ("gemma2", "0:6", ()),
    "gemma2, whose trunk begins with a full layer": ("gemma2", "1:4", range(6)),
}


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, checkpoints: Callable[..., Path]) -> Iterator[tuple[Any, Any]]:
    """A split model and the whole local one, with the same LoRA weights."""
    family, cut, layers = MODELS[request.param]
    path = str(checkpoints(family, **SHARP))
    with served(path, cut=cut) as endpoint, zsl.RemoteTrunk(endpoint) as trunk:
        models = zsl.load_client(path, trunk), local_model(path)
        yield tuple(with_lora(model, layers=layers) if layers else model for model in models)  # type: ignore[misc]


def prompt(rows: int = 1, length: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = batches.tokens(rows, length, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def left_padded() -> dict[str, torch.Tensor]:
    batch = batches.padded("left", 16)
    del batch["labels"]
    return batch


def generated(model: Any, inputs: dict[str, torch.Tensor], **how: Any) -> list[torch.Tensor]:
    """The tokens, and the logits that they were chosen by."""
    torch.manual_seed(3)
    kwargs = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **how}
    result = model.generate(**inputs, **kwargs, return_dict_in_generate=True, output_logits=True)
    return [result.sequences, *result.logits]


def chat(model: Any, cache: Cache | None = None) -> list[torch.Tensor]:
    """Three turns that reuse the cache of the turns before."""
    cache, ids, results = cache or DynamicCache(config=model.config), prompt(length=6)["input_ids"], []
    for turn in range(3):
        found = generated(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, past_key_values=cache)
        results += found
        ids = torch.cat([found[0], batches.tokens(1, 4, seed=turn)], 1)
    return results


def reset_and_used_again(model: Any) -> list[torch.Tensor]:
    cache, results = StaticCache(config=model.config, max_cache_len=24), []
    for seed in range(2):
        results += generated(model, prompt(2, 9, seed), past_key_values=cache)
        cache.reset()
    return results


def forked(model: Any) -> list[torch.Tensor]:
    """Two texts that begin with one prompt, whose cache is copied."""
    cache, begin = DynamicCache(config=model.config), prompt(length=6)
    with torch.no_grad():
        model(**begin, past_key_values=cache, use_cache=True)
    results = []
    for seed in (1, 2):
        ids = torch.cat([begin["input_ids"], batches.tokens(1, 3, seed)], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        results += generated(model, inputs, past_key_values=copy.deepcopy(cache))
    return results


def by_hand(model: Any) -> list[torch.Tensor]:
    """A lazy cache, a row repeated, selected, cropped and reset between forwards."""
    cache, ids, results = DynamicCache(), prompt(2, 9)["input_ids"], []
    with torch.no_grad():

        def run(new: torch.Tensor) -> None:
            results.append(model(input_ids=new, past_key_values=cache, use_cache=True).logits)

        run(ids[:, :4])
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
        run(ids[[1, 0, 0, 1], 4:6])
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.crop(-1)
        run(ids[:, 6:9])
        cache.crop(-4)  # into the forward before
        run(ids[:, 1:3])
        cache.reset()
        run(ids[:1])
    return results


def assisted(model: Any) -> list[torch.Tensor]:
    helper = tiny_model("llama", seed=5, **SHARP).eval()
    return generated(model, prompt(), assistant_model=helper, num_assistant_tokens=3)


DECODINGS: dict[str, Callable[[Any], list[torch.Tensor]]] = {
    "greedy": lambda model: generated(model, prompt()),
    "a left-padded batch": lambda model: generated(model, left_padded()),
    "sampling": lambda model: generated(model, prompt(), do_sample=True, num_return_sequences=2),
    "4 beams": lambda model: generated(model, prompt(2), num_beams=4, num_return_sequences=2),
    "sampled beams of a padded batch": lambda model: generated(model, left_padded(), num_beams=3, do_sample=True),
    "prompt lookup": lambda model: generated(model, prompt(), prompt_lookup_num_tokens=3),
    "assisted": assisted,
    "a prompt in pieces": lambda model: generated(model, prompt(2, 11), prefill_chunk_size=4),
    "a chat of 3 turns": chat,
    "two texts with one beginning": forked,
    "forwards by hand": by_hand,
}


# In every model; others in the first one, and in `bin/test long`.
EVERYWHERE = {"a left-padded batch", "4 beams", "prompt lookup", "a chat of 3 turns"}
FIRST = next(iter(MODELS))


@pytest.mark.parametrize(
    ("pair", "decoding"),
    [
        pytest.param(model, name, marks=[] if name in EVERYWHERE or model == FIRST else pytest.mark.long)
        for model in MODELS
        for name in DECODINGS
    ],
    indirect=["pair"],
    scope="module",
)
def test_texts_and_logits_are_those_of_the_whole_local_model(pair: tuple[Any, Any], decoding: str) -> None:
    split, whole = pair
    with torch.no_grad():
        ours, theirs = DECODINGS[decoding](split.eval()), DECODINGS[decoding](whole.eval())
    assert len(ours) == len(theirs)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


# --- what only the split model has -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split(checkpoints: Callable[..., Path]) -> Iterator[PreTrainedModel]:
    path = str(checkpoints("llama", **SHARP))
    with served(path) as endpoint, zsl.RemoteTrunk(endpoint) as trunk:
        yield zsl.load_client(path, trunk).eval()


def trunk_of(model: Any) -> zsl.RemoteTrunk:
    return next(module for module in model.modules() if isinstance(module, zsl.RemoteTrunk))


@pytest.mark.parametrize("pair", list(MODELS), indirect=True)
def test_a_long_prompt_goes_in_pieces_and_the_text_stays(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pieces of a padded batch too. The first token is that of several passes, and so equal but for rounding."""
    split, _ = pair
    monkeypatch.setattr("zsl.client.trunk_cache.PIECE_TOKENS", 10)
    for inputs, pieces in ((prompt(2, 13), 3), (left_padded(), 6)):
        rows, tokens = inputs["input_ids"].shape
        assert pieces == -(-tokens // (10 // rows))
        before = trunk_of(split).client.traffic.answers
        (ours, *our_logits), (theirs, *their_logits) = (generated(model.eval(), inputs) for model in pair)
        assert trunk_of(split).client.traffic.answers - before == pieces + 11
        assert torch.equal(ours, theirs)
        assert all(torch.allclose(*both, atol=1e-4) for both in zip(our_logits, their_logits, strict=True))


def test_a_new_token_sends_itself_only(split: PreTrainedModel) -> None:
    trunk = trunk_of(split)
    sent = []
    for length in (8, 40):
        before = trunk.client.traffic.bytes_up
        generated(split, prompt(length=length), max_new_tokens=1)
        prefilled = trunk.client.traffic.bytes_up
        generated(split, prompt(length=length), max_new_tokens=11)
        sent.append(trunk.client.traffic.bytes_up - prefilled - (prefilled - before))
    assert sent[0] == pytest.approx(sent[1], rel=0.1)


def test_adapters_that_are_switched_off_or_changed_between_tokens_work_as_locally(
    checkpoints: Callable[..., Path],
) -> None:
    path = str(checkpoints("llama", **SHARP))
    with served(path) as endpoint, zsl.RemoteTrunk(endpoint) as trunk:
        results = []
        for whole in (zsl.load_client(path, trunk), local_model(path)):
            model = with_lora(whole, layers=range(6)).eval()
            cache, found = DynamicCache(config=model.config), []
            ids = prompt(length=9)["input_ids"]
            with torch.no_grad():

                def run(part: slice) -> None:
                    output = model(input_ids=ids[:, part], past_key_values=cache, use_cache=True)  # noqa: B023
                    found.append(output.logits)  # noqa: B023

                run(slice(0, 4))
                with model.disable_adapter():
                    run(slice(4, 6))
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.mul_(-1)
                run(slice(6, 9))
            results.append(found)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_log_probabilities_while_sampling_are_those_of_the_training_forward_but_for_rounding(
    checkpoints: Callable[..., Path],
) -> None:
    """And by the very rounding of the whole local model; 0 where both compute tensors of the same shapes."""
    path, begin = str(checkpoints("llama", **SHARP)), batches.tokens(2, 8)
    with served(path) as endpoint, zsl.RemoteTrunk(endpoint) as trunk:
        split, whole = (with_lora(one, layers=range(6)) for one in (zsl.load_client(path, trunk), local_model(path)))
        for use_cache in (True, False):
            sampled, trained = sampled_and_trained(split, begin, 12, use_cache=use_cache)
            assert 0 < (sampled - trained).abs().max() < 5e-5
            locally = sampled_and_trained(whole, begin, 12, use_cache=use_cache)
            assert torch.equal(sampled, locally[0]) and torch.equal(trained, locally[1])
        assert torch.equal(*sampled_and_trained(split, begin, 4, use_cache=False, prefixes=True))


STATIC: dict[str, Callable[[Any], list[torch.Tensor]]] = {
    "greedy": lambda model: generated(model, prompt(), cache_implementation="static"),
    "a left-padded batch": lambda model: generated(model, left_padded(), cache_implementation="static"),
    "3 beams": lambda model: generated(model, prompt(2), num_beams=3, cache_implementation="static"),
    "a prompt in pieces": lambda model: generated(
        model, prompt(2, 11), prefill_chunk_size=4, cache_implementation="static"
    ),
    "a chat of 3 turns": lambda model: chat(model, StaticCache(config=model.config, max_cache_len=64)),
    "used again": reset_and_used_again,
}


@pytest.mark.parametrize("pair", list(MODELS), indirect=True)
def test_a_static_cache_is_followed_and_the_text_is_the_whole_local_models(pair: tuple[Any, Any]) -> None:
    """Logits are equal but for rounding: the local model computes with the empty places of the cache too."""
    split, whole = (model.eval() for model in pair)
    for decode in STATIC.values():
        for ours, theirs in zip(decode(split), decode(whole), strict=True):
            assert ours.dtype == theirs.dtype and torch.allclose(ours, theirs, atol=1e-4)


def test_a_mask_of_four_dimensions_that_generate_did_not_make_is_refused(split: PreTrainedModel) -> None:
    with torch.no_grad(), pytest.raises(ModelError, match=r"an attention mask of shape \(1, 1, 8, 8\) cannot cross"):
        split(input_ids=prompt()["input_ids"], attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool).tril())


def test_a_cache_that_cannot_be_followed_is_refused_by_name(split: PreTrainedModel) -> None:
    class OtherCache(DynamicCache):
        pass

    with pytest.raises(ModelError, match=r"an? OtherCache is not supported.*DynamicCache"):
        generated(split, prompt(), past_key_values=OtherCache(config=split.config))
    assert generated(split, prompt(), max_new_tokens=2)[0].shape == (1, 10)


def test_a_forward_with_gradients_keeps_nothing_and_its_cache_is_refused_afterwards(split: PreTrainedModel) -> None:
    ids = prompt()["input_ids"]
    with_cache = split(input_ids=ids, use_cache=True)
    assert torch.equal(with_cache.logits, split(input_ids=ids).logits)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ModelError, match=r"past_key_values holds 8 tokens"):
            split(input_ids=ids[:, :1], past_key_values=with_cache.past_key_values)
    with torch.no_grad():
        kept = split(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ModelError, match="gradients do not pass the keys and values of 8 tokens"):
        split(input_ids=ids[:, :1], past_key_values=kept)
