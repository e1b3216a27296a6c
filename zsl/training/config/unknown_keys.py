"""Report unknown keys of the configuration, with a suggestion of a known one. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from zsl.errors import ConfigError

# Names of a key in other tools.
OTHER_NAMES = {
    "model.name": ("id", "path", "model", "model_id", "model_name", "model_name_or_path", "base_model"),
    "model.dtype": ("torch_dtype", "precision"),
    "model.quantize": ("quantization", "load_in_4bit", "load_in_8bit"),
    "trunk.endpoint": ("server", "address", "host", "url"),
    "trunk.request_timeout_seconds": ("timeout", "timeout_seconds", "request_timeout"),
    "trunk.connect_timeout_seconds": ("connect_timeout",),
    "data.name": ("dataset", "dataset_name", "data_files", "file", "path"),
    "data.max_length": ("max_seq_length", "max_seq_len", "seq_len", "sequence_length", "cutoff_len", "block_size"),
    "data.samples": ("max_samples", "max_train_samples", "rows"),
    "data.validation": ("eval", "test", "val", "val_set_size", "validation_split", "eval_split"),
    "data.text_column": ("text_field", "dataset_text_field", "column"),
    "peft.method": ("type", "peft_type"),
    "peft.r": ("rank", "lora_r", "lora_rank"),
    "peft.lora_alpha": ("alpha",),
    "peft.lora_dropout": ("dropout",),
    "peft.target_modules": ("modules", "targets", "target", "lora_target", "lora_target_modules"),
    "train.learning_rate": ("lr",),
    "train.num_train_epochs": ("epoch", "epochs", "num_epochs"),
    "train.max_steps": ("steps", "num_steps", "max_train_steps", "iters", "iterations"),
    "train.per_device_train_batch_size": ("batch_size", "train_batch_size", "micro_batch_size"),
    "train.per_device_eval_batch_size": ("eval_batch_size",),
    "train.gradient_accumulation_steps": ("gradient_accumulation", "grad_accum", "accumulation_steps"),
    "train.output_dir": ("save_dir", "out", "out_dir", "output", "directory"),
    "train.lr_scheduler_type": ("scheduler", "lr_scheduler", "schedule"),
    "train.warmup_steps": ("warmup", "warmup_ratio"),
    "train.optim": ("optimizer",),
    "train.max_grad_norm": ("grad_clip", "clip_grad_norm", "gradient_clipping", "max_norm"),
    "train.early_stopping_patience": ("patience", "early_stopping"),
    "train.resume_from_checkpoint": ("resume",),
}

MAX_LISTED = 20  # keys in an error; other libraries' classes have more than a hundred


def check_keys(where: str, table: str, keys: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ConfigError` for the first unknown key."""
    known = set(known)
    for key in keys:
        if key not in known:
            raise ConfigError(f"{where}: {unknown_key(table, key, known)}")


def unknown_key(table: str, key: str, known: Iterable[str]) -> str:
    """Return the error text for an unknown key, with a suggestion or all keys of a short table."""
    known = sorted(known)
    candidates = [
        meant
        for meant, others in OTHER_NAMES.items()
        if key.lower() in (*others, meant.partition(".")[2])  # its own name: the key is in the wrong table
        and (not meant.startswith(f"{table}.") or meant.partition(".")[2] in known)  # not if the method lacks it
    ]
    candidates.sort(key=lambda meant: not meant.startswith(f"{table}."))
    if not candidates:
        begun = [name for name in known if name.startswith(f"{key}_")]
        candidates = [f"{table}.{near}" for near in difflib.get_close_matches(key, known, n=1) or begun]
    if candidates:
        return f"unknown key {table}.{key}; did you mean {candidates[0]}?"
    all_of_them = f"; [{table}] takes {', '.join(known)}" if len(known) <= MAX_LISTED else ""
    return f"unknown key {table}.{key}{all_of_them}"


def unknown_table(name: str, known: Iterable[str]) -> str:
    """Return the error text for an unknown table, with a suggestion or all tables."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"did you mean [{near[0]}]?" if near else f"there are {', '.join(f'[{table}]' for table in known)}"
    return f"unknown table [{name}]; {meant}"
