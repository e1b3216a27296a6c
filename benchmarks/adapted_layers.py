"""Compare LoRA on the client's layers, on all layers through a daemon, and on all layers of a local model.

The first two are runs of `zsl-train` through a `zsl-trunkd`; the third is plain Trainer on the whole model, with the
same rows, seed and steps. The validation perplexity before the first step and after each epoch makes the table and the
plot; the trained weights of the last two are compared bit for bit.

    bin/bench adapted_layers --work DIR     SmolLM2-135M-Instruct on python-docs, 3 epochs over 512 rows of 128 tokens
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from perplexity_curves import Curve, add_curve, options_of_runs, plot, train
from report import Report
from safetensors.torch import load_file
from servers import trunk_daemon
from transformers import Trainer, default_data_collator, set_seed

from zsl.adapters.attach import with_adapter
from zsl.models.loading import load_whole
from zsl.models.reference import resolve
from zsl.training.config.arguments import trainer_arguments
from zsl.training.config.config import read_config
from zsl.training.config.peft_table import peft_config
from zsl.training.data.load import load_data
from zsl.training.trainer.trainer import perplexity
from zsl.training.trainer.validation_loss import TokenLossMixin

WEIGHTS = "adapter_model.safetensors"


class LocalTrainer(TokenLossMixin, Trainer):
    """Trainer with the validation loss of `zsl-train`."""


def train_locally(config: Path, directory: Path, settings: dict[str, Any]) -> Curve:
    """Train all layers of the whole model in this process, and save the adapter."""
    given = [f"{key}={value}" for key, value in settings.items()]
    checked = read_config(config, settings=given, overrides={})
    arguments = trainer_arguments(checked, str(config))
    arguments.output_dir = str(directory)
    reference = resolve(checked.model.name)
    data = load_data(checked.data, reference)
    set_seed(arguments.seed)
    model = with_adapter(load_whole(reference, torch.float32), peft_config(str(config), checked.peft))
    trainer = LocalTrainer(
        model,
        arguments,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=data.collate or default_data_collator,
    )
    trainer.train()
    model.save_pretrained(str(directory / "adapter"))
    lines = [line for line in trainer.state.log_history if "eval_loss" in line]
    return [line | {"eval_perplexity": perplexity(line["eval_loss"])} for line in lines]


def equal_weights(one: Path, other: Path) -> bool:
    """Return whether two saved adapters have the same tensors, bit for bit."""
    first, second = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@click.command()
@options_of_runs
def main(config: Path, samples: int, epochs: int, work: Path, figure: Path | None, out: Path) -> None:
    """Train each, print a table, write it and a plot."""
    report = Report("adapted_layers", "Validation loss by adapted layers", out)
    settings = {
        "data.samples": samples,
        "data.validation": 0.1,
        "train.num_train_epochs": epochs,
        "train.disable_tqdm": "true",
    }
    checked = read_config(config, settings=[], overrides={})
    cut = ["--cut", checked.trunk.cut] if checked.trunk.cut else []
    work.mkdir(parents=True, exist_ok=True)
    curves = {}
    with trunk_daemon("--model", checked.model.name, *cut, log=work / "daemon.log") as daemon:
        for layers in ("client", "all"):
            through = {"trunk.endpoint": daemon["endpoint"], "peft.layers": layers}
            curves[layers] = train(config, work / layers, settings | through)
            add_curve(report, curves[layers], layers=layers)
    local = {"train.eval_strategy": "epoch", "train.eval_on_start": "true", "train.save_strategy": "no"}
    curves["all, local"] = train_locally(config, work / "local", settings | local)
    add_curve(report, curves["all, local"], layers="all, local")
    report.note(f"{config.name}: {samples} training rows, {epochs} epochs, one seed")
    equal = equal_weights(work / "all/adapter", work / "local/adapter")
    report.note(f"weights after `all` and after the local training equal bit for bit: {'yes' if equal else 'no'}")
    report.publish()
    if figure is not None:
        plot(curves, figure)
    if not equal:
        raise click.ClickException("the weights differ")


if __name__ == "__main__":
    main()
