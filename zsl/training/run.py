"""A whole run of `zsl-train`: configuration, model, connection, data, training, adapters, summary, in this order."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
import xxhash
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import TrainingArguments, set_seed

from zsl.client.model import load_client
from zsl.client.remote import RemoteTrunk
from zsl.errors import ConfigError, ModelError, RunFailed, ZslError
from zsl.split.adapter import adapter_parameters, save_adapter
from zsl.split.cut import parse_cut
from zsl.split.reference import ModelReference, first_line, resolve
from zsl.split.sides import Side, Sides
from zsl.split.stack import layer_count
from zsl.training.config import TrainConfig, check_keys
from zsl.training.data.load import load_data
from zsl.training.embedded import EmbeddedTrunk
from zsl.training.losses import StepLosses
from zsl.training.record import RunRecord, configuration_of
from zsl.training.report import Part, final_summary, layer_range, parts_table, trainable_table
from zsl.training.resume import METRICS, RunDirectory, Start, held, refuse_another_run
from zsl.training.trainer import SplitTrainer
from zsl.trunk.assemble import plan_trunk

SIDES: tuple[Side, Side] = ("bottom", "top")


def train_from_config(config: TrainConfig, file: Path) -> None:
    """Run the training that `config` (read from `file`) describes, and print as it goes.

    A run that was ended before its time goes on from its last checkpoint. Raises `ZslError`. One that ends a training
    that had begun is `RunFailed`, and the adapters of the steps until then have been saved.
    """
    print("Configuration", *(f"  {line}" for line in config.as_toml().splitlines()), sep="\n")
    check_keys(file, "lora", config.lora, _field_names(LoraConfig))
    check_keys(file, "train", config.trainer_arguments, [*_field_names(TrainingArguments), "overlap"])
    overlap = config.overlap
    arguments = _arguments(config, file)
    lora = _checked(file, "lora", lambda: LoraConfig(**config.lora))
    directory = Path(str(arguments.output_dir))
    record = RunRecord(configuration=configuration_of(config))
    with ExitStack() as stack:
        stack.enter_context(held(directory))
        if config.resume_from is None:
            refuse_another_run(directory, record)  # before anything is loaded
        reference = resolve(config.model.name)
        dtype: torch.dtype = getattr(torch, config.model.dtype)
        data, data_line = load_data(config.data, reference)
        set_seed(arguments.seed)
        trunk, trunk_place = _trunk(config, dtype, stack)
        cut = parse_cut(config.trunk.cut) if config.trunk.cut else None
        stack.callback(trunk.close)
        base = load_client(reference, trunk, cut=cut, dtype=dtype)
        welcome = trunk.client.welcome
        sides = Sides(base, welcome.cut)
        model = _checked(file, "lora", lambda: get_peft_model(base, lora))
        parts = _parts(model, sides, reference, trunk, trunk_place)
        print("", parts_table(parts), "", trainable_table(parts), sep="\n")
        print(
            f"\nConnection\n  {trunk.endpoint}, {welcome.model.model_type} "
            f"({welcome.model.layers} layers, weights {welcome.model.weights_digest[:12]}), cut {welcome.cut}, "
            f"{welcome.dtype}, mode {trunk.mode}"
        )
        print(f"\nData set\n  {data_line}\n\nTraining", flush=True)
        run = RunDirectory(directory, record.model_copy(update={"facts": _facts(data, trunk)}))
        # Checkpoints of the model only are no place to go on from.
        asked = False if arguments.save_only_model and config.resume_from is None else config.resume_from
        start = run.start(asked)
        if start is not None:
            of_steps = f" of {start.of_steps}" if start.of_steps is not None else ""
            print(f"  Resuming from {start.checkpoint}, step {start.step}{of_steps}", flush=True)
        _train(model, data, arguments, sides, reference, run, start, overlap=overlap)


def _train(
    model: PeftModel,
    data: Any,
    arguments: TrainingArguments,
    sides: Sides,
    reference: ModelReference,
    run: RunDirectory,
    start: Start | None,
    *,
    overlap: int,
) -> None:
    losses = StepLosses(run.path / METRICS, start.metrics if start else "")
    trainer = SplitTrainer(
        losses=losses,
        directory=run,
        base_model=reference.hub_id,
        seconds_before=start.seconds if start else 0.0,
        overlap=overlap,
        model=model,
        args=arguments,
        train_dataset=data,
    )
    with closing(losses):
        try:
            if start is not None and start.is_the_end:
                # Trainer would take one step more.
                model.load_adapter(str(start.checkpoint), model.active_adapter, is_trainable=True)
            else:
                with logging_redirect_tqdm():
                    trainer.train(resume_from_checkpoint=str(start.checkpoint) if start else None)
        except (Exception, KeyboardInterrupt) as error:
            trainer.close_progress_bar()
            if not losses.taken:
                raise
            what = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
            saved = _save_what_there_is(model, run.path, sides, reference)
            raise RunFailed(f"training ended after step {losses.last_step}: {what}; {_goes_on(run)}{saved}") from error
        try:
            lines = _save(model, run.path, sides, reference)
            losses.finish()
            run.finish(trainer.seconds)
        except (RunFailed, OSError) as error:
            raise RunFailed(
                f"the training is done, but not all of it is saved; {_goes_on(run)}{first_line(error)}"
            ) from error
    print("\nSaved", *(f"  {line}" for line in lines), sep="\n")
    print("", final_summary(losses.all, trainer.seconds), sep="\n")


def _facts(data: Dataset, trunk: RemoteTrunk) -> dict[str, str]:
    """What the configuration's names stand for: files of the same name can be others tomorrow."""
    rows = xxhash.xxh3_128()
    for table in data.with_format("arrow").iter(1000):
        for name in table.column_names:
            rows.update(name.encode())
            rows.update(memoryview(table.column(name).combine_chunks().flatten().to_numpy()))
    welcome = trunk.client.welcome
    return {
        "the rows of the data": rows.hexdigest(),
        "the model's configuration": welcome.model.config_digest,
        "the model's weights": welcome.model.weights_digest,
        "the trunk's layers": str(welcome.cut),
        "the trunk's dtype": str(welcome.dtype),
        "the trunk's mode": str(trunk.mode),
    }


def _trunk(config: TrainConfig, dtype: torch.dtype, stack: ExitStack) -> tuple[RemoteTrunk, str]:
    """The trunk to train through, and where it is in words. `stack` ends what was begun for it."""
    table = config.trunk
    endpoint, place = table.endpoint, table.endpoint
    if endpoint is None and (table.server_key or table.client_key):
        raise ConfigError("trunk.server_key and trunk.client_key are for a daemon: name it with --server HOST:PORT")
    if endpoint is None:
        cut = parse_cut(table.cut) if table.cut else None
        plan = plan_trunk(config.model.name, cut, dtype, "cpu", forward_only=False)
        endpoint = stack.enter_context(EmbeddedTrunk(plan, deterministic=table.deterministic is not None)).endpoint
        place = "embedded trunk"
    trunk = RemoteTrunk(
        endpoint,
        server_key=table.server_key,
        client_key=table.client_key,
        mode=table.mode,
        wire_dtype=getattr(torch, table.wire_dtype) if table.wire_dtype else None,
        deterministic=table.deterministic,
        connect_timeout_seconds=table.connect_timeout_seconds,
        request_timeout_seconds=table.request_timeout_seconds,
    )
    return trunk, str(place)


def _parts(
    model: PeftModel, sides: Sides, reference: ModelReference, trunk: RemoteTrunk, trunk_place: str
) -> list[Part]:
    welcome = trunk.client.welcome
    cut, layers = welcome.cut, layer_count(reference.config)
    ends = {"bottom": f"embeddings, {layer_range(0, cut.start)}", "top": f"{layer_range(cut.stop, layers)}, head"}
    bottom, top = (
        Part(side, ends[side], sides.parameter_count(side), adapter_parameters(model, sides, side), "this process")
        for side in SIDES
    )
    middle = Part("trunk", f"{layer_range(cut.start, cut.stop)}", welcome.trunk_parameters, 0, trunk_place)
    return [bottom, middle, top]


def _goes_on(run: RunDirectory) -> str:
    return f"the same command goes on from {run.last_checkpoint}; " if run.last_checkpoint else ""


def _save_what_there_is(model: PeftModel, directory: Path, sides: Sides, reference: ModelReference) -> str:
    """Save after a failure, which another one must not hide; what became of it, in words."""
    try:
        _save(model, directory, sides, reference)
    except RunFailed as error:
        return f"the adapters of the steps until then are not saved: {error}"
    return f"the adapters of the steps until then are in {directory}"


def _save(model: PeftModel, directory: Path, sides: Sides, reference: ModelReference) -> list[str]:
    """Write `adapter/`, `bottom_lora/` and `top_lora/`; a line about each."""
    save_adapter(model, directory / "adapter", base_model=reference.hub_id)
    lines = [f"{directory / 'adapter'}  (loads on the whole model)"]
    for side in SIDES:
        target = directory / f"{side}_lora"
        try:
            save_adapter(model, target, base_model=reference.hub_id, sides=sides, only=side)
        except ModelError:
            continue  # the configuration puts no adapter on this side
        kilobytes = (target / "adapter_model.safetensors").stat().st_size / 1000
        lines.append(f"{target}  ({kilobytes:.0f} kB)")
    lines.append(f"{directory / 'metrics.jsonl'}  (a line per step)")
    return lines


def _arguments(config: TrainConfig, file: Path) -> TrainingArguments:
    arguments: TrainingArguments = _checked(file, "train", lambda: TrainingArguments(**config.trainer_arguments))
    arguments.dataloader_pin_memory = arguments.dataloader_pin_memory and torch.cuda.is_available()
    return arguments


def _checked(file: Path, table: str, make: Any) -> Any:
    """What a foreign constructor makes of our table, or its complaint as ours."""
    try:
        return make()
    except (ValueError, TypeError, ImportError) as error:
        if isinstance(error, ZslError):
            raise
        raise ConfigError(f"{file}: [{table}]: {first_line(error)}") from error


def _field_names(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.init]
