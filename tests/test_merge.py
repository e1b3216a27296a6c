"""`zsl merge`: a checkpoint with what was trained in its weights, which needs neither zsl nor PEFT."""

from __future__ import annotations

import json
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig, PeftModel, PromptTuningConfig
from safetensors.torch import load_file, save_file

import zsl
from support import batches
from support.models import CUT, local_model, tiny_model
from support.tokenizer import tiny_tokenizer
from zsl.adapters.attach import with_adapter
from zsl.cli.zsl import zsl as command
from zsl.errors import EXIT_RUN_FAILED, EXIT_STARTUP_FAILED, EXIT_USAGE
from zsl.models.identity import identify
from zsl.models.loading import load_client_part
from zsl.models.reference import resolve
from zsl.split.cut import parse_cut
from zsl.training.directory.record import RECORD, RunRecord, as_bytes

IDS = batches.tokens(2, 16)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def save_trained(path: Path, directory: Path, config: Any) -> Path:
    """An adapter of a split model, as zsl saves it, that is at zero nowhere."""
    torch.manual_seed(1)
    model = with_adapter(load_client_part(resolve(str(path)), parse_cut(CUT)), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    zsl.save_adapter(model, directory / "adapter")
    return directory / "adapter"


@pytest.fixture
def adapter(checkpoints: Callable[..., Path], tmp_path: Path) -> Path:
    return save_trained(checkpoints("llama"), tmp_path, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))


def logits(path: Path, adapter: Path | None = None) -> torch.Tensor:
    model: Any = local_model(str(path))
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
            model = PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).abs().max()) < 1e-5 * float(other.abs().max())


def test_the_merged_checkpoint_is_the_adapted_model(
    adapter: Path, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoints("llama")
    finished = run("merge", adapter, "--model", path, "--out", tmp_path / "merged")
    assert finished.exit_code == 0, finished.output
    merged = logits(tmp_path / "merged")
    assert close(merged, logits(path, adapter)) and not close(merged, logits(path))
    before, after = (json.loads((each / "config.json").read_text()) for each in (path, tmp_path / "merged"))
    assert after == before
    assert {p.name for p in path.iterdir()} == {p.name for p in (tmp_path / "merged").iterdir()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "merged"]


@pytest.mark.parametrize(
    "keys",
    [
        {"target_modules": ["c_attn"]},
        {"target_modules": ["c_attn", "lm_head"]},
        {"target_modules": ["wte"]},
        {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]},
        {"target_modules": ["c_attn"], "use_dora": True},
        {"target_modules": ["c_attn"], "bias": "all"},
    ],
    ids=str,
)
def test_what_is_merged_does_not_reach_what_was_tied_to_it(
    keys: dict[str, Any], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoints("gpt2")
    assert resolve(str(path)).config.tie_word_embeddings
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`|fan_in_fan_out is set to True but")
        adapter = save_trained(path, tmp_path, LoraConfig(r=4, **keys))
        finished = run("merge", adapter, "--model", path, "--out", tmp_path / "merged")
        assert finished.exit_code == 0, finished.output
        expected = logits(path, adapter)
    assert close(logits(tmp_path / "merged"), expected) and not close(expected, logits(path))


def test_a_run_says_itself_what_it_was_trained_on(
    adapter: Path, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoints("llama")
    facts = {"the model's weights": identify(resolve(str(path))).weights_digest}
    record = RunRecord(configuration={"model.name": str(path)}, facts=facts)
    (adapter / RECORD).write_bytes(as_bytes(record))
    finished = run("merge", tmp_path, "--out", tmp_path / "merged")
    assert finished.exit_code == 0, finished.output
    assert "other weights" not in finished.output
    assert close(logits(tmp_path / "merged"), logits(path, adapter))
    other = checkpoints("llama", seed=7)
    finished = run("merge", tmp_path, "--model", other, "--out", tmp_path / "other")
    assert finished.exit_code == 0 and "other weights" in finished.output


@pytest.mark.parametrize("command", ["merge", "export"])
def test_a_model_of_another_configuration_is_refused(
    command: str, adapter: Path, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    facts = {"the model's configuration": identify(resolve(str(checkpoints("llama")))).config_digest}
    (adapter / RECORD).write_bytes(as_bytes(RunRecord(configuration={}, facts=facts)))
    other = checkpoints("llama", rms_norm_eps=1e-3)  # of the same shapes
    finished = run(command, adapter, "--model", other, "--out", tmp_path / "out")
    assert finished.exit_code == EXIT_STARTUP_FAILED and "configuration" in finished.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["merge", "export"])
def test_a_model_that_has_moved_since_is_to_be_named(command: str, adapter: Path, tmp_path: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "./gone"}))
    for who in ("adapter", "run"):
        finished = run(command, adapter, "--out", tmp_path / "out")
        assert finished.exit_code == EXIT_STARTUP_FAILED and finished.output.count("\n") == 1
        assert "model './gone' cannot be loaded" in finished.output
        assert finished.output.endswith(f"so the {who} says: name the model with --model\n")
        (adapter / RECORD).write_bytes(as_bytes(RunRecord(configuration={"model.name": "./gone"})))
    assert "so the" not in run(command, adapter, "--model", "./gone", "--out", tmp_path / "out").output


def test_the_record_of_another_run_in_the_same_directory_says_nothing_of_an_adapter(
    adapter: Path, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """As where a run was killed before it had adapters, in the directory of an older one."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    (tmp_path / RECORD).write_bytes(
        as_bytes(RunRecord(configuration={"model.name": str(checkpoints("llama", seed=7))}))
    )
    finished = run("merge", tmp_path, "--out", tmp_path / "merged")
    assert finished.exit_code == 2 and "--model" in finished.output


def test_the_dtype_is_the_checkpoints_own_unless_one_is_given(adapter: Path, tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    for options, dtype in (([], torch.bfloat16), (["--dtype", "float32"], torch.float32)):
        out = tmp_path / str(dtype)
        finished = run("merge", adapter, "--model", tmp_path / "half", "--out", out, *options)
        assert finished.exit_code == 0, finished.output
        assert resolve(str(out)).config.dtype == dtype
        assert str(dtype).removeprefix("torch.") in finished.output
    exact = logits(tmp_path / "half", adapter)  # local_model computes in float32
    assert close(logits(tmp_path / "torch.float32"), exact)
    assert not close(logits(tmp_path / "torch.bfloat16"), exact)


def test_what_cannot_be_merged_is_refused_in_a_line(
    adapter: Path, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoints("llama")
    (tmp_path / "virtual").mkdir()
    prompts = save_trained(path, tmp_path / "virtual", PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    assert run("split", path, CUT, "--out", tmp_path / "parts").exit_code == 0
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    config = json.loads((path / "config.json").read_text())
    (quantized / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    for places, model, code, words in (
        ([prompts], path, EXIT_STARTUP_FAILED, "no weights to merge"),
        (
            [adapter],
            tmp_path / "parts" / "client",
            EXIT_STARTUP_FAILED,
            "--model",
        ),
        ([adapter], quantized, EXIT_STARTUP_FAILED, "is quantized"),
        ([adapter], checkpoints("gpt2"), EXIT_STARTUP_FAILED, "does not fit gpt2"),
        ([tmp_path / "parts"], path, EXIT_USAGE, "parts"),
    ):
        finished = run("merge", *places, "--model", model, "--out", tmp_path / "out")
        assert finished.exit_code == code, finished.output
        assert finished.output.startswith("zsl merge: ") and finished.output.count("\n") == 1
        assert words in finished.output
    assert not (tmp_path / "out").exists()


def test_a_merge_that_went_wrong_is_not_put_in_place(
    adapter: Path, checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command_line = ("merge", adapter, "--model", checkpoints("llama"), "--out", tmp_path / "out")
    whole: Any = type(local_model(str(checkpoints("llama"))))
    save = whole.save_pretrained

    def other_numbers(self: Any, *arguments: Any, **how: Any) -> None:
        with torch.no_grad():
            self.lm_head.weight[0, 0] += 1
            save(self, *arguments, **how)
            self.lm_head.weight[0, 0] -= 2

    monkeypatch.setattr(whole, "save_pretrained", other_numbers)
    finished = run(*command_line)
    assert finished.exit_code == EXIT_RUN_FAILED and "lm_head.weight" in finished.output

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole, "save_pretrained", full_disk)
    finished = run(*command_line)
    assert finished.exit_code == EXIT_RUN_FAILED and "No space left" in finished.output
    monkeypatch.setattr(whole, "save_pretrained", save)
    monkeypatch.setattr("zsl.adapters.merge.PeftModel", ForgetsToMerge)
    finished = run(*command_line)
    assert finished.exit_code == EXIT_STARTUP_FAILED and "logits" in finished.output
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


class ForgetsToMerge(PeftModel):
    def merge_and_unload(self, **how: Any) -> Any:
        return self.unload()


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{}}", "[]"], ids=["empty", "no JSON", "a list"])
def test_a_tokenizer_that_is_there_and_cannot_be_loaded_is_not_left_out(
    adapter: Path, checkpoints: Callable[..., Path], tmp_path: Path, file: str, content: str
) -> None:
    path = shutil.copytree(checkpoints("llama"), tmp_path / "whole")
    tiny_tokenizer().save_pretrained(path)
    (path / file).write_text(content)
    for command_line in (("merge", adapter, "--model", path), ("split", path, CUT)):
        finished = run(*command_line, "--out", tmp_path / "out")
        assert finished.exit_code == EXIT_STARTUP_FAILED, finished.output
        assert finished.output.startswith(f"zsl {command_line[0]}: {path}: its tokenizer (tokenizer.json, ")
        assert "cannot be loaded: " in finished.output and finished.output.count("\n") == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["adapter", "whole"]


def test_a_model_without_a_tokenizer_is_merged_without_one(
    adapter: Path, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    finished = run("merge", adapter, "--model", checkpoints("llama"), "--out", tmp_path / "bare")
    assert finished.exit_code == 0 and "no tokenizer" in finished.output
    path = shutil.copytree(checkpoints("llama"), tmp_path / "whole")
    tiny_tokenizer().save_pretrained(path)
    finished = run("merge", adapter, "--model", path, "--out", tmp_path / "merged")
    assert finished.exit_code == 0 and "with its tokenizer" in finished.output
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes()


@pytest.fixture
def terminated() -> Iterator[list[int]]:
    """The SIGTERMs that no command has taken for itself."""
    missed: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: missed.append(number))
    yield missed
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("name", ["split", "merge", "export"])
def test_sigterm_leaves_nothing_of_what_was_written(
    name: str,
    adapter: Path,
    checkpoints: Callable[..., Path],
    tmp_path: Path,
    terminated: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[Path] = []

    def end(directory: Path) -> None:
        written.extend(directory.rglob("*.safetensors"))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("zsl.files.new_directory.sync_tree", end)
    path = checkpoints("llama")
    finished = run(name, *([path, CUT] if name == "split" else [adapter, "--model", path]), "--out", tmp_path / "out")
    assert written and not terminated
    assert finished.exit_code == 128 + signal.SIGTERM
    assert finished.output.splitlines()[-1] == f"zsl {name}: interrupted"
    assert [each.name for each in tmp_path.iterdir()] == ["adapter"]


def test_tensors_that_get_another_dtype_are_counted(
    adapter: Path, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(checkpoints("llama"), mixed)
    file = mixed / "model.safetensors"
    save_file({n: t if "norm" in n else t.bfloat16() for n, t in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((mixed / "config.json").read_text())
    (mixed / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    said = run("merge", adapter, "--model", mixed, "--out", tmp_path / "merged")
    assert said.exit_code == 0, said.output
    assert "13 tensors of another dtype" in said.stderr and "bfloat16" in said.stderr and "--dtype" in said.stderr
    chosen = run("merge", adapter, "--model", mixed, "--out", tmp_path / "chosen", "--dtype", "float32")
    assert chosen.exit_code == 0 and "another dtype" not in chosen.stderr
