"""Set the defaults of `[train]`, and check which of its keys exclude each other.

`TrainingArguments` checks each key alone; this module finds conflicts that would show only in training, or that come
from a default. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zsl.errors import ConfigError

TRAIN_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-4,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 20,  # 4.6 MB and 20 to 100 ms each for GPT-2 small with r = 8
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": False,  # transformers hides the progress bar where it logs little
}
# More defaults with `data.validation`.
WITH_VALIDATION: dict[str, Any] = {"eval_strategy": "epoch", "eval_on_start": True}
BY_THE_LOSS: dict[str, Any] = {"metric_for_best_model": "loss", "greater_is_better": False}
INTERVALS = ("steps", "epoch")  # strategies that both saving and validating support
METRICS = ("loss", "perplexity", "eval_loss", "eval_perplexity")
PATIENCE, KEEP_BEST = "early_stopping_patience", "load_best_model_at_end"


def with_defaults(
    train: Mapping[str, Any], *, output_dir: str | None, validates: bool, streams: bool = False
) -> dict[str, Any]:
    """Add the defaults to `[train]`. A stream is validated by steps: to Trainer it is a single epoch."""
    ours = {**TRAIN_DEFAULTS, **({"output_dir": output_dir} if output_dir else {})}
    if validates:
        batch_size = {**ours, **train}["per_device_train_batch_size"]
        ours |= {**WITH_VALIDATION, "per_device_eval_batch_size": batch_size}
        if train.get("eval_strategy", "steps" if streams or "eval_steps" in train else None) == "steps":
            # Trainer's default is `logging_steps`.
            ours |= {"eval_strategy": "steps", "eval_steps": TRAIN_DEFAULTS["save_steps"]}
        if PATIENCE in train or train.get(KEEP_BEST) or train.get("save_strategy") == "best":
            ours |= BY_THE_LOSS
        if _keeps_the_best(train):
            ours |= {KEEP_BEST: True, **_matching_intervals(train)}
    return {**ours, **train}


def check_together(where: str, train: Mapping[str, Any], *, overlap: int, validates: bool) -> None:
    """Raise `ConfigError` for keys of `[train]` that conflict. `train` has its defaults."""
    if train.get("output_dir") == "":
        raise ConfigError(f"{where}: train.output_dir is empty: name a directory")
    if train.get("push_to_hub"):
        raise ConfigError(
            f"{where}: train.push_to_hub: zsl-train uploads nothing; leave it out, and upload the adapter that it "
            "saves with `hf upload ORG/NAME DIR`"
        )
    if train.get("eval_on_start") and not validates:
        raise ConfigError(f"{where}: train.eval_on_start validates: set data.validation")
    best = next((key for key in (PATIENCE, KEEP_BEST) if train.get(key)), None)
    if best and not validates:
        raise ConfigError(f"{where}: train.{best} goes by the validation loss: set data.validation")
    if best and _keeps_the_best(train) and train["save_strategy"] == "no":
        instead = f", or train.{KEEP_BEST} = false" if best == PATIENCE else ""
        raise ConfigError(
            f'{where}: train.{best} keeps the best checkpoint, and train.save_strategy = "no" writes none: '
            f"leave that out{instead}"
        )
    if best and train["eval_strategy"] == "no":
        raise ConfigError(
            f'{where}: train.{best} goes by the validation loss, and train.eval_strategy = "no" asks for none: '
            "leave that out"
        )
    if train.get("save_strategy") == "best" and not validates:
        raise ConfigError(f'{where}: train.save_strategy = "best" goes by the validation loss: set data.validation')
    if train.get("metric_for_best_model") not in (None, *METRICS):
        raise ConfigError(
            f"{where}: train.metric_for_best_model = {train['metric_for_best_model']!r}: unknown metric; there are "
            f"{' and '.join(METRICS[:2])}"
        )
    if train.get("auto_find_batch_size", False) is not False:
        raise ConfigError(
            f"{where}: train.auto_find_batch_size restarts the training within a run, which would mix the metrics of "
            "several trainings: set train.per_device_train_batch_size"
        )
    steps = train.get("gradient_accumulation_steps", 1)
    if isinstance(steps, int) and overlap > steps:
        raise ConfigError(
            f"{where}: train.overlap = {overlap}, but a step has train.gradient_accumulation_steps = {steps} "
            "micro-batches: raise that and lower per_device_train_batch_size"
        )


def _keeps_the_best(train: Mapping[str, Any]) -> bool:
    return bool(train.get(KEEP_BEST, PATIENCE in train))


def _matching_intervals(train: Mapping[str, Any]) -> dict[str, Any]:
    """Return equal save and eval intervals as defaults, so that the best model always has a checkpoint.

    The strategy `best` needs none: Trainer saves after each validation that was the best so far.
    """
    said = train.get("save_strategy", train.get("eval_strategy", TRAIN_DEFAULTS["save_strategy"]))
    if said not in INTERVALS:
        return {}
    steps = train.get("save_steps", train.get("eval_steps", TRAIN_DEFAULTS["save_steps"]))
    return {"save_strategy": said, "eval_strategy": said, "save_steps": steps, "eval_steps": steps}
