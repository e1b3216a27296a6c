"""Make PEFT's configuration of `[peft]`: check the method and its keys.

A method is accepted if a test shows that its gradients through a trunk are the local model's, that its file loads on
the whole model, and that a training can resume from it (tests/test_peft_methods.py). All others are refused with a
reason. `zsl.adapters.attach` puts the adapter into a model.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from zsl.adapters.save import ONLY_TO_USE
from zsl.errors import ConfigError
from zsl.training.config.config import LAYERS
from zsl.training.config.third_party import make_foreign
from zsl.training.config.unknown_keys import check_keys

_SHOWN = """
    ADAPTION_PROMPT BEFT BOFT C3A CPT DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LILY LN_TUNING LOHA LOKR
    LORA MISS OFT OSF PEANUT PROMPT_TUNING PSOFT PVERA P_TUNING RANDLORA ROAD SHIRA SUPERTUNING TINYLORA
    TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT
"""
SHOWN = frozenset(_SHOWN.split())
_INTO_EVERY_LAYER = "it puts keys and values into every layer, the trunk's too; it works from Python"
_REFUSED = {
    "CARTRIDGE": _INTO_EVERY_LAYER,
    "PREFIX_TUNING": _INTO_EVERY_LAYER,
    "SHADOW": "a second hidden state goes with the first through every layer, the trunk's too",
    "XLORA": "its classifier reads the hidden states of every layer, and those inside the trunk stay there",
}
# Common names of methods that PEFT has as options, and how to configure them.
_WRITTEN = {
    "dora": 'method = "lora" with use_dora = true',
    "rslora": 'method = "lora" with use_rslora = true',
    "qlora": 'method = "lora" and [model] quantize = "4bit"',
    "pissa": 'method = "lora" with init_lora_weights = "pissa"',
    "olora": 'method = "lora" with init_lora_weights = "olora"',
}
_ADDS_TO_THE_LOSS = "it adds a term to the loss, which Trainer does not"
_REFUSED_KEYS = {
    "arrow_config": "it routes between several adapters, and zsl-train trains one",
    "ensure_weight_tying": "PEFT does not tie again what it loads",
    "kasa_config": _ADDS_TO_THE_LOSS,
    "layer_replication": "the layers in the trunk cannot be replicated from here",
    "monteclora_config": _ADDS_TO_THE_LOSS,
}
_FROM_DATA = "it is computed from data before the training, which zsl-train does not do"
_REFUSED_INITIALIZATIONS = {
    "corda": _FROM_DATA,
    "eva": _FROM_DATA,
    "lora_ga": _FROM_DATA,
    "loftq": 'it replaces the base weights; quantize them with [model] quantize = "4bit"',
    "pissa_niter": "PEFT draws it anew when it loads the adapter, which then fits no more; write pissa",
}
# Keys that PEFT needs and has no default for.
_NEEDED = {
    "ADAPTION_PROMPT": ("adapter_len", "adapter_layers"),
    "P_TUNING": ("num_virtual_tokens",),
    "PROMPT_TUNING": ("num_virtual_tokens",),
}
_NOT_A_USERS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"}


def peft_config(where: str, table: Mapping[str, Any], *, checkpoints: bool = True) -> PeftConfig:
    """Make the PEFT configuration of `[peft]` in `where` (a file).

    `checkpoints`: whether the training writes checkpoints to resume from. Raises `ConfigError` for an unknown method or
    key, for a value that PEFT refuses, and for a setting that does not work through a trunk.
    """
    values = copy.deepcopy({"task_type": "CAUSAL_LM", **table})  # PEFT modifies lists passed to it
    values.pop(LAYERS, None)
    method = str(values.pop("method", "lora"))
    kind = method.upper().replace("-", "_")
    cls = {str(key.value): found for key, found in PEFT_TYPE_TO_CONFIG_MAPPING.items()}.get(kind)
    if cls is None:
        raise ConfigError(f"{where}: peft.method = {method!r}: {_what_is_meant(method)}")
    fields = {field.name for field in dataclasses.fields(cls) if field.init}
    reason = _why_not(kind, fields, checkpoints=checkpoints)
    if reason:
        raise ConfigError(f"{where}: peft.method = {method!r} does not work here: {reason}")
    if "r" in values and "r" not in fields:
        raise ConfigError(f"{where}: unknown key peft.r (--lora-rank); peft.method = {method!r} has none")
    check_keys(where, "peft", values, fields - _NOT_A_USERS | {LAYERS})
    for key in _NEEDED.get(kind, ()):
        if values.get(key) is None:
            raise ConfigError(f"{where}: peft.{key} is needed for peft.method = {method!r}")
    for key, value in values.items():
        reason = _REFUSED_KEYS.get(key) if value is not False else None
        if key == "task_type" and value != "CAUSAL_LM":
            reason = "zsl-train trains causal language models"
        if key == "init_lora_weights" and isinstance(value, str):
            reason = next((why for name, why in _REFUSED_INITIALIZATIONS.items() if value.startswith(name)), None)
        if key == "save_only_topk_weights" and value and checkpoints:
            reason = _no_checkpoint("its file does not hold all that it learns")
        if reason:
            raise ConfigError(f"{where}: peft.{key} = {value!r} does not work here: {reason}")
    made: PeftConfig = make_foreign(cls, where, "peft", values)
    return made


def check_method(where: str, config: Any, *, checkpoints: bool = True) -> None:
    """Raise `ConfigError` if the method of an existing adapter does not work through a trunk."""
    kind = str(config.peft_type.value)
    reason = _why_not(kind, {field.name for field in dataclasses.fields(config)}, checkpoints=checkpoints)
    if reason:
        raise ConfigError(f"{where}: an adapter of the method {kind.lower()} does not work here: {reason}")


def _why_not(kind: str, fields: set[str], *, checkpoints: bool) -> str | None:
    """Return the reason why a method does not work through a trunk or in zsl-train; None if it works."""
    tuner = {str(key.value): found for key, found in PEFT_TYPE_TO_TUNER_MAPPING.items()}.get(kind)
    if kind in _REFUSED:
        return _REFUSED[kind]
    if hasattr(tuner, "update_and_allocate"):
        return (
            "its ranks are given out by a call after each step, which Trainer does not make; it works in your own loop"
        )
    if fields & {"n_tasks", "num_tasks"}:
        return "it needs task_ids with each row, which zsl-train's data does not have; it works from Python"
    if kind not in SHOWN:
        return "it is not shown to give the local model's gradients"
    if kind in ONLY_TO_USE and checkpoints:
        return _no_checkpoint("its file does not hold the encoder that learns")
    return None


def _no_checkpoint(why: str) -> str:
    return f'{why}, so a training cannot go on from it; set train.save_strategy = "no"'


def _what_is_meant(method: str) -> str:
    name = method.lower().replace("-", "_")
    if name in _WRITTEN:
        return f"write {_WRITTEN[name]}"
    known = sorted(kind.lower() for kind in SHOWN)
    near = difflib.get_close_matches(name, [*known, *_WRITTEN], n=1)
    if not near:
        return f"unknown; there are {', '.join(known)}"
    return f"unknown; did you mean {near[0]}{f' ({_WRITTEN[near[0]]})' if near[0] in _WRITTEN else ''}?"
