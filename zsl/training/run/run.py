"""Main function of `zsl-train`: load data and model, connect, train, save adapters, print a summary."""

from __future__ import annotations

import secrets
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
import xxhash
from datasets import Dataset
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import default_data_collator, set_seed

from zsl.adapters.attach import load_adapter, read_adapter_config, with_adapter
from zsl.adapters.save import adapter_parameters
from zsl.client.model import load_client
from zsl.client.remote import RemoteTrunk
from zsl.errors import ConfigError, RunFailed, ZslError
from zsl.models.reference import resolve
from zsl.split.cut import parse_cut
from zsl.split.sides import Sides
from zsl.split.stack import check_can_be_split
from zsl.text.first_line import first_line
from zsl.text.printable import printable
from zsl.training.config.arguments import trainer_arguments
from zsl.training.config.config import TrainConfig
from zsl.training.config.peft_table import check_method, peft_config
from zsl.training.data.load import TrainingData, load_data
from zsl.training.directory.record import DATA, MODEL_CONFIGURATION, WEIGHTS, RunRecord, configuration_of
from zsl.training.directory.resume import METRICS_FILE, RunDirectory, Start, held, refuse_another_run
from zsl.training.report.metrics import RunMetrics
from zsl.training.report.overview import communication, overview
from zsl.training.report.screen import final_summary
from zsl.training.run.checkpoint_fits import check_fits
from zsl.training.run.earlier_adapter import EarlierAdapter
from zsl.training.run.limits import check_adapters, check_limits, context_tokens
from zsl.training.run.open_trunk import check_keys_are_for_a_daemon, open_trunk
from zsl.training.run.results import Results
from zsl.training.trainer.sample import SampleCallback
from zsl.training.trainer.trainer import SplitTrainer
from zsl.trunk.daemon.embedded import EmbeddedTrunk


def train_from_config(
    config: TrainConfig, where: str, *, dry_run: bool = False, embedded: EmbeddedTrunk | None = None
) -> None:
    """Run the training that `config` (read from `where`) describes, and print its progress.

    An interrupted run resumes from its last checkpoint. A dry run ends before the first step. `embedded`: the trunk of
    a configuration without `endpoint`, if it was started already. Raises `ZslError`; `RunFailed` if it fails after the
    first step, with the adapters of the steps until then saved.
    """
    arguments = trainer_arguments(config, where)
    adapter = EarlierAdapter.found(config.adapter) if config.adapter else None
    checkpoints = arguments.save_strategy != "no"
    if adapter is not None:
        peft = read_adapter_config(adapter.place)
        check_method(where, peft, checkpoints=checkpoints)
    else:
        peft = peft_config(where, config.peft, checkpoints=checkpoints)
    directory = Path(str(arguments.output_dir))
    record = RunRecord(configuration=configuration_of(config), run=secrets.token_hex(8))
    cut = parse_cut(config.trunk.cut) if config.trunk.cut else None
    check_keys_are_for_a_daemon(config.trunk)
    with ExitStack() as stack:
        stack.enter_context(held(directory))
        if config.resume_from is None:
            refuse_another_run(directory, record)  # before anything is loaded
        # The output below appears only after loading.
        if sys.stderr is not None and sys.stderr.isatty() and not arguments.disable_tqdm:
            print(f"zsl-train: loading {config.model.name}", file=sys.stderr)
        reference = resolve(config.model.name)
        check_can_be_split(reference.config)
        dtype: torch.dtype = getattr(torch, config.model.dtype)
        virtual_tokens = getattr(peft, "num_virtual_tokens", None) or 0
        data = load_data(config.data, reference, virtual_tokens=virtual_tokens)
        if not isinstance(data.train, Dataset) and arguments.max_steps <= 0:
            raise ConfigError(f"{where}: a stream has no length: set train.max_steps, or data.samples")
        set_seed(arguments.seed)
        trunk, trunk_place = open_trunk(config.trunk, config.model.name, config.model.dtype, stack, embedded)
        base = load_client(reference, trunk, cut=cut, dtype=dtype, quantize=config.model.quantize, layers=config.layers)
        sides = Sides(base, trunk.client.welcome.cut)
        try:
            if adapter is not None:
                adapter.check_is_of(trunk.client.welcome.model)
                model = load_adapter(base, adapter.place, is_trainable=True)
            else:
                model = with_adapter(base, peft)
        except ConfigError as error:
            raise ConfigError(f"{where}: [peft]: {error}") from error
        check_adapters(where, model, trunk)
        if trunk.effective_mode == "none" and not adapter_parameters(model, sides, "top"):
            raise ConfigError(
                f"{where}: no gradient comes back from the trunk (mode none), and no layer behind it is trained: "
                "put adapters on the top, or train in mode exact, through a daemon that serves backward"
            )
        for rows, key in (
            (data.train, "per_device_train_batch_size"),
            (data.validation, "per_device_eval_batch_size"),
        ):
            if rows is not None:
                check_limits(
                    rows,
                    getattr(arguments, key),
                    trunk.client.welcome.limits,
                    key=key,
                    row_tokens=config.data.max_length,
                    virtual_tokens=virtual_tokens,
                    packs=trunk.client.welcome.packs,
                )
        record = record.model_copy(update={"facts": _facts(data, trunk) | (adapter.facts if adapter else {})})
        run = RunDirectory(directory, record)
        # Checkpoints of the model alone cannot be resumed from.
        asked = False if arguments.save_only_model and config.resume_from is None else config.resume_from
        start = run.start(asked)
        if start is not None:
            check_fits(start.checkpoint, model)
            arguments.eval_on_start = False  # the run's first process did that
        metrics = RunMetrics(run.path / METRICS_FILE, start.metrics if start else "")
        stack.enter_context(closing(metrics))
        sample = None
        if (prompt := config.extras.sample_prompt) is not None:
            tokens = context_tokens(reference, trunk.client.welcome) - virtual_tokens
            sample = SampleCallback(prompt, reference.tokenizer(), metrics, context_tokens=tokens)
        trainer = _trainer(
            where,
            metrics=metrics,
            directory=run,
            extras=config.extras,
            sample=sample,
            trunk=trunk,
            base_model=reference.hub_id,
            start=start,
            model=model,
            args=arguments,
            train_dataset=data.train,
            eval_dataset=data.validation,
            data_collator=data.collate or default_data_collator,
        )
        # Print only now, so that an error above is the only output.
        print("Configuration", *(f"  {line}" for line in config.as_toml().splitlines()), sep="\n")
        print("", overview(model, sides, reference, trunk, trunk_place), "", sep="\n")
        print("Data set", *(f"  {printable(line)}" for line in data.lines), sep="\n")
        print(*map(printable, _start_lines(run, start, dry_run=dry_run)), sep="\n", flush=True)
        if dry_run:
            return
        _train(trainer, run, start, Results(model, sides, reference, directory, metrics, run.record), trunk)


def _start_lines(run: RunDirectory, start: Start | None, *, dry_run: bool) -> list[str]:
    """Return lines that say from which step or checkpoint the training starts."""
    if dry_run:
        begins = f"would go on from {start.checkpoint}" if start else "would begin at step 0"
        lines = ["", f"Dry run: everything is there, and the trunk answers. The training {begins}."]
    else:
        lines = ["", "Training"]
        if start is not None:
            of_steps = f" of {start.of_steps}" if start.of_steps is not None else ""
            lines.append(f"  Resuming from {start.checkpoint}, step {start.step}{of_steps}")
    if start is not None and start.differences:
        lines.append(f"  It was made with another configuration: {', '.join(start.differences)}")
    elif start is None and run.holds_a_finished_run:
        lines.append(f"  {run.path} holds a run that came to its end; what this one saves replaces it")
    return lines


def _trainer(where: str, **arguments: Any) -> SplitTrainer:
    """Make the trainer. Raises `ConfigError` for values of `[train]` that the libraries refuse."""
    try:
        trainer = SplitTrainer(**arguments)
        trainer.prepare()
    except ZslError:
        raise
    except Exception as error:  # libraries that an argument enables raise any type
        raise ConfigError(f"{where}: [train]: {first_line(error)}") from error
    return trainer


def _train(trainer: SplitTrainer, run: RunDirectory, start: Start | None, results: Results, trunk: RemoteTrunk) -> None:
    metrics = results.metrics
    try:
        if start is not None and start.is_the_end:
            trainer.end_at(start)
        else:
            with logging_redirect_tqdm():
                trainer.train(resume_from_checkpoint=str(start.checkpoint) if start else None)
    except (Exception, KeyboardInterrupt) as error:
        trainer.close_progress_bar()
        if not metrics.taken:
            raise
        what = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
        saved = results.save_after_a_failure()
        raise RunFailed(f"training ended after step {metrics.last_step}: {what}; {_goes_on(run)}{saved}") from error
    if not metrics.taken and start is None:
        raise RunFailed("the data and [train] give no training step; nothing was saved")
    try:
        lines = results.save()
        metrics.finish()
        run.finish(trainer.seconds)
    except (RunFailed, OSError) as error:
        raise RunFailed(
            f"the training is done, but not all of it is saved; {_goes_on(run)}{first_line(error)}"
        ) from error
    if not metrics.taken:
        print("  There was no step left to take.")
    print("\nSaved", *(f"  {printable(line)}" for line in lines), sep="\n")
    print("", final_summary(metrics.losses, trainer.seconds, metrics.validations, kept=trainer.kept_step), sep="\n")
    if trainer.measured.steps:
        print("", communication(trainer.measured, results.model, trunk), sep="\n")


def _facts(data: TrainingData, trunk: RemoteTrunk) -> dict[str, str]:
    """Return digests of the data and the model, since files of the same name may change, and the trunk's settings."""
    welcome = trunk.client.welcome
    return {
        DATA: data.fingerprint or _digest(data.train, data.validation),
        MODEL_CONFIGURATION: welcome.model.config_digest,
        WEIGHTS: welcome.model.weights_digest,
        "the trunk's layers": str(welcome.cut),
        "the trunk's dtype": str(welcome.dtype),
        "the trunk's quantization": str(welcome.quantization),
        "the trunk's mode": str(trunk.effective_mode),
    }


def _digest(*parts: Any) -> str:
    """Return a digest of the rows of data sets, including the rows' lengths."""
    rows = xxhash.xxh3_128()
    for part in parts:
        if part is None:
            continue
        for table in part.with_format("arrow").iter(1000):
            for name in table.column_names:
                values = table.column(name).combine_chunks()
                rows.update(name.encode())
                rows.update(memoryview(values.value_lengths().to_numpy(zero_copy_only=False)))
                rows.update(memoryview(values.flatten().to_numpy(zero_copy_only=False)))
    return rows.hexdigest()


def _goes_on(run: RunDirectory) -> str:
    return f"the same command goes on from {run.last_checkpoint}; " if run.last_checkpoint else ""
