"""`zsl generate`, `zsl chat` and `zsl eval` on a trained adapter: what the whole local model says, and how they end."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from peft import PeftModel
from transformers import AutoModelForCausalLM

from support.data import ANSWERS, PLAIN, SENTENCES, write_model
from support.models import CUT, local_model, with_lora
from zsl.cli.zsl import zsl as command
from zsl.errors import EXIT_STARTUP_FAILED, EXIT_USAGE
from zsl.generation.generate import generate
from zsl.generation.prompts import tokens_of_chat, tokens_of_text
from zsl.models.reference import resolve
from zsl.training.config.config import read_config
from zsl.training.run.run import train_from_config

MOST = 8


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), PLAIN)


@pytest.fixture(scope="module")
def adapter(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on all layers, the trunk's too, that names its model."""
    place = tmp_path_factory.mktemp("adapter")
    with_lora(local_model(str(path)), layers=range(6)).save_pretrained(str(place))
    return place


@pytest.fixture(scope="module")
def adapted(path: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), adapter)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run(*arguments: object, typed: str | None = None) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], input=typed)


def test_generate_writes_the_whole_models_text_and_its_speed_beside_it(
    path: Path, adapter: Path, adapted: Any, tmp_path: Path
) -> None:
    tokenizer = resolve(str(path)).tokenizer()
    expected = generate(adapted, tokenizer, tokens_of_text(tokenizer, SENTENCES[0]), max_tokens=MOST).text
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(SENTENCES[0])
    how = ["--adapter", adapter, "--model", path, "--cut", CUT, "--max-tokens", MOST]
    made = run("generate", *how, "--file", prompt)
    assert (made.exit_code, made.stdout) == (0, f"{expected}\n"), made.stderr
    assert f"{MOST} tokens" in made.stderr and "first" in made.stderr and "cut off at --max-tokens" in made.stderr
    base = run("generate", "--model", path, "--max-tokens", MOST, typed=SENTENCES[0])
    assert base.exit_code == 0 and base.stdout != made.stdout


def test_the_same_seed_draws_the_same_text(path: Path) -> None:
    def drawn(seed: int) -> str:
        how = ["--model", path, "--max-tokens", MOST, "--temperature", 1.5, "--seed", seed]
        return run("generate", *how, SENTENCES[0]).stdout

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.long
def test_a_terminal_shows_at_once_what_is_being_loaded(tmp_path: Path) -> None:
    reader, terminal = os.openpty()
    program = "from zsl.cli.zsl import zsl; zsl(prog_name='zsl')"
    words = [sys.executable, "-c", program, "generate", "--model", str(tmp_path), "to"]
    ended = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=terminal, timeout=60)
    os.close(terminal)
    with open(reader, errors="replace") as lines:
        assert lines.readline().rstrip() == f"zsl generate: loading {tmp_path}"
    assert ended.returncode == EXIT_STARTUP_FAILED  # an empty directory


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--model", "random:gpt2", "x"], EXIT_STARTUP_FAILED, "tokenizer"),
        (["x"], EXIT_USAGE, "--model"),
        (["--model", "random:gpt2", "x", "--file", "y"], EXIT_USAGE, "--file"),
        (["--model", "random:gpt2", "--file", "missing.txt"], EXIT_USAGE, "missing.txt"),
        (["--adapter", "missing", "x"], EXIT_USAGE, "missing"),
        (["--model", "MODEL", "x", "--client-key", "k"], EXIT_USAGE, "--server"),
        (["--model", "MODEL", "moon " * 200], EXIT_STARTUP_FAILED, "64 together"),
    ],
)
def test_generate_refuses_what_it_cannot_do(path: Path, arguments: list[str], code: int, said: str) -> None:
    ended = run("generate", *(str(path) if word == "MODEL" else word for word in arguments))
    assert ended.exit_code == code, ended.output
    assert said in ended.stderr and ended.stdout == ""


def test_a_command_without_a_model_says_how_to_name_one() -> None:
    for name, arguments in (
        ("generate", ["x"]),
        ("chat", []),
        ("eval", ["--dataset", "synthetic"]),
        ("serve", ["--port", 0]),
    ):
        said = "name a model with --model, or an adapter with --adapter"
        assert run(name, *arguments).stderr == f"zsl {name}: {said}\n"


def test_chat_answers_each_line_in_the_templates_form_with_all_that_was_said(
    path: Path, adapter: Path, adapted: Any
) -> None:
    tokenizer = resolve(str(path)).tokenizer()
    messages = [{"role": "system", "content": "No"}]
    expected = []
    for line in ("Yes", "moon"):
        messages.append({"role": "user", "content": line})
        answer = generate(adapted, tokenizer, tokens_of_chat(tokenizer, messages), max_tokens=5).text
        messages.append({"role": "assistant", "content": answer})
        expected.append(answer)
    how = ["--model", path, "--adapter", adapter, "--system", "No", "--max-tokens", 5]
    talked = run("chat", *how, typed="Yes\n\nmoon\n")
    assert talked.exit_code == 0, talked.output
    assert talked.stdout == "".join(f"{answer}\n" for answer in expected)
    assert talked.stderr == 2 * "(cut off at --max-tokens)\n"


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says: list[str] = []

    def say(text: str, *, nl: bool = True) -> None:
        says.append(text)
        if len(says) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("zsl.cli.chat.say", say)
    before = signal.getsignal(signal.SIGINT)
    talked = run("chat", "--model", path, "--max-tokens", 9, typed="Yes\nNo\n")
    assert talked.exit_code == 0, talked.output
    assert signal.getsignal(signal.SIGINT) is before
    assert says.index("") == 2, "the first answer has two tokens"
    assert len(says) > 9


@pytest.fixture(scope="module")
def config(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training with a validation before and after it, and dropout."""
    place = tmp_path_factory.mktemp("training")
    rows = [{"prompt": text, "completion": ANSWERS[number % 2]} for number, text in enumerate(SENTENCES)]
    (place / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "run.toml").write_text(
        f'[model]\nname = "{path}"\n[data]\nname = "{place / "notes.jsonl"}"\nvalidation = 0.4\nmax_length = 40\n'
        '[peft]\nr = 4\ntarget_modules = "all-linear"\nlora_dropout = 0.2\n'
        f'[train]\nmax_steps = 2\noutput_dir = "{place / "run"}"\nlearning_rate = 1e-2\n'
    )
    return place / "run.toml"


@pytest.fixture(scope="module")
def trained(config: Path) -> Path:
    train_from_config(read_config(config, overrides={}), str(config))
    return config.parent / "run"


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_eval_measures_the_validation_loss_of_a_training(
    path: Path, config: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = [line["eval_loss"] for line in lines_of(trained) if "eval_loss" in line]
    before, after = (json.loads(run("eval", config, "--json", *more).stdout) for more in ([], ["--adapter", trained]))
    assert [before["loss"], after["loss"]] == pytest.approx(losses, abs=1e-6)
    assert before["loss"] != after["loss"]
    assert after["perplexity"] == pytest.approx(torch.tensor(after["loss"]).exp().item(), rel=1e-5)
    assert (after["rows"], after["tokens"]) == (before["rows"], before["tokens"])
    monkeypatch.setattr("zsl.serving.perplexity.perplexity", lambda loss: math.inf)
    all_rows = json.loads(
        run("eval", "--model", path, "--dataset", config.parent / "notes.jsonl", "--max-length", 40, "--json").stdout
    )
    assert (all_rows["rows"], all_rows["perplexity"]) == (len(SENTENCES), None)


def test_eval_names_what_it_needs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, code, said in (
        (["--model", path], EXIT_USAGE, "--dataset"),
        (["--dataset", "synthetic"], EXIT_USAGE, "--model"),
        (["--model", path, "--tasks", "lambada"], EXIT_STARTUP_FAILED, "pip install lm-eval"),
    ):
        ended = run("eval", *arguments)
        assert (ended.exit_code, said in ended.stderr) == (code, True), ended.output


def test_tasks_go_to_the_harness_with_the_split_model(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself is not installed here: its two entries are stood in for, by their documented names."""

    class HFLM:
        def __init__(self, *, pretrained: Any, tokenizer: Any, batch_size: int) -> None:
            self.logits = pretrained(torch.tensor([tokenizer("Yes")["input_ids"]])).logits

    def simple_evaluate(*, model: HFLM, tasks: list[str]) -> dict[str, Any]:
        assert model.logits.isfinite().all()
        return {"results": {task: {"acc,none": 0.5, "alias": task} for task in tasks}}

    harness, models, huggingface = (ModuleType(name) for name in ("lm_eval", "models", "huggingface"))
    harness.simple_evaluate, huggingface.HFLM = simple_evaluate, HFLM  # type: ignore[attr-defined]
    names = {"lm_eval": harness, "lm_eval.models": models, "lm_eval.models.huggingface": huggingface}
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("zsl.cli.eval.find_spec", lambda name: object())
    shown = run("eval", "--model", path, "--tasks", "lambada, piqa", "--json")
    assert json.loads(shown.stdout)["piqa acc,none"] == 0.5


def test_a_sample_prompt_shows_a_text_as_it_trains_and_changes_no_loss(
    path: Path, config: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = SENTENCES[0][:20]
    settings = {"output_dir": str(tmp_path / "run"), "sample_prompt": prompt}
    train_from_config(read_config(config, overrides={"train": settings}), str(config))
    lines = lines_of(tmp_path / "run")
    samples = {line["step"]: line["sample"] for line in lines if "sample" in line}
    assert [line["step"] for line in lines if "sample" in line] == [0, 2], "with a validation at each of them"
    for loss in ("loss", "eval_loss"):
        assert [line[loss] for line in lines if loss in line] == [
            line[loss] for line in lines_of(trained) if loss in line
        ]
    tokenizer = resolve(str(path)).tokenizer()
    tokens = tokens_of_text(tokenizer, prompt)
    whole = AutoModelForCausalLM.from_pretrained(path)
    most = 64 - len(tokens)
    assert samples[0] == generate(whole, tokenizer, tokens, max_tokens=most).text
    adapted = PeftModel.from_pretrained(whole, tmp_path / "run" / "adapter")
    assert samples[2] == generate(adapted, tokenizer, tokens, max_tokens=most).text != samples[0]
    assert f"step 0/2: {prompt}|" in capsys.readouterr().out
