"""LoRA, DoRA and IA³ on all layers of a split model, through a daemon: all numbers are the local ones, bit for bit."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import get_cosine_schedule_with_warmup

import zsl
from support import batches
from support.compare import differing, numbers_of, within
from support.embedded import served
from support.faulty_link import FaultyLink
from support.models import local_model
from support.relay import Relay
from zsl.adapters.export import export
from zsl.adapters.merge import merge
from zsl.errors import AdapterError, ModelError
from zsl.models.reference import resolve
from zsl.split.sides import Side, Sides
from zsl.wire.frames import MAGIC, decode
from zsl.wire.messages import TO_DAEMON, Adapter

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
STEPS, MICRO_BATCHES = 20, 4
TRAININGS = (  # family, whether with DoRA, and optimizer steps
    ("llama", False, STEPS),
    ("gpt2", True, 5),
    *(pytest.param(one, False, STEPS, marks=pytest.mark.long) for one in ("gpt2", "qwen3", "gemma2", "olmo2")),
    *(pytest.param(one, True, STEPS, marks=pytest.mark.long) for one in ("llama", "gpt2")),
)
SIDES: tuple[Side, ...] = ("bottom", "trunk", "top")
FILE = "adapter_model.safetensors"


def adapted(model: Any, **keys: Any) -> PeftModel:
    """The same adapter on each model, with nothing at zero."""
    torch.manual_seed(1)
    made = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": "all-linear", **keys}))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return made


def train(model: PeftModel, steps: int) -> list[torch.Tensor]:
    """Losses of AdamW with clipping by the global norm, a cosine schedule, and accumulation."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, steps)
    losses = []
    for _ in range(steps):
        for micro_batch in range(MICRO_BATCHES):
            ids = batches.tokens(1, 8, seed=micro_batch)
            loss = model(input_ids=ids, labels=ids).loss
            (loss / MICRO_BATCHES).backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(("family", "dora", "steps"), TRAININGS)
def test_a_training_is_the_local_one(family: str, dora: bool, steps: int, checkpoints: Callable[..., Path]) -> None:
    path = str(checkpoints(family))
    with served(path) as endpoint, zsl.RemoteTrunk(endpoint) as trunk:
        split, whole = (adapted(model, use_dora=dora) for model in (zsl.load_client(path, trunk), local_model(path)))
        expected = dict(whole.named_parameters())
        trained = {name: parameter for name, parameter in split.named_parameters() if parameter.requires_grad}
        assert any("magnitude" in name and ".2." in name for name in trained) is dora
        assert all(torch.equal(parameter, expected[name]) for name, parameter in trained.items())
        for batch in (batches.plain(), batches.padded("left")):
            assert differing(numbers_of(split, batch), numbers_of(whole, batch)) == []
        before = trunk.client.traffic
        losses = train(split.train(), steps)
        assert losses[-1] < losses[0]
        assert all(map(torch.equal, losses, train(whole.train(), steps)))
        after = whole.state_dict()
        assert all(torch.equal(one, after[name]) for name, one in split.state_dict().items())
        traffic = trunk.client.traffic - before
        elements = of_the_trunk(split).numel()
        versions = steps - 2  # the first was sent before, and in the first step the learning rate is 0
        assert 0 < traffic.adapter_bytes_up - versions * elements * 4 < versions * 3000
        assert traffic.adapter_bytes_down == steps * MICRO_BATCHES * elements * 4


def of_the_trunk(model: PeftModel) -> torch.Tensor:
    """Weights of the adapters on the trunk's layers, flat."""
    named = model.named_parameters()
    return torch.cat([one.detach().flatten() for name, one in named if ".lora_" in name and name.split(".")[4] in "23"])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batches.tokens(2, 16)).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def path(checkpoints: Callable[..., Path]) -> str:
    return str(checkpoints("llama"))


@pytest.fixture(scope="module")
def trunk(path: str) -> Iterator[zsl.RemoteTrunk]:
    with served(path) as endpoint, zsl.RemoteTrunk(endpoint) as trunk:
        yield trunk


def test_the_active_adapters_are_those_that_run(path: str, trunk: zsl.RemoteTrunk) -> None:
    split, whole = adapted(zsl.load_client(path, trunk)), adapted(local_model(path))
    bare = logits(local_model(path))
    more = LoraConfig(
        r=2, target_modules=["up_proj", "v_proj"], use_rslora=True, init_lora_weights=False, lora_bias=False
    )
    for model in (split, whole):
        torch.manual_seed(2)
        model.add_adapter("more", more)

    def both(model: Any) -> Any:
        model.base_model.set_adapter(["default", "more"])
        return model

    seen = [bare]
    for chosen in (lambda model: model.set_adapter("more"), both, lambda model: model.set_adapter("default")):
        chosen(split), chosen(whole)
        assert torch.equal(logits(split), logits(whole))
        assert not any(torch.equal(logits(split), earlier) for earlier in seen)
        seen.append(logits(split))
    with split.disable_adapter():
        assert torch.equal(logits(split), bare)
    both(split), both(whole)
    assert differing(numbers_of(split, batches.plain()), numbers_of(whole, batches.plain())) == []
    copied = copy.deepcopy(split)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert torch.equal(logits(copied), bare)
    assert torch.equal(logits(split), logits(whole))


def test_an_adapter_of_a_local_model_loads_and_one_that_was_trained_here_loads_there(
    path: str, trunk: zsl.RemoteTrunk, tmp_path: Path
) -> None:
    adapted(local_model(path), use_rslora=True, rank_pattern={"q_proj": 2}).save_pretrained(str(tmp_path / "whole"))
    split = PeftModel.from_pretrained(zsl.load_client(path, trunk), str(tmp_path / "whole"), is_trainable=True)
    whole = PeftModel.from_pretrained(local_model(path), str(tmp_path / "whole"), is_trainable=True)
    assert differing(numbers_of(split, batches.plain()), numbers_of(whole, batches.plain())) == []
    with torch.no_grad():
        for parameter in split.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    split.save_pretrained(str(tmp_path / "split"))
    loaded = PeftModel.from_pretrained(local_model(path), str(tmp_path / "split"))
    assert torch.equal(logits(loaded), logits(split))
    assert not torch.equal(logits(loaded), logits(local_model(path)))


def test_dora_is_made_saved_loaded_exported_and_merged_as_on_the_local_model(
    path: str, trunk: zsl.RemoteTrunk, tmp_path: Path
) -> None:
    keys = {"use_dora": True, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    split, whole = adapted(zsl.load_client(path, trunk), **keys), adapted(local_model(path), **keys)
    more = LoraConfig(r=2, target_modules=["down_proj", "up_proj"], use_dora=True, init_lora_weights="gaussian")
    for model in (split, whole):
        torch.manual_seed(2)
        model.add_adapter("more", more)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "magnitude" in name:
                    parameter.mul_(1.1)
        model.base_model.set_adapter(["default", "more"])
    assert differing(numbers_of(split, batches.plain()), numbers_of(whole, batches.plain())) == []
    assert torch.equal(logits(copy.deepcopy(split)), logits(whole))
    for model in (split, whole):
        model.set_adapter("default")
    zsl.save_adapter(split, tmp_path / "split")
    whole.save_pretrained(str(tmp_path / "whole"), selected_adapters=["default"])
    saved = load_file(tmp_path / "split" / FILE)
    assert sum("lora_magnitude_vector" in name for name in saved) == 2 * 6
    expected = load_file(tmp_path / "whole" / FILE)
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in expected)
    place = str(tmp_path / "whole")
    for base in (local_model(path), zsl.load_client(path, trunk)):
        for cheap in (False, True):
            loaded = PeftModel.from_pretrained(copy.deepcopy(base), place, low_cpu_mem_usage=cheap)
            assert torch.equal(logits(loaded), logits(whole))
    trained = zsl.load_adapter(zsl.load_client(path, trunk), place, is_trainable=True)
    assert differing(numbers_of(trained, batches.plain()), numbers_of(whole, batches.plain())) == []
    sides = Sides(zsl.load_client(path, trunk), trunk.client.welcome.cut)
    for side in SIDES:
        zsl.save_adapter(split, tmp_path / side, sides=sides, only=side)
    export([tmp_path / side for side in SIDES], resolve(path), tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / FILE)
    assert exported.keys() == saved.keys() and all(torch.equal(exported[name], saved[name]) for name in saved)
    merge([tmp_path / side for side in SIDES], resolve(path), tmp_path / "merged")
    of_merged, of_peft = local_model(str(tmp_path / "merged")).state_dict(), whole.merge_and_unload().state_dict()
    assert all(torch.equal(one, of_merged[name]) for name, one in of_peft.items())


def test_a_daemon_without_adapters_is_not_asked_for_norms(
    path: str, trunk: zsl.RemoteTrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    welcome = trunk.client.welcome.model_copy(update={"adapters": None})
    monkeypatch.setattr(zsl.TrunkClient, "welcome", welcome)
    with pytest.raises(ModelError, match="--no-adapters"):
        adapted(zsl.load_client(path, trunk), use_dora=True)
    assert adapted(zsl.load_client(path, trunk, layers="client"), use_dora=True)


def test_norms_are_those_of_the_linear_weights(path: str, trunk: zsl.RemoteTrunk) -> None:
    whole = local_model(path)
    paths = ["2.self_attn.q_proj", "3.mlp.down_proj"]
    for of_one, norms in zip(paths, trunk.client.weight_norms(paths), strict=True):
        weight = whole.get_parameter(f"model.layers.{of_one}.weight").detach()
        assert torch.equal(norms, torch.linalg.norm(weight, dim=1))
    for unknown in ("2.input_layernorm", "1.self_attn.q_proj", "2", ""):
        with pytest.raises(AdapterError, match=repr(unknown)):
            trunk.client.weight_norms([unknown])


def test_ia3_is_trained_saved_and_loaded_as_on_the_local_model(
    path: str, trunk: zsl.RemoteTrunk, tmp_path: Path
) -> None:
    inward = ["o_proj", "down_proj", "gate_proj"]
    config = IA3Config(target_modules=[*inward, "q_proj", "v_proj", "up_proj"], feedforward_modules=inward)
    split, whole = (get_peft_model(model, config) for model in (zsl.load_client(path, trunk), local_model(path)))
    for model in (split, whole):
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(1, 0.2)
    before = trunk.client.traffic
    for batch in (batches.plain(), batches.padded("left")):
        assert differing(numbers_of(split, batch), numbers_of(whole, batch)) == []
    elements = sum(
        one.numel() for name, one in split.named_parameters() if ".ia3_" in name and name.split(".")[4] in "23"
    )
    assert (trunk.client.traffic - before).adapter_bytes_down == 2 * elements * 4
    for model in (split, whole):
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
        for seed in range(3):
            ids = batches.tokens(1, 8, seed=seed)
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    expected = whole.state_dict()
    assert all(torch.equal(one, expected[name]) for name, one in split.state_dict().items())
    zsl.save_adapter(split, tmp_path)
    for base in (local_model(path), zsl.load_client(path, trunk)):
        assert torch.equal(logits(PeftModel.from_pretrained(base, str(tmp_path))), logits(whole))
    assert torch.equal(logits(zsl.load_adapter(zsl.load_client(path, trunk), tmp_path)), logits(whole))


def test_layers_to_transform_leaves_the_trunk_out_and_no_adapter_is_sent(path: str, trunk: zsl.RemoteTrunk) -> None:
    keys = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 1, 4, 5]}
    split, whole = adapted(zsl.load_client(path, trunk), **keys), adapted(local_model(path), **keys)
    before = trunk.client.traffic
    assert differing(numbers_of(split, batches.plain()), numbers_of(whole, batches.plain())) == []
    traffic = trunk.client.traffic - before
    assert (traffic.answers, traffic.adapter_bytes_up, traffic.adapter_bytes_down) == (2, 0, 0)


def test_a_version_crosses_once_in_the_life_of_a_daemon_although_connections_are_lost(path: str) -> None:
    with (
        served(path) as endpoint,
        Relay(endpoint) as relay,
        FaultyLink(int(relay.endpoint.rpartition(":")[2])) as link,
        zsl.RemoteTrunk(link.endpoint) as trunk,
    ):
        split = adapted(zsl.load_client(path, trunk))
        split.add_adapter("more", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
        optimizer = torch.optim.AdamW([one for name, one in split.named_parameters() if ".lora_" in name], lr=1e-2)
        for _ in range(2):
            for name in ("default", "more", "default"):
                split.set_adapter(name)
                split(**batches.plain()).loss.backward()
                logits(split)
                link.reset("both", after_bytes=0)
                trunk.client.status()  # brings it about
            optimizer.step()
            optimizer.zero_grad()
        assert link.happened["reset"] > 3
    starts = [at for at, frame in enumerate(relay.from_client) if len(frame) == 16 and frame.startswith(MAGIC)]
    messages = [relay.from_client[start:end] for start, end in itertools.pairwise([*starts, None])]
    headers = [decode(frames, TO_DAEMON).header for frames in messages]
    pieces = [(one.version, one.offset) for one in headers if isinstance(one, Adapter)]
    assert len({version for version, _ in pieces}) == 4
    assert len(pieces) == len(set(pieces))


def test_a_frozen_bottom_and_a_cut_at_the_first_layer_learn_too(path: str) -> None:
    for cut, layers in (("2:4", [2, 3, 4]), ("0:6", None)):
        with served(path, cut=cut) as endpoint, zsl.RemoteTrunk(endpoint) as trunk:
            keys = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": layers}
            split, whole = adapted(zsl.load_client(path, trunk), **keys), adapted(local_model(path), **keys)
            assert differing(numbers_of(split, batches.plain()), numbers_of(whole, batches.plain())) == []


def test_a_forward_only_daemon_runs_adapters_and_trains_none(path: str) -> None:
    with served(path, forward_only=True) as endpoint, zsl.RemoteTrunk(endpoint) as trunk:
        with pytest.warns(UserWarning, match="forward only"):
            split = adapted(zsl.load_client(path, trunk))
        assert torch.equal(logits(split), logits(adapted(local_model(path))))
        with pytest.raises(ModelError, match=r"learn nothing.*forward only"):
            split.train()(**batches.plain())


def test_in_bfloat16_on_the_wire_the_numbers_are_near(path: str, trunk: zsl.RemoteTrunk) -> None:
    with zsl.RemoteTrunk(trunk.endpoint, adapter_wire_dtype=torch.bfloat16) as narrow:
        split, whole = adapted(zsl.load_client(path, narrow)), adapted(local_model(path))
        found, expected = numbers_of(split, batches.plain()), numbers_of(whole, batches.plain())
        assert differing(found, expected, within(0.05)) == []
        assert differing(found, expected) != []
        assert narrow.client.traffic.adapter_bytes_down == of_the_trunk(split).numel() * 2


def test_an_adapter_computes_in_its_own_dtype_whatever_the_trunks_is(path: str, trunk: zsl.RemoteTrunk) -> None:
    split, whole = adapted(zsl.load_client(path, trunk)), adapted(local_model(path))
    for model in (split, whole):
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.bfloat16()
    assert differing(numbers_of(split, batches.plain()), numbers_of(whole, batches.plain())) == []
