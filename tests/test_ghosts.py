"""Modules of the trunk's layers in the client's model: PEFT finds them as in a local model; they hold no weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from torch import nn

import zsl
from support import batches
from support.compare import differing, numbers_of
from support.embedded import served
from support.models import CUT, local_model, with_lora
from zsl.errors import ConfigError, ModelError
from zsl.models.loading import AdaptedLayers, load_client_part
from zsl.models.reference import resolve
from zsl.split.cut import parse_cut
from zsl.split.ghosts import GhostWeight
from zsl.split.sides import Sides
from zsl.split.slots import trunk_slots
from zsl.split.stack import find_stack

FAMILIES = ("gpt2", "llama")
WAY_OUT = r'layers="client"'


@pytest.fixture(params=FAMILIES)
def path(request: pytest.FixtureRequest, checkpoints: Callable[..., Path]) -> str:
    return str(checkpoints(request.param))


def client(path: str, layers: AdaptedLayers = "all") -> Any:
    return load_client_part(resolve(path), parse_cut(CUT), layers=layers)


def on_all_layers(model: Any, **keys: Any) -> PeftModel:
    torch.manual_seed(3)
    config = LoraConfig(**{"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear", **keys})
    with pytest.warns() if model.config.model_type == "gpt2" else torch.no_grad():  # PEFT sets fan_in_fan_out itself
        return get_peft_model(model, config)


def ghosts(model: nn.Module) -> list[GhostWeight]:
    return [parameter for parameter in model.parameters() if isinstance(parameter, GhostWeight)]


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' memory, each storage once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def test_names_sizes_and_first_values_are_the_local_models(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    whole, split = local_model(path), client(path)
    for named in (nn.Module.named_modules, nn.Module.named_parameters):
        assert [name for name, _ in named(split)] == [name for name, _ in named(whole)]  # type: ignore[operator]
    assert split.num_parameters() == whole.num_parameters()
    whole, split = on_all_layers(whole), on_all_layers(split)
    expected = {name: one for name, one in whole.named_parameters() if one.requires_grad}
    found = {name: one for name, one in split.named_parameters() if one.requires_grad}
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    whole.print_trainable_parameters()
    split.print_trainable_parameters()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == printed[1]


def test_nothing_but_one_element_a_weight_is_held(path: str) -> None:
    without, split = client(path, "client"), client(path)
    held = ghosts(split)
    assert trunk_slots(find_stack(split)) == trunk_slots(find_stack(without)) == [2, 3]
    assert sum(ghost.numel() for ghost in held) > 10_000
    assert held_bytes(tensors(split)) == held_bytes(tensors(without)) + 4 * len(held)
    torch.manual_seed(0)
    everything: list[Any] = [split]
    everything.append(everything[-1].half())
    everything.append(copy.deepcopy(split).to("cpu", torch.float64))
    everything.append(copy.deepcopy(split).to(memory_format=torch.preserve_format).float())
    everything.append(prepare_model_for_kbit_training(copy.deepcopy(split)))
    everything.append(Accelerator(cpu=True).prepare(copy.deepcopy(split)))
    for each in everything:
        converted = ghosts(each)
        dtype = each.get_input_embeddings().weight.dtype
        assert [(ghost.shape, ghost.path) for ghost in converted] == [(ghost.shape, ghost.path) for ghost in held]
        assert {(ghost.dtype, ghost.requires_grad) for ghost in converted} == {(dtype, False)}
        assert held_bytes(converted) == dtype.itemsize * len(held)
    assert {ghost.device.type for ghost in ghosts(split.to("meta"))} == {"meta"}


def test_conversions_and_copies_of_a_weight_are_ghosts() -> None:
    ghost = GhostWeight.like(torch.zeros(()), torch.Size((3, 5)), "layers.2.weight")
    pickled = pickle.loads(pickle.dumps(ghost))
    for other in (ghost.data, ghost.detach(), ghost.clone(), torch.empty_like(ghost), copy.deepcopy(ghost), pickled):
        assert isinstance(other, GhostWeight)
        assert (other.shape, other.dtype, other.path) == ((3, 5), torch.float32, "layers.2.weight")
        assert held_bytes([other]) == 4
    assert ghost.to(torch.ones((), dtype=torch.float16)).dtype == torch.float16
    assert torch.ones(2).to(ghost.bfloat16()).dtype == torch.bfloat16
    assert ghost.requires_grad_(False) is ghost
    assert isinstance(nn.Parameter(ghost, requires_grad=False), GhostWeight)
    assert len({ghost, ghost.detach()}) == 2
    assert "layers.2.weight" in repr(ghost)


@pytest.mark.parametrize(
    "operation",
    [
        lambda ghost: ghost + 1,
        lambda ghost: ghost.data.add_(1),
        lambda ghost: torch.ones(1, 5) @ ghost.T,
        lambda ghost: nn.functional.linear(torch.ones(1, 5), ghost),
        lambda ghost: torch.cat([torch.ones(1, 5), ghost]),
        lambda ghost: ghost.requires_grad_(),
        lambda ghost: setattr(ghost, "requires_grad", True),
        lambda ghost: setattr(ghost, "data", torch.ones(3, 5)),
        lambda ghost: ghost.copy_(torch.ones(3, 5)),
        lambda ghost: ghost.int(),
        lambda ghost: ghost.tolist(),
        lambda ghost: ghost.numpy(),
        lambda ghost: torch.equal(ghost, ghost),
        lambda ghost: torch.zeros_like(ghost),
    ],
)
def test_an_operation_that_needs_the_values_is_refused_by_name(operation: Callable[[Any], Any]) -> None:
    with pytest.raises(ModelError, match=rf"^layers\.2\.weight .*{WAY_OUT}"):
        operation(GhostWeight.like(torch.zeros(()), torch.Size((3, 5)), "layers.2.weight"))


def test_a_ghost_has_the_norms_of_its_rows_for_the_first_magnitude_of_dora() -> None:
    norms = torch.arange(3.0)
    ghost = GhostWeight.like(torch.zeros(()), torch.Size((3, 5)), "layers.2.weight", lambda: norms)
    turned = GhostWeight.like(torch.zeros(()), torch.Size((5, 3)), "layers.2.weight", lambda: norms)
    zeros = torch.zeros(3, 5)
    for one in (ghost, ghost.bfloat16().float(), copy.deepcopy(ghost), nn.Parameter(turned.T), ghost + zeros):
        found = torch.linalg.norm(one + zeros, dim=1)
        assert type(found) is torch.Tensor and torch.equal(found, norms) and found.data_ptr() != norms.data_ptr()
    assert torch.linalg.norm(ghost.half() + zeros.half(), dim=1).dtype == torch.float16
    meta = torch.linalg.norm(ghost.to("meta") + zeros.to("meta"), dim=1)
    assert meta.is_meta and meta.shape == (3,)
    pickled = pickle.loads(pickle.dumps(ghost))
    for ask in (
        lambda: torch.linalg.norm(pickled + zeros, dim=1),
        lambda: torch.linalg.norm(ghost + zeros, dim=0),
        lambda: torch.linalg.norm(ghost + zeros),
        lambda: torch.linalg.norm(turned + zeros.T, dim=1),
        lambda: ghost + torch.ones(3, 5),
        lambda: ghost + torch.zeros(5),
        lambda: (ghost + zeros).tolist(),
    ):
        with pytest.raises(ModelError, match=rf"^layers\.2\.weight .*{WAY_OUT}"):
            ask()


@pytest.mark.parametrize(
    "keys",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"modules_to_save": ["input_layernorm"]},
        {"bias": "all"},
    ],
    ids=str,
)
def test_an_adapter_that_needs_the_weights_is_refused_when_it_is_made(
    keys: dict[str, Any], checkpoints: Callable[..., Path]
) -> None:
    with pytest.raises(ModelError, match=rf"layers\.2\..*{WAY_OUT}"):
        on_all_layers(client(str(checkpoints("qwen2"))), **keys)


def test_running_and_merging_a_layer_are_refused_by_name(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    split = client(str(checkpoints("llama")))
    layer = split.model.layers[3]
    with pytest.raises(ModelError, match=rf"layers\.3\.mlp\.gate_proj\.weight.*{WAY_OUT}"):
        layer.mlp(torch.ones(1, 2, 32))
    adapted = on_all_layers(split)
    for merge in ("merge_adapter", "merge_and_unload"):
        with pytest.raises(ModelError, match=r"layers\.2\.self_attn\.q_proj\.weight.*zsl merge"):
            getattr(copy.deepcopy(adapted), merge)()


def test_a_state_dict_has_the_adapters_and_no_weights_of_the_trunk(path: str, tmp_path: Path) -> None:
    whole, split = on_all_layers(local_model(path)), on_all_layers(client(path))
    state = split.state_dict()
    of_the_trunk = {name for name in whole.state_dict() if ".2." in name or ".3." in name}
    assert whole.state_dict().keys() - state.keys() == {name for name in of_the_trunk if ".lora_" not in name}
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "state.safetensors")
    state = load_file(tmp_path / "state.safetensors")
    with torch.no_grad():
        for name, parameter in split.named_parameters():
            if ".lora_" in name:
                parameter.zero_()
    split.load_state_dict(state)
    copied = copy.deepcopy(split)
    assert all(torch.equal(copied.state_dict()[name], tensor) for name, tensor in state.items())
    split.save_pretrained(str(tmp_path / "adapter"))
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    whole.save_pretrained(str(tmp_path / "whole"))
    expected = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    again = PeftModel.from_pretrained(client(path), str(tmp_path / "whole"))
    assert again.load_state_dict(expected, strict=False).unexpected_keys  # PEFT's file leaves out the adapter's name
    assert all(torch.equal(again.state_dict()[name], state[name]) for name in state)


@pytest.mark.parametrize("name", ["2.mlp.up_proj.weight", "3.mlp.up_proj.lora_A.default.weight", "2.other.weight"])
def test_a_weight_that_the_model_would_drop_is_refused(name: str, checkpoints: Callable[..., Path]) -> None:
    split = client(str(checkpoints("llama")))
    with pytest.raises(ModelError, match=rf"^model\.layers\.{name} "):
        split.load_state_dict({f"model.layers.{name}": torch.zeros(64, 32)}, strict=False)


def test_distributed_data_parallel_does_not_send_them(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    adapted = on_all_layers(client(str(checkpoints("llama"))))
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(adapted)
    finally:
        torch.distributed.destroy_process_group()
    assert len(parallel.parameters_to_ignore) == 2 * len(ghosts(adapted))
    assert held_bytes(ghosts(parallel)) == 4 * len(ghosts(adapted))


def test_the_trunks_modules_are_neither_bottom_nor_top(path: str) -> None:
    model = client(path)
    sides, without = Sides(model, parse_cut(CUT)), Sides(client(path, "client"), parse_cut(CUT))
    names = [next(name for name, _ in model.named_parameters() if f".{index}." in name) for index in range(1, 5)]
    assert [sides.side_of(name) for name in names] == ["bottom", "trunk", "trunk", "top"]
    assert [sides.parameter_count(side) for side in ("bottom", "top")] == [
        without.parameter_count(side) for side in ("bottom", "top")
    ]
    assert sides.parameter_count("trunk") == sum(ghost.numel() for ghost in ghosts(model))


def test_a_model_of_a_daemon_runs_and_shares_its_trunk_with_others(path: str) -> None:
    batch = batches.plain()
    with served(path) as endpoint, zsl.RemoteTrunk(endpoint) as trunk:
        with pytest.raises(ConfigError, match="'some'"):
            zsl.load_client(path, trunk, layers="some")  # type: ignore[arg-type]
        one, two = zsl.load_client(path, trunk), zsl.load_client(path, trunk)
        slots = [find_stack(model).layers[2] for model in (one, two, copy.deepcopy(one))]
        assert slots[0] is trunk
        assert len(set(slots)) == 3
        assert len({child for slot in slots for child in slot.children()}) == 3 * len(list(trunk.children()))
        assert len({id(slot.client) for slot in slots}) == 1  # type: ignore[union-attr]
        assert [name for name, _ in one.named_parameters()] == [name for name, _ in two.named_parameters()]
        one.resize_token_embeddings(213)
        one.activation_checkpointing_enable({"use_reentrant": False})
        assert one.train()(**batch).loss.isfinite()
        one.activation_checkpointing_disable()
        without = with_lora(zsl.load_client(path, trunk, layers="client"))
        expected = numbers_of(without, batch)
        assert differing(numbers_of(with_lora(two), batch), expected) == []
        compiled: Any = torch.compile(two, backend="eager")
        with torch.no_grad():
            assert torch.equal(compiled(**batch).logits, expected.logits)
