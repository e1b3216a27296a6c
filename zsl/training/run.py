"""A whole run of `zsl-train`: configuration, model, connection, data, training, adapters, summary, in this order."""

from __future__ import annotations

import dataclasses
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
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
from zsl.training.data import load_data
from zsl.training.embedded import EmbeddedTrunk
from zsl.training.report import Part, final_summary, layer_range, parts_table, trainable_table
from zsl.training.trainer import SplitTrainer, StepLosses
from zsl.trunk.assemble import plan_trunk

SIDES: tuple[Side, Side] = ("bottom", "top")


def train_from_config(config: TrainConfig, file: Path) -> None:
    """Run the training that `config` (read from `file`) describes, and print as it goes.

    Raises `ZslError`. One that ends a training that had begun is `RunFailed`, and the adapters of the steps until
    then have been saved.
    """
    print("Configuration", *(f"  {line}" for line in config.as_toml().splitlines()), sep="\n")
    check_keys(file, "lora", config.lora, _field_names(LoraConfig))
    check_keys(file, "train", config.trainer_arguments, [*_field_names(TrainingArguments), "overlap"])
    overlap = config.overlap
    arguments = _arguments(config, file)
    lora = _checked(file, "lora", lambda: LoraConfig(**config.lora))
    reference = resolve(config.model.name)
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    data, data_line = load_data(config.data, reference)
    set_seed(arguments.seed)
    with ExitStack() as stack:
        trunk, trunk_place = _trunk(config, dtype, stack)
        cut = parse_cut(config.trunk.cut) if config.trunk.cut else None
        base = load_client(reference, trunk, cut=cut, dtype=dtype)
        stack.callback(trunk.close)
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
        _train(model, data, arguments, sides, reference, overlap=overlap)


def _train(
    model: PeftModel,
    data: Any,
    arguments: TrainingArguments,
    sides: Sides,
    reference: ModelReference,
    *,
    overlap: int,
) -> None:
    directory = Path(str(arguments.output_dir))
    losses = StepLosses(directory / "metrics.jsonl")
    trainer = SplitTrainer(losses=losses, overlap=overlap, model=model, args=arguments, train_dataset=data)
    began = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    except (Exception, KeyboardInterrupt) as error:
        trainer.close_progress_bar()
        if not losses.all:
            raise
        _save(model, directory, sides, reference)
        what = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
        raise RunFailed(
            f"training ended after step {len(losses.all)}: {what}; "
            f"the adapters of the steps until then are in {directory}"
        ) from error
    finally:
        losses.close()
    saved = _save(model, directory, sides, reference)
    print("\nSaved", *(f"  {line}" for line in saved), sep="\n")
    print("", final_summary(losses.all, time.monotonic() - began), sep="\n")


def _trunk(config: TrainConfig, dtype: torch.dtype, stack: ExitStack) -> tuple[RemoteTrunk, str]:
    """The trunk to train through, and where it is in words. `stack` ends what was begun for it."""
    table = config.trunk
    endpoint, place = table.endpoint, table.endpoint
    if endpoint is None:
        cut = parse_cut(table.cut) if table.cut else None
        plan = plan_trunk(config.model.name, cut, dtype, "cpu", forward_only=False)
        endpoint = stack.enter_context(EmbeddedTrunk(plan, deterministic=table.deterministic is not None)).endpoint
        place = "embedded trunk"
    trunk = RemoteTrunk(
        endpoint,
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
