"""Adapters of all layers on a split model: made, saved, loaded and exported as PEFT's of the whole model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import zsl
from support.models import CUT, local_model
from zsl.adapters.attach import with_adapter
from zsl.adapters.export import export
from zsl.adapters.save import adapter_parameters
from zsl.errors import ConfigError, ModelError
from zsl.models.loading import AdaptedLayers, load_client_part
from zsl.models.reference import resolve
from zsl.split.cut import parse_cut
from zsl.split.sides import Side, Sides
from zsl.training.config.peft_table import peft_config

SIDES: tuple[Side, ...] = ("bottom", "trunk", "top")
FILE = "adapter_model.safetensors"


@pytest.fixture(params=["gpt2", "llama"])
def path(request: pytest.FixtureRequest, checkpoints: Callable[..., Path]) -> str:
    return str(checkpoints(request.param))


@pytest.fixture
def llama(checkpoints: Callable[..., Path]) -> str:
    return str(checkpoints("llama"))


def client(path: str, layers: AdaptedLayers = "all") -> Any:
    return load_client_part(resolve(path), parse_cut(CUT), layers=layers)


def adapted(path: str, **keys: Any) -> tuple[PeftModel, PeftModel]:
    """The split and the whole model with the same adapter on all layers, with nothing at zero."""
    gpt2 = "gpt2" in Path(path).name
    models = []
    for model in (client(path), local_model(path)):
        torch.manual_seed(1)
        config = LoraConfig(
            **{"r": 4, "target_modules": "all-linear", "fan_in_fan_out": gpt2, "task_type": "CAUSAL_LM", **keys}
        )
        with torch.no_grad():
            made = get_peft_model(model, config)
            for name, parameter in made.named_parameters():
                if ".lora_" in name:
                    parameter.normal_(std=0.05)
        models.append(made)
    return models[0], models[1]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def differing_keys(one: Path, other: Path) -> set[str]:
    """The keys of two adapters' configurations that are not equal."""
    configs = [PeftConfig.from_pretrained(str(place)).to_dict() for place in (one, other)]
    assert configs[0].keys() == configs[1].keys()
    return {key for key in configs[0] if configs[0][key] != configs[1][key]}


def loaded_without_a_remark(model: Any, place: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        return PeftModel.from_pretrained(model, str(place))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"target_modules": r".*\.(c_attn|c_fc|q_proj|up_proj)", "use_rslora": True},
        {
            "target_modules": ["c_attn", "c_proj", "q_proj", "o_proj"],
            "layers_to_transform": [1, 2, 5],
            "rank_pattern": {".*(c_proj|o_proj)": 2},
        },
    ],
    ids=["all", "pattern", "some layers"],
)
def test_what_is_saved_is_what_peft_saves_of_the_whole_model(path: str, keys: dict[str, Any], tmp_path: Path) -> None:
    split, whole = adapted(path, **keys)
    zsl.save_adapter(split, tmp_path / "split")
    whole.save_pretrained(str(tmp_path / "whole"))
    assert same(load_file(tmp_path / "split" / FILE), load_file(tmp_path / "whole" / FILE))
    assert differing_keys(tmp_path / "split", tmp_path / "whole") <= {"base_model_name_or_path"}
    again = loaded_without_a_remark(local_model(path), tmp_path / "split")
    assert same(again.state_dict(), whole.state_dict())


def test_the_three_sides_of_an_adapter_are_exported_as_the_whole_one(path: str, tmp_path: Path) -> None:
    sides = Sides(client(path), parse_cut(CUT))
    split, whole = adapted(path, rank_pattern={".*(c_proj|o_proj)": 2})
    whole.save_pretrained(str(tmp_path / "whole"))
    expected = load_file(tmp_path / "whole" / FILE)
    for side, layers in zip(SIDES, ("01", "23", "45"), strict=True):
        zsl.save_adapter(split, tmp_path / side, sides=sides, only=side)
        tensors = load_file(tmp_path / side / FILE)
        assert {name for name in expected if any(f".{index}." in name for index in layers)} == tensors.keys()
        assert sum(tensor.numel() for tensor in tensors.values()) == adapter_parameters(split, sides, side)
        loaded_without_a_remark(local_model(path), tmp_path / side)
    zsl.save_adapter(split, tmp_path / "all")
    for places in ([tmp_path / side for side in SIDES], [tmp_path / "all"]):
        exported = export(places, resolve(path), tmp_path / f"exported {len(places)}")
        assert exported.layers == [0, 1, 2, 3, 4, 5]
        assert same(load_file(tmp_path / f"exported {len(places)}" / FILE), expected)
        loaded = loaded_without_a_remark(local_model(path), tmp_path / f"exported {len(places)}")
        assert same(loaded.state_dict(), whole.state_dict())
    assert differing_keys(tmp_path / "exported 1", tmp_path / "whole") <= {"base_model_name_or_path"}


def test_a_whole_adapter_is_loaded_for_use_or_training_where_all_layers_are(path: str, tmp_path: Path) -> None:
    _, whole = adapted(path)
    whole.save_pretrained(str(tmp_path))
    expected = {name: tensor for name, tensor in whole.state_dict().items() if ".lora_" in name}
    loaded = [zsl.load_adapter(client(path), tmp_path, is_trainable=trained) for trained in (False, True)]
    loaded += [
        PeftModel.from_pretrained(client(path), str(tmp_path), is_trainable=trained) for trained in (False, True)
    ]
    for split, trained in zip(loaded, (False, True) * 2, strict=True):
        weights = {name: parameter for name, parameter in split.named_parameters() if ".lora_" in name}
        assert same(dict(weights), expected)
        assert {parameter.requires_grad for parameter in weights.values()} == {trained}
        assert split.training is trained
    for load in (zsl.load_adapter, PeftModel.from_pretrained):
        with pytest.raises(ModelError, match=r'\.2\..*layers="all".*zsl merge'):
            load(client(path, "client"), str(tmp_path))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"use_dora": True, "init_lora_weights": "olora"}, r"use_dora = True.*layers\.2\.self_attn\.q_proj"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights = 'pissa'.*layers\.2\."),
        ({"modules_to_save": ["input_layernorm"]}, r"modules_to_save = \['input_layernorm'\].*layers\.2\."),
        ({"target_modules": [], "target_parameters": ["up_proj.weight"]}, r"target_parameters.*2\.mlp\.up_proj"),
        ({"alora_invocation_tokens": [1, 2]}, r"2\.self_attn\.q_proj has ALora"),
        ({"method": "unilora"}, r"UNILORA.* 2\.self_attn\.q_proj"),
        ({"method": "ln_tuning", "target_modules": ["input_layernorm"]}, r"LN_TUNING.*layers\.2\.input_layernorm"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_what_the_trunk_does_not_compute_is_refused_by_name(keys: dict[str, Any], named: str, llama: str) -> None:
    config = peft_config("run.toml", {"target_modules": ["q_proj"], **keys})
    with pytest.raises(ConfigError, match=rf'{named}.*layers="client"'):
        with_adapter(client(llama), config)
    assert with_adapter(client(llama, "client"), config)


def test_names_in_the_trunk_are_names_as_others_where_all_layers_are(llama: str) -> None:
    for keys in ({"layers_to_transform": [2, 3]}, {"target_modules": ["layers.3.self_attn.q_proj"]}):
        config = peft_config("run.toml", {"target_modules": ["q_proj"], **keys})
        with pytest.raises(ConfigError, match=r'trunk.*layers="all"'):
            with_adapter(client(llama, "client"), config)
        sides = Sides(client(llama), parse_cut(CUT))
        parameters = [adapter_parameters(with_adapter(client(llama), config), sides, side) for side in SIDES]
        assert parameters[1] > 0 and parameters[0] == parameters[2] == 0
    prompts = peft_config("run.toml", {"method": "adaption_prompt", "adapter_len": 4, "adapter_layers": 3})
    with pytest.raises(ConfigError, match="adapter_layers = 3: 2 layers are behind the trunk"):
        with_adapter(client(llama), prompts)


def test_a_whole_adapter_that_the_trunk_does_not_compute_is_not_loaded(llama: str, tmp_path: Path) -> None:
    config = peft_config("run.toml", {"target_modules": ["q_proj"], "alora_invocation_tokens": [1, 2]})
    get_peft_model(local_model(llama), config).save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match=r"2\.self_attn\.q_proj.*zsl merge"):
        zsl.load_adapter(client(llama), tmp_path)
