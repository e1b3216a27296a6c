"""Weights of the base model that a training changed, or made new, go with the adapter, and reach the whole model."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from click.testing import CliRunner, Result
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn

import zsl
from support.models import CUT, VOCABULARY, local_model
from zsl.adapters.attach import load_adapter, with_adapter
from zsl.cli.zsl import zsl as command
from zsl.errors import EXIT_STARTUP_FAILED, ModelError
from zsl.models.loading import load_client_part
from zsl.models.reference import resolve
from zsl.split.cut import parse_cut
from zsl.split.sides import Sides
from zsl.split.stack import find_stack

MORE = VOCABULARY + 5
EMBEDDINGS = {"llama": "embed_tokens", "gpt2": "wte"}
TARGETS = {"llama": "q_proj", "gpt2": "c_attn"}
IDS = torch.tensor([[3, 5, VOCABULARY - 1]])
NEW_IDS = torch.tensor([[3, VOCABULARY + 1, 5, MORE - 1]])


@pytest.fixture(autouse=True)
def peft_may_warn() -> Any:
    """It warns of tied embeddings and of Conv1D."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        yield


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def client(path: Path, rows: int | None = None) -> Any:
    torch.manual_seed(5)
    model = load_client_part(resolve(str(path)), parse_cut(CUT))
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def whole(path: Path, rows: int | None = None) -> Any:
    torch.manual_seed(99)  # new rows are others than the client's
    model = local_model(str(path))
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def changed(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def trained(path: Path, keys: dict[str, Any], *, rows: int | None = None, also: tuple[str, ...] = ()) -> Any:
    model = with_adapter(client(path, rows), LoraConfig(r=2, **keys))
    for name, parameter in model.named_parameters():
        if name.endswith(also or ("none",)):
            parameter.requires_grad_(True)
    return changed(model)


def expected_logits(model: Any, path: Path, ids: torch.Tensor) -> torch.Tensor:
    """The split model's, with the trunk's layers in their places."""
    layers, whole_layers = (find_stack(each).layers for each in (model.get_base_model(), whole(path)))
    for index in (2, 3):
        layers[index] = whole_layers[index]
    return model(input_ids=ids).logits


@pytest.mark.parametrize(
    ("family", "rows", "embeddings", "how"),
    [
        ("llama", MORE, None, None),
        ("llama", MORE, "trained", None),
        ("llama", None, "trained", None),
        ("llama", MORE, "target_modules", None),
        ("llama", MORE, "trainable_token_indices", None),
        ("llama", None, "modules_to_save", None),
        ("llama", MORE, "modules_to_save", "by PEFT"),
        ("gpt2", MORE, None, "by PEFT"),
        ("gpt2", MORE, "trainable_token_indices", "by PEFT"),
        ("gpt2", MORE, "head in target_modules", "by PEFT"),
        ("gpt2", None, "modules_to_save", None),
    ],
)
def test_what_is_saved_exported_and_merged_has_the_models_embeddings(
    family: str,
    rows: int | None,
    embeddings: str | None,
    how: str | None,
    checkpoints: Callable[..., Path],
    tmp_path: Path,
) -> None:
    path, name = checkpoints(family), EMBEDDINGS[family]
    keys: dict[str, Any] = {"target_modules": [TARGETS[family]]}
    if embeddings == "target_modules":
        keys["target_modules"].append(name)
    elif embeddings == "head in target_modules":
        keys["target_modules"].append("lm_head")
    elif embeddings == "modules_to_save":
        keys["modules_to_save"] = [name, "lm_head"] if rows else [name]
    elif embeddings == "trainable_token_indices":
        keys["trainable_token_indices"] = [VOCABULARY + 1]
    also = (f"{name}.weight",) if embeddings == "trained" else ()
    model = trained(path, keys, rows=rows, also=also)
    if how:
        model.save_pretrained(str(tmp_path / "adapter"))
    else:
        zsl.save_adapter(model, tmp_path / "adapter")
    for name in ("export", "merge"):
        finished = run(name, tmp_path / "adapter", "--model", path, "--out", tmp_path / name)
        assert finished.exit_code == 0, finished.output
    assert (f"embeddings are of {MORE} " in finished.stderr) == (rows is not None)
    ids = NEW_IDS if rows else IDS
    expected = expected_logits(model, path, ids)
    for adapter in ("adapter", "export"):
        assert torch.equal(
            PeftModel.from_pretrained(whole(path, rows), tmp_path / adapter)(input_ids=ids).logits, expected
        )
    again = load_adapter(client(path, rows), tmp_path / "adapter")
    assert torch.equal(expected_logits(again, path, ids), expected)
    merged = local_model(str(tmp_path / "merge"))
    assert merged.config.vocab_size == (rows or VOCABULARY)
    assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-5)
    assert not torch.allclose(whole(path, rows)(input_ids=ids).logits, expected, atol=1e-3)


def test_other_weights_that_were_trained_are_saved_on_their_side(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoints("llama")
    model = trained(path, {"target_modules": ["q_proj"]}, also=("model.norm.weight", "layers.0.mlp.up_proj.weight"))
    sides = Sides(client(path), parse_cut(CUT))
    for side, weight in (("bottom", "model.layers.0.mlp.up_proj.weight"), ("top", "model.norm.weight")):
        zsl.save_adapter(model, tmp_path / side, sides=sides, only=side)
        with safe_open(tmp_path / side / "adapter_model.safetensors", "pt") as file:
            assert [name for name in file.keys() if "lora" not in name] == [f"base_model.model.{weight}"]  # noqa: SIM118
    finished = run("merge", tmp_path / "bottom", tmp_path / "top", "--model", path, "--out", tmp_path / "merged")
    assert finished.exit_code == 0, finished.output
    logits = local_model(str(tmp_path / "merged"))(input_ids=IDS).logits
    assert torch.allclose(logits, expected_logits(model, path, IDS), atol=1e-5)


def test_a_resized_model_goes_on_from_its_adapter_and_another_is_refused(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoints("llama")
    model = trained(path, {"target_modules": ["q_proj"]}, rows=MORE)
    zsl.save_adapter(model, tmp_path / "adapter")
    again = load_adapter(client(path, MORE), tmp_path / "adapter", is_trainable=True)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    with pytest.raises(ModelError, match=f"{MORE}.*{VOCABULARY}"):
        load_adapter(client(path), tmp_path / "adapter")


def test_what_was_loaded_is_saved_again(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoints("llama")
    zsl.save_adapter(trained(path, {"target_modules": ["q_proj"]}, also=("model.norm.weight",)), tmp_path / "one")
    zsl.save_adapter(load_adapter(client(path), tmp_path / "one"), tmp_path / "two")
    zsl.save_adapter(PeftModel.from_pretrained(client(path), str(tmp_path / "one")), tmp_path / "three")
    one, *others = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two", "three"))
    assert others == [one, one]


def test_a_head_that_is_missing_beside_resized_embeddings_is_refused(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoints("llama")
    zsl.save_adapter(
        trained(path, {"target_modules": ["q_proj"]}, rows=MORE),
        tmp_path / "bottom",
        sides=Sides(client(path), parse_cut(CUT)),
        only="bottom",
    )
    for name in ("export", "merge"):
        finished = run(name, tmp_path / "bottom", "--model", path, "--out", tmp_path / "out")
        assert finished.exit_code == EXIT_STARTUP_FAILED and "lm_head.weight" in finished.output
    assert not (tmp_path / "out").exists()


def test_of_resized_embeddings_that_peft_saved_by_halves_none_is_made_up(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoints("llama")
    trained(path, {"target_modules": ["q_proj", "embed_tokens"]}, rows=MORE).save_pretrained(str(tmp_path / "half"))
    for name in ("export", "merge"):
        finished = run(name, tmp_path / "half", "--model", path, "--out", tmp_path / "out")
        assert finished.exit_code == EXIT_STARTUP_FAILED and "zsl.save_adapter" in finished.output
    with pytest.raises(ModelError, match=r"lacks lm_head\.weight.*zsl\.save_adapter"):
        load_adapter(client(path, MORE), tmp_path / "half")


def test_a_trained_copy_is_not_the_weight_that_another_module_is_tied_to(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoints("gpt2")
    model = trained(path, {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}, rows=MORE)
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    finished = run("merge", tmp_path / "adapter", "--model", path, "--out", tmp_path / "out")
    assert finished.exit_code == EXIT_STARTUP_FAILED and "lacks lm_head.weight" in finished.output


@pytest.mark.parametrize("active", ["a", "b"])
def test_of_several_adapters_the_active_one_is_saved_however_it_was_made_active(
    active: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoints("llama")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(client(path), config, adapter_name="a")
    model.add_adapter("b", config)
    model.base_model.set_adapter(active)
    zsl.save_adapter(model.eval(), tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(whole(path), tmp_path / "adapter").eval()
    assert torch.equal(loaded(input_ids=IDS).logits, expected_logits(model, path, IDS))


def test_wrappers_leave_no_trace_in_what_is_saved_and_loaded(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoints("llama")
    model = trained(path, {"target_modules": ["q_proj"]})
    zsl.save_adapter(model, tmp_path / "plain")
    compiled: Any = torch.compile(model, backend="eager")
    wrapped = {"compiled": compiled, "parallel": nn.DataParallel(compiled), "prepared": Accelerator().prepare(model)}
    for name, each in wrapped.items():
        zsl.save_adapter(each, tmp_path / name)
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    loaded = load_adapter(torch.compile(client(path), backend="eager"), tmp_path / "plain")  # type: ignore[arg-type]
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    inside: Any = model.get_base_model().model.layers
    inside[0] = torch.compile(inside[0], backend="eager")
    with pytest.raises(ModelError, match="compiled"):
        zsl.save_adapter(model, tmp_path / "inside")


def test_several_active_adapters_are_not_saved_as_one(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    model = get_peft_model(client(checkpoints("llama")), config, adapter_name="a")
    model.add_adapter("b", config)
    model.base_model.set_adapter(["a", "b"])
    with pytest.raises(ModelError, match=r"2 adapters of a, b .*set_adapter"):
        zsl.save_adapter(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_transformers_load_adapter_drops_no_weights(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoints("llama")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(whole(path), config).save_pretrained(str(tmp_path / "all"))
    split = client(path)
    with pytest.raises(ModelError, match=r"layers\.2\..*zsl merge"):
        split.load_adapter(str(tmp_path / "all"))
    zsl.save_adapter(trained(path, {"target_modules": ["q_proj"]}), tmp_path / "outer")
    split.load_adapter(str(tmp_path / "outer"))
    again = PeftModel.from_pretrained(client(path), str(tmp_path / "outer")).eval()
    assert torch.equal(split.eval()(input_ids=IDS).logits, again(input_ids=IDS).logits)


def test_an_adapter_names_what_its_model_was_loaded_from(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoints("llama")
    model = trained(path, {"target_modules": ["q_proj"]})
    for name, given in ((str(path), None), ("org/name", "org/name")):
        zsl.save_adapter(model, tmp_path / "adapter", base_model=given)
        assert PeftConfig.from_pretrained(str(tmp_path / "adapter")).base_model_name_or_path == name


def test_threads_that_load_at_once_get_the_weights_and_dtypes_that_they_asked_for(
    checkpoints: Callable[..., Path],
) -> None:
    reference, cut = resolve(str(checkpoints("llama"))), parse_cut(CUT)
    wanted = load_client_part(reference, cut).state_dict()
    together = threading.Barrier(4)

    def load(dtype: torch.dtype) -> bool:
        found = True
        for _ in range(3):
            together.wait(60)
            loaded = load_client_part(reference, cut, dtype).state_dict()
            found &= all(torch.equal(loaded[name], wanted[name].to(dtype)) for name in wanted)
            found &= all(tensor.dtype == dtype for tensor in loaded.values())
        return found

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(load, [torch.float32, torch.bfloat16] * 2))
    assert torch.get_default_dtype() == torch.float32
