"""PEFT's prefix tuning of a split model: keys and values of the trunk's layers cross, and every number is the local
model's, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import CartridgeConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model, inject_adapter_in_model
from transformers import DynamicCache, Trainer, TrainingArguments

import zsl
from support import batches
from support.compare import differing, numbers_of, within
from support.embedded import served
from support.models import local_model, with_lora
from zsl.client.gradient_sum import StepSums, micro_batch
from zsl.client.overlap import run_overlapped
from zsl.errors import ModelError

FAMILIES = ("llama", *(pytest.param(one, marks=pytest.mark.long) for one in ("gpt2", "qwen3", "gemma2", "opt")))
TOKENS = 5  # virtual
STEPS, MICRO_BATCHES = 3, 2
BATCHES = (batches.plain(), batches.padded("left"), batches.padded("right"))


def tuned(model: Any, *, seed: int = 1, **keys: Any) -> PeftModel:
    """The same prefix on each model."""
    torch.manual_seed(seed)
    return get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, **keys))


def train(model: PeftModel) -> list[torch.Tensor]:
    """Losses of AdamW with accumulation over micro-batches of other numbers of rows."""
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        sums = StepSums()
        for number in range(MICRO_BATCHES):
            with micro_batch(sums, is_last=number == MICRO_BATCHES - 1):
                loss = model(**batches.plain(2 + number, seed=number)).loss
                loss.backward()
            losses.append(loss.detach())
        optimizer.step()
    return losses


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batches.tokens(2, 16)).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_is_the_local_one(family: str, checkpoints: Callable[..., Path]) -> None:
    path = str(checkpoints(family))
    with served(path) as endpoint, zsl.RemoteTrunk(endpoint) as trunk:
        split, whole = tuned(zsl.load_client(path, trunk)), tuned(local_model(path))
        for batch in BATCHES:
            assert differing(numbers_of(split, batch), numbers_of(whole, batch)) == []
        before = trunk.client.traffic
        losses = train(split.train())
        assert losses[-MICRO_BATCHES] < losses[0]
        assert all(map(torch.equal, losses, train(whole.train())))
        expected = whole.state_dict()
        assert all(torch.equal(one, expected[name]) for name, one in split.state_dict().items())
        traffic = trunk.client.traffic - before
        of_the_trunk = whole.prompt_encoder["default"].embedding.weight.nbytes * 2 // 6  # two layers of six
        assert traffic.adapter_bytes_down == STEPS * MICRO_BATCHES * of_the_trunk, "one copy for all rows"
        assert 0 < traffic.adapter_bytes_up - (STEPS - 1) * of_the_trunk < STEPS * 1000


@pytest.fixture(scope="module")
def path(checkpoints: Callable[..., Path]) -> str:
    return str(checkpoints("llama"))


@pytest.fixture(scope="module")
def trunk(path: str) -> Iterator[zsl.RemoteTrunk]:
    with served(path) as endpoint, zsl.RemoteTrunk(endpoint) as trunk:
        yield trunk


def test_positions_that_are_given_and_a_row_of_one_token_are_the_local_ones(path: str, trunk: zsl.RemoteTrunk) -> None:
    split, whole = tuned(zsl.load_client(path, trunk)), tuned(local_model(path))
    for batch in (batches.packed(), {**batches.plain(1, 2), "labels": None}):
        with torch.no_grad():
            assert torch.equal(split(**batch).logits, whole(**batch).logits)


def test_with_a_projection_the_numbers_are_the_local_ones(path: str, trunk: zsl.RemoteTrunk) -> None:
    """Its rows may differ by rounding, and cross then; where they do not, their gradients come back as one sum."""
    keys = {"prefix_projection": True, "encoder_hidden_size": 24}
    split, whole = tuned(zsl.load_client(path, trunk), **keys), tuned(local_model(path), **keys)
    for batch in BATCHES:
        found, expected = numbers_of(split, batch), numbers_of(whole, batch)
        assert differing(found, expected, within(1e-6)) == []
        assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert all(map(within(1e-5), train(split.train()), train(whole.train())))


def test_a_cartridge_is_a_prefix_too(path: str, trunk: zsl.RemoteTrunk) -> None:
    def made(model: Any) -> PeftModel:
        torch.manual_seed(1)
        return get_peft_model(model, CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))

    split, whole = made(zsl.load_client(path, trunk)), made(local_model(path))
    assert differing(numbers_of(split, batches.plain()), numbers_of(whole, batches.plain())) == []


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_lora_on_all_layers_may_be_beside_a_prefix(path: str, trunk: zsl.RemoteTrunk) -> None:
    def both(model: Any) -> PeftModel:
        torch.manual_seed(2)
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        made = tuned(inject_adapter_in_model(config, model))
        for name, parameter in made.named_parameters():
            if ".lora_" in name:
                parameter.requires_grad_()
        return made

    split, whole = both(zsl.load_client(path, trunk)), both(local_model(path))
    for batch in (batches.plain(), batches.padded("left")):
        assert differing(numbers_of(split, batch), numbers_of(whole, batch)) == []


def test_clients_with_other_prefixes_and_lora_train_at_one_daemon_at_once(path: str, trunk: zsl.RemoteTrunk) -> None:
    def trained(model: PeftModel) -> dict[str, torch.Tensor]:
        train(model.train())
        return model.state_dict()

    makers = [tuned, partial(tuned, seed=3), partial(with_lora, layers=range(6))]
    with ExitStack() as stack, ThreadPoolExecutor(len(makers)) as pool:
        trunks = [stack.enter_context(zsl.RemoteTrunk(trunk.endpoint)) for _ in makers]
        clients = [make(zsl.load_client(path, one)) for make, one in zip(makers, trunks, strict=True)]
        found = list(pool.map(trained, clients))
    for make, ours in zip(makers, found, strict=True):
        expected = trained(make(local_model(path)))
        assert all(torch.equal(one, expected[name]) for name, one in ours.items())


def test_a_daemon_that_is_lost_before_the_backward_changes_no_gradient(path: str, trunk: zsl.RemoteTrunk) -> None:
    whole = tuned(local_model(path))
    with ExitStack() as first:
        endpoint = first.enter_context(served(path))
        with zsl.RemoteTrunk(f"{endpoint},{trunk.endpoint}") as both:
            split = tuned(zsl.load_client(path, both))
            batch = batches.padded("left")
            loss = split(**batch).loss
            first.close()
            loss.backward()
            whole(**batch).loss.backward()
            for ours, theirs in zip(split.parameters(), whole.parameters(), strict=True):
                assert not theirs.requires_grad or torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


def test_a_prefix_of_a_local_model_loads_and_one_that_was_trained_here_loads_there(
    path: str, trunk: zsl.RemoteTrunk, tmp_path: Path
) -> None:
    tuned(local_model(path)).save_pretrained(str(tmp_path / "whole"))
    whole, again = (
        tuned(local_model(path)),
        PeftModel.from_pretrained(zsl.load_client(path, trunk), str(tmp_path / "whole")),
    )
    assert torch.equal(logits(again), logits(whole))
    split = zsl.load_adapter(zsl.load_client(path, trunk), tmp_path / "whole", is_trainable=True)
    assert differing(numbers_of(split, batches.plain()), numbers_of(whole, batches.plain())) == []
    train(split.train())
    split.save_pretrained(str(tmp_path / "peft"))
    zsl.save_adapter(split, tmp_path / "zsl")
    for saved in ("peft", "zsl"):
        loaded = PeftModel.from_pretrained(local_model(path), str(tmp_path / saved))
        assert torch.equal(logits(loaded), logits(split))
        again = zsl.load_adapter(zsl.load_client(path, trunk), tmp_path / saved, is_trainable=True)
        assert torch.equal(logits(again), logits(split))
    assert not torch.equal(logits(split), logits(whole))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_trainer_trains_a_prefix_as_locally(path: str, trunk: zsl.RemoteTrunk, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in batches.tokens(8, 12)]
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        max_steps=3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    weights = []
    for model in (zsl.load_client(path, trunk), local_model(path)):
        made = tuned(model)
        Trainer(model=made, args=arguments, train_dataset=rows).train()  # type: ignore[arg-type]
        weights.append(made.prompt_encoder["default"].embedding.weight)
    assert torch.equal(*weights)


def test_rows_may_have_prefixes_of_their_own(path: str, trunk: zsl.RemoteTrunk) -> None:
    split, whole = (with_lora(model, layers=range(6)) for model in (zsl.load_client(path, trunk), local_model(path)))
    found, expected = (
        numbers_of(model, {**batches.plain(3), "past_key_values": cache(rows=3, same=False)})
        for model in (split, whole)
    )
    assert differing(found, expected) == []


def cache(*, rows: int = 2, layers: int = 6, values: int = 8, same: bool = True, of_layer_0: int = TOKENS) -> Any:
    """A prefix of the tiny llama."""
    filled = DynamicCache()
    for index in range(layers):
        length = of_layer_0 if index == 0 else TOKENS
        keys = torch.zeros(rows, 2, length, 8) + (torch.zeros(1) if same else torch.arange(rows).view(-1, 1, 1, 1))
        filled.update(keys, torch.zeros(rows, 2, length, values), index)
    return filled


@pytest.mark.parametrize("changes", [{"of_layer_0": TOKENS + 1}, {"layers": 3}, {"values": 4}], ids=str)
def test_a_cache_that_is_no_prefix_is_refused(changes: dict[str, Any], path: str, trunk: zsl.RemoteTrunk) -> None:
    model = zsl.load_client(path, trunk)
    with pytest.raises(ModelError, match="past_key_values"):
        model(input_ids=batches.tokens(2, 4), past_key_values=cache(**changes))


def test_a_prefix_is_refused_where_it_cannot_reach_the_trunk(path: str, trunk: zsl.RemoteTrunk) -> None:
    with pytest.raises(ModelError, match=r'layers="all"'):
        tuned(zsl.load_client(path, trunk, layers="client"))(**batches.plain())
    split = tuned(zsl.load_client(path, trunk))
    with pytest.raises(ModelError, match="overlap"):
        run_overlapped([lambda: split(**batches.plain()).loss.backward()], in_flight=1)
    with pytest.raises(ModelError, match="use_cache=False"):
        split(**batches.plain(), use_cache=True)
    base, used = zsl.load_client(path, trunk), cache()
    base(input_ids=batches.tokens(2, 4), past_key_values=used)
    with pytest.raises(ModelError, match="past_key_values"):
        base(input_ids=batches.tokens(2, 4), past_key_values=used)
