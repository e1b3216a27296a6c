"""`zsl export`: what was trained at the two ends of a model becomes one adapter, which needs no zsl."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig
from safetensors.torch import load_file, save_file

import zsl
from support import batches
from support.compare import within
from support.embedded import served
from support.fresh import logits_elsewhere
from support.models import CUT, local_model
from zsl.adapters.attach import with_adapter
from zsl.cli.zsl import zsl as command
from zsl.errors import EXIT_RUN_FAILED, EXIT_STARTUP_FAILED, EXIT_USAGE
from zsl.models.loading import load_client_part
from zsl.models.reference import resolve
from zsl.split.cut import parse_cut
from zsl.split.sides import Sides
from zsl.training.config.config import read_config
from zsl.training.run.run import train_from_config

IDS = batches.tokens(2, 16)
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
WEIGHTS = "adapter_model.safetensors"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def split_model(path: Path, config: Any, *, seed: int = 1) -> PeftModel:
    """A client's model with an adapter that is at zero nowhere. Nothing stands in for the trunk."""
    torch.manual_seed(seed)
    model = with_adapter(load_client_part(resolve(str(path)), parse_cut(CUT)), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def save_sides(model: PeftModel, path: Path, directory: Path) -> tuple[Path, Path]:
    sides = Sides(load_client_part(resolve(str(path)), parse_cut(CUT)), parse_cut(CUT))
    for side in ("bottom", "top"):
        zsl.save_adapter(model, directory / f"{side}_lora", sides=sides, only=side)
    return directory / "bottom_lora", directory / "top_lora"


def weights_in(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / WEIGHTS)


def config_in(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "adapter_config.json").read_text())


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def logits(path: Path, adapter: Path) -> torch.Tensor:
    return PeftModel.from_pretrained(local_model(str(path)), str(adapter)).eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def trained(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `zsl-train` on the two parts of a model, and `logits`: those of the split model after it."""
    directory = tmp_path_factory.mktemp("trained")
    path = checkpoints("llama")
    assert run("split", path, CUT, "--out", directory / "parts").exit_code == 0
    with served(str(directory / "parts" / "trunk")) as endpoint:
        settings = {
            "model.name": directory / "parts" / "client",
            "trunk.endpoint": endpoint,
            "data.name": "synthetic",
            "data.samples": 12,
            "data.max_length": 16,
            "peft.r": 4,
            "train.learning_rate": 0.1,
            "train.max_steps": 4,
            "train.save_steps": 2,
            "train.output_dir": directory / "run",
        }
        text = [f"{key}={value}" for key, value in settings.items()]
        train_from_config(read_config(None, settings=text, overrides={}), "here")
        trunk = zsl.RemoteTrunk(endpoint)
        split = PeftModel.from_pretrained(
            zsl.load_client(str(directory / "parts" / "client"), trunk), str(directory / "run" / "adapter")
        )
        save_file({"logits": split.eval()(input_ids=IDS).logits.detach()}, directory / "logits.safetensors")
        trunk.close()
    return directory


def test_what_another_process_loads_without_zsl_is_the_model_that_was_trained(
    trained: Path, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    finished = run("export", trained / "run", "--out", tmp_path / "adapter")
    assert finished.exit_code == 0, finished.output
    config = config_in(tmp_path / "adapter")
    assert config["layers_to_transform"] == [0, 1, 4, 5] and config["layers_pattern"] == "layers"
    expected = load_file(trained / "logits.safetensors")["logits"]
    path = checkpoints("llama")
    finished = run("merge", trained / "run", "--model", path, "--out", tmp_path / "merged")
    assert finished.exit_code == 0, finished.output
    adapted, merged, before = logits_elsewhere(
        tmp_path, IDS, (path, tmp_path / "adapter"), (tmp_path / "merged", None), (path, None)
    )
    assert torch.equal(adapted, expected) and not within(1e-2)(before, expected)
    assert within(1e-5)(merged, expected)


def test_every_place_of_a_run_gives_the_same_adapter(trained: Path, tmp_path: Path) -> None:
    places = {
        "run": [trained / "run"],
        "sides": [trained / "run" / "bottom_lora", trained / "run" / "top_lora"],
        "checkpoint": [trained / "run" / "checkpoint-4"],
        "adapter": [trained / "run" / "adapter"],
    }
    for name, named in places.items():
        finished = run("export", *named, "--out", tmp_path / name)
        assert finished.exit_code == 0, finished.output
        assert_same(weights_in(tmp_path / name), weights_in(trained / "run" / "adapter"))
        here, there = config_in(tmp_path / name), config_in(tmp_path / "run")
        assert sorted(here.pop("target_modules")) == sorted(there.pop("target_modules"))
        assert here == there
    assert run("export", trained / "run" / "checkpoint-2", "--out", tmp_path / "earlier").exit_code == 0
    assert not all(torch.equal(t, weights_in(tmp_path / "run")[n]) for n, t in weights_in(tmp_path / "earlier").items())


def test_its_model_card_says_how_it_was_made(trained: Path, tmp_path: Path) -> None:
    finished = run("export", trained / "run", "--out", tmp_path / "adapter", "--base-model", "someone/model")
    assert finished.exit_code == 0 and "someone/model" in finished.output
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.base_model == config_in(tmp_path / "adapter")["base_model_name_or_path"] == "someone/model"
    assert card.data.library_name == "peft" and {"zsl", "split-learning", "lora"} <= set(card.data.tags)
    for row in ("| cut | 2:4 |", "| gradient mode | exact |", "| method | LORA |", "| rank | 4 |", zsl.__version__):
        assert row in card.text
    assert run("export", trained / "run", "--out", tmp_path / "other").exit_code == 0
    assert ModelCard.load(tmp_path / "other" / "README.md").data.base_model is None
    assert str(trained) not in "".join(file.read_text() for file in (tmp_path / "other").glob("*.[jm][sd]*"))


METHODS: dict[str, Callable[[list[str]], Any]] = {
    "dora": lambda targets: LoraConfig(r=4, target_modules=targets, use_dora=True),
    "pattern": lambda targets: LoraConfig(r=4, target_modules="|".join(f".*{name}$" for name in targets)),
    "ia3": lambda targets: IA3Config(target_modules=targets, feedforward_modules=targets[1:]),
    "loha": lambda targets: LoHaConfig(r=2, target_modules=targets),
}
OF_BOTH = [(family, method) for method in METHODS for family in TARGETS if (family, method) != ("gpt2", "loha")]


@pytest.mark.parametrize(("family", "method"), OF_BOTH)
def test_the_two_sides_of_other_methods_are_joined_too(
    family: str, method: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoints(family)
    model = split_model(path, METHODS[method](TARGETS[family]))
    zsl.save_adapter(model, tmp_path / "adapter")
    finished = run("export", *save_sides(model, path, tmp_path), "--model", path, "--out", tmp_path / "out")
    assert finished.exit_code == 0, finished.output
    assert_same(weights_in(tmp_path / "out"), weights_in(tmp_path / "adapter"))
    assert torch.equal(logits(path, tmp_path / "out"), logits(path, tmp_path / "adapter"))


def test_what_peft_saved_of_a_split_model_names_no_layer_of_the_trunk_any_more(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoints("llama")
    model = split_model(path, LoraConfig(r=4, target_modules=TARGETS["llama"]))
    model.save_pretrained(tmp_path / "plain")
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        PeftModel.from_pretrained(local_model(str(path)), str(tmp_path / "plain"))
    finished = run("export", tmp_path / "plain", "--model", path, "--out", tmp_path / "out")
    assert finished.exit_code == 0, finished.output
    assert_same(weights_in(tmp_path / "out"), weights_in(tmp_path / "plain"))
    logits(path, tmp_path / "out")  # a warning is an error


def test_sides_of_different_ranks_alphas_and_targets_keep_theirs(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoints("llama")
    bottom = split_model(path, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    top = split_model(
        path, LoraConfig(r=2, lora_alpha=32, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 3})
    )
    one, _ = save_sides(bottom, path, tmp_path / "one")
    _, two = save_sides(top, path, tmp_path / "two")
    finished = run("export", one, two, "--model", path, "--out", tmp_path / "out")
    assert finished.exit_code == 0, finished.output
    assert_same(weights_in(tmp_path / "out"), {**weights_in(one), **weights_in(two)})
    loaded: Any = PeftModel.from_pretrained(local_model(str(path)), str(tmp_path / "out")).get_base_model()
    for layer, name, rank, alpha in (
        (0, "self_attn.q_proj", 4, 8),
        (4, "self_attn.q_proj", 2, 32),
        (5, "mlp.up_proj", 3, 32),
    ):
        adapted = loaded.get_submodule(f"model.layers.{layer}.{name}")
        assert (adapted.r["default"], adapted.scaling["default"]) == (rank, alpha / rank)
    assert not hasattr(loaded.get_submodule("model.layers.0.mlp.up_proj"), "lora_A")


def test_virtual_tokens_are_exported_as_they_are(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoints("llama")
    config = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    zsl.save_adapter(split_model(path, config), tmp_path / "adapter")
    finished = run("export", tmp_path / "adapter", "--model", path, "--out", tmp_path / "out")
    assert finished.exit_code == 0, finished.output
    assert torch.equal(logits(path, tmp_path / "out"), logits(path, tmp_path / "adapter"))


def test_what_does_not_go_together_is_refused_in_a_line(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoints("llama")
    lora = save_sides(split_model(path, LoraConfig(r=4, target_modules=["q_proj"])), path, tmp_path / "lora")
    dora = save_sides(
        split_model(path, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)), path, tmp_path / "dora"
    )
    loha = save_sides(split_model(path, LoHaConfig(r=2, target_modules=["q_proj"])), path, tmp_path / "loha")
    (tmp_path / "empty").mkdir()
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "adapter_config.json").write_bytes((lora[0] / "adapter_config.json").read_bytes())
    save_file({name.removeprefix("base_model.model."): t for name, t in weights_in(lora[0]).items()}, bare / WEIGHTS)
    for places, code, words in (
        ([lora[0], lora[0]], EXIT_STARTUP_FAILED, "another adapter"),
        ([lora[0], dora[1]], EXIT_STARTUP_FAILED, "use_dora, False and True"),
        ([lora[0], loha[1]], EXIT_STARTUP_FAILED, "LORA and LOHA"),
        ([bare], EXIT_STARTUP_FAILED, "does not"),
        ([tmp_path / "empty"], EXIT_USAGE, "empty"),
        ([tmp_path / "nowhere"], EXIT_USAGE, "nowhere"),
    ):
        finished = run("export", *places, "--model", path, "--out", tmp_path / "out")
        assert finished.exit_code == code, finished.output
        assert finished.output.startswith("zsl export: ") and finished.output.count("\n") == 1
        assert words in finished.output
    assert not (tmp_path / "out").exists()


def test_the_model_must_be_said_and_be_the_one(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoints("llama")
    zsl.save_adapter(split_model(path, LoraConfig(r=4, target_modules=["q_proj"])), tmp_path / "adapter")
    unnamed = {**config_in(tmp_path / "adapter"), "base_model_name_or_path": None}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(unnamed))
    finished = run("export", tmp_path / "adapter", "--out", tmp_path / "out")
    assert finished.exit_code == EXIT_USAGE and "--model" in finished.output
    for other in (checkpoints("gpt2"), checkpoints("llama", hidden_size=64)):
        finished = run("export", tmp_path / "adapter", "--model", other, "--out", tmp_path / "out")
        assert finished.exit_code == EXIT_STARTUP_FAILED and finished.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_peft_reads_back_otherwise_is_not_put_in_place(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_bit_other(tensors: dict[str, torch.Tensor], *rest: Any, **how: Any) -> None:
        name = sorted(tensors)[0]
        changed = tensors[name].clone()
        changed.view(torch.int32)[0, 0] ^= 1
        save_file({**tensors, name: changed}, *rest, **how)

    monkeypatch.setattr("zsl.adapters.export.save_file", one_bit_other)
    finished = run("export", trained / "run", "--out", tmp_path / "out")
    assert finished.exit_code == EXIT_STARTUP_FAILED and "1 of its" in finished.output
    monkeypatch.setattr("zsl.adapters.export.save_file", full_disk)
    finished = run("export", trained / "run", "--out", tmp_path / "out")
    assert finished.exit_code == EXIT_RUN_FAILED and "No space left" in finished.output
    assert list(tmp_path.iterdir()) == []


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")
