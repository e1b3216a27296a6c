"""The adapter of a split model is a PEFT adapter of the whole one, and PEFT has nothing to say about it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import zsl
from support import batches
from support.embedded import served
from support.models import CUT, local_model, with_lora
from zsl.adapters.save import adapter_parameters
from zsl.errors import ModelError
from zsl.split.cut import parse_cut
from zsl.split.sides import Sides


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def path(request: pytest.FixtureRequest, checkpoints: Callable[..., Path]) -> str:
    return str(checkpoints(request.param))


@pytest.fixture
def trunk(path: str) -> Iterator[zsl.RemoteTrunk]:
    with served(path) as endpoint:
        made = zsl.RemoteTrunk(endpoint)
        yield made
        made.close()


def logits_on_the_whole_model(path: str, directory: Path) -> torch.Tensor:
    """The adapter loaded by PEFT alone, with every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        loaded = PeftModel.from_pretrained(local_model(path), str(directory))
        return loaded(input_ids=batches.tokens(2, 16)).logits


def test_loaded_on_the_whole_model_it_gives_the_split_models_logits(
    path: str, trunk: zsl.RemoteTrunk, tmp_path: Path
) -> None:
    split = with_lora(zsl.load_client(path, trunk))
    zsl.save_adapter(split, tmp_path / "adapter")
    split.eval()
    expected = split(input_ids=batches.tokens(2, 16)).logits
    assert torch.equal(logits_on_the_whole_model(path, tmp_path / "adapter"), expected)
    assert not torch.equal(local_model(path)(input_ids=batches.tokens(2, 16)).logits, expected)


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q_proj|c_attn)$"])
def test_targets_given_as_one_string_load_without_a_warning(
    path: str, trunk: zsl.RemoteTrunk, tmp_path: Path, targets: str
) -> None:
    config = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out="gpt2" in path)
    split = get_peft_model(zsl.load_client(path, trunk, layers="client"), config).eval()
    zsl.save_adapter(split, tmp_path / "adapter")
    expected = split(input_ids=batches.tokens(2, 16)).logits
    assert torch.equal(logits_on_the_whole_model(path, tmp_path / "adapter"), expected)


def test_bottom_and_top_together_are_the_whole_adapter_and_each_loads(
    path: str, trunk: zsl.RemoteTrunk, tmp_path: Path
) -> None:
    base = zsl.load_client(path, trunk)
    sides = Sides(base, parse_cut(CUT))
    split = with_lora(base)
    zsl.save_adapter(split, tmp_path / "adapter")
    parts = {}
    for side in ("bottom", "top"):
        zsl.save_adapter(split, tmp_path / side, sides=sides, only=side)
        parts[side] = load_file(tmp_path / side / "adapter_model.safetensors")
        assert sum(t.numel() for t in parts[side].values()) == adapter_parameters(split, sides, side)
        config = json.loads((tmp_path / side / "adapter_config.json").read_text())
        layers = {"bottom": (0, 1), "top": (4, 5)}[side]
        named = config["layers_to_transform"] or [int(name.split(".")[2]) for name in config["target_modules"]]
        assert set(named) == set(layers)
        logits_on_the_whole_model(path, tmp_path / side)
    whole = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert parts["bottom"].keys().isdisjoint(parts["top"])
    assert {**parts["bottom"], **parts["top"]}.keys() == whole.keys()


def test_an_older_adapter_is_replaced_and_other_files_stay(path: str, trunk: zsl.RemoteTrunk, tmp_path: Path) -> None:
    split = with_lora(zsl.load_client(path, trunk))
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "notes.txt").touch()
    (target / "adapter_model.safetensors").write_bytes(b"older")
    zsl.save_adapter(split, target)
    assert {file.name for file in target.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "notes.txt"}
    assert load_file(target / "adapter_model.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_the_active_adapter_is_the_one_that_is_saved(path: str, trunk: zsl.RemoteTrunk, tmp_path: Path) -> None:
    targets = ["c_attn"] if "gpt2" in path else ["q_proj"]
    configs = [LoraConfig(r=rank, target_modules=targets, fan_in_fan_out="gpt2" in path) for rank in (2, 3)]
    split = get_peft_model(zsl.load_client(path, trunk, layers="client"), configs[0], adapter_name="mine")
    split.add_adapter("other", configs[1])
    split.set_adapter("other")
    zsl.save_adapter(split, tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in weights.values()} == {3}
    assert PeftModel.from_pretrained(local_model(path), str(tmp_path / "adapter"))


def test_a_model_without_peft_is_refused_by_its_class(path: str, trunk: zsl.RemoteTrunk, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"(LMHeadModel|ForCausalLM) .* get_peft_model"):
        zsl.save_adapter(zsl.load_client(path, trunk), tmp_path / "adapter")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_side_without_adapters_is_a_clear_error(path: str, trunk: zsl.RemoteTrunk, tmp_path: Path) -> None:
    base = zsl.load_client(path, trunk)
    sides = Sides(base, parse_cut(CUT))
    split = with_lora(base, layers=(4, 5))
    with pytest.raises(ModelError, match="bottom"):
        zsl.save_adapter(split, tmp_path / "bottom", sides=sides, only="bottom")


def test_a_tied_weight_counts_on_both_sides(trunk: zsl.RemoteTrunk, path: str) -> None:
    model = zsl.load_client(path, trunk)
    sides = Sides(model, parse_cut(CUT))
    total = sum(parameter.numel() for parameter in model.parameters()) - sides.parameter_count("trunk")
    tied = model.get_input_embeddings().weight.numel() if model.config.tie_word_embeddings else 0
    assert sides.parameter_count("bottom") + sides.parameter_count("top") == total + tied
    assert (tied > 0) == ("gpt2" in path)
