"""Read adapters from files, narrow their configurations to their weights, and join several into one.

Uses a meta model for the whole model's modules, and loads none of its weights.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel

from zsl.adapters.embeddings import own_weights, without_copies
from zsl.adapters.save import name_adapted_modules, name_prefix
from zsl.errors import ConfigError, ModelError
from zsl.split.meta_model import meta_model
from zsl.split.stack import embedding_rows
from zsl.text.first_line import first_line

# Fields that may differ between two adapters: their origin, and settings of training only.
_IGNORED = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
# Fields that are joined. Ranks and alphas are a number for all modules, and a table of exceptions.
_NAMES = {"exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"}
_LISTS = {"feedforward_modules", "modules_to_save", "target_parameters"}
_OTHER_HEADS = {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}
_TOKENS = "trainable_token_indices"
_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern", "alpha": "alpha_pattern"}


@dataclass(frozen=True)
class Adapter:
    """Adapter of a whole model. `modules` are the paths of the adapted modules.

    `weights` are the names of base-model weights that the file replaces. `rows` is the number of tokens, if those are
    resized embeddings.
    """

    place: str
    config: Any  # of the method's own class
    tensors: Mapping[str, torch.Tensor]
    modules: Sequence[str] = ()
    weights: frozenset[str] = frozenset()
    rows: int | None = None

    @property
    def method(self) -> str:
        """Name of the method, as in PEFT's `peft_type`."""
        return str(self.config.peft_type.value)

    def meta_model(self, whole: PreTrainedConfig) -> PreTrainedModel:
        """Build a meta model of the whole model that PEFT can load this adapter on."""
        return meta_model(whole, rows=self.rows, loadable=self.weights)


def read_adapter(directory: Path) -> Adapter:
    """Read the adapter in a directory. Raises `ModelError`."""
    try:
        config = PeftConfig.from_pretrained(str(directory))
        if config.task_type in _OTHER_HEADS:
            raise ModelError(
                f"the adapter in {directory} is of a {config.task_type} model, and only those of language models "
                "are exported and merged: PEFT loads it as it is on the whole model with that head, and merges it there"
            )
        return Adapter(str(directory), config, load_file(directory / SAFETENSORS_WEIGHTS_NAME))
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ModelError(f"the adapter in {directory} cannot be read: {first_line(error)}") from error


def narrowed(adapter: Adapter, whole: PreTrainedConfig) -> Adapter:
    """Return the adapter with its configuration narrowed to modules with weights. Raises `ModelError`.

    The configuration that PEFT wrote for a split model also matches modules in the trunk's layers of the whole model,
    where PEFT would add empty adapters.
    """
    config: Any = copy.deepcopy(adapter.config)
    plain = meta_model(whole)
    own = own_weights(adapter.tensors, config, plain)
    resized = own.rows - {embedding_rows(plain)}
    if len(resized) > 1:
        raise ModelError(f"the adapter in {adapter.place} has embeddings and a head of different numbers of tokens")
    adapter = dataclasses.replace(adapter, weights=own.names, rows=next(iter(resized), None))
    model = adapter.meta_model(whole)
    prefix = name_prefix(config)
    known = {name for name, _ in model.named_modules()}

    def has_weights(path: str) -> bool:
        module = path if path in known else path.rpartition(".")[0]  # or a parameter
        return any(name.startswith(f"{prefix}{module}.") for name in adapter.tensors)

    try:
        adapted = get_peft_model(model, copy.deepcopy(config))
        modules = list(getattr(adapted.base_model, "targeted_module_names", ()))
        parameters = list(getattr(adapted.base_model, "targeted_parameter_names", ()))
        written = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        adapter = dataclasses.replace(adapter, tensors=without_copies(adapter.tensors, written))
        by_module = any(map(has_weights, modules + parameters))
        if by_module:
            name_adapted_modules(config, adapted, adapter.tensors.keys(), has_weights)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"the adapter in {adapter.place} does not fit {whole.model_type}: {first_line(error)}"
        ) from error
    if not by_module and not _names_layers(config, modules):
        # The names of weights that all layers share do not contain the layers.
        raise ModelError(
            f"the adapter in {adapter.place} does not say which layers it is for; save it with zsl.save_adapter"
        )
    return dataclasses.replace(adapter, config=config, modules=list(filter(has_weights, modules)))


def union(adapters: Sequence[Adapter]) -> Adapter:
    """Join narrowed adapters into one.

    Raises `ModelError` if two have the same weights, or differ in a field that applies to all modules.
    """
    first = adapters[0]
    config: Any = copy.deepcopy(first.config)
    tensors = dict(first.tensors)
    for other in adapters[1:]:
        twice = sorted(tensors.keys() & other.tensors.keys())
        if twice:
            raise ModelError(f"{other.place} has weights that another adapter has too: {twice[0]}")
        _check_agree(first, other)
        tensors.update(other.tensors)
    if len(adapters) > 1:
        _join_names(config, adapters)
        for name in _LISTS.intersection(vars(config)):
            joined = {item for adapter in adapters for item in getattr(adapter.config, name) or ()}
            setattr(config, name, sorted(joined) or None)
        if hasattr(config, _TOKENS):
            setattr(config, _TOKENS, next((got for each in adapters if (got := getattr(each.config, _TOKENS))), None))
        for number, pattern in _PATTERNS.items():
            if hasattr(config, number) and hasattr(config, pattern):
                _join_numbers(config, number, pattern, adapters)
    return Adapter(
        " and ".join(adapter.place for adapter in adapters),
        config,
        tensors,
        [name for adapter in adapters for name in adapter.modules],
        frozenset().union(*(adapter.weights for adapter in adapters)),
        next((adapter.rows for adapter in adapters if adapter.rows is not None), None),
    )


def _names_layers(config: Any, modules: Iterable[str]) -> bool:
    by_path = set(modules).issubset(getattr(config, "target_modules", None) or ())
    return by_path or bool(getattr(config, "layers_to_transform", None))


def _check_agree(one: Adapter, other: Adapter) -> None:
    if one.method != other.method:
        raise ModelError(
            f"{one.place} and {other.place} are of two methods, {one.method} and {other.method}; one adapter has one"
        )
    if one.config.is_prompt_learning:
        raise ModelError(f"{one.place} and {other.place} both are virtual tokens in front of the text; give one")
    has_patterns = {number for number, pattern in _PATTERNS.items() if hasattr(one.config, pattern)}
    joined = _IGNORED | _NAMES | _LISTS | has_patterns | {*_PATTERNS.values()}
    for field in dataclasses.fields(one.config):
        if field.name not in joined and "dropout" not in field.name:
            here, there = (getattr(adapter.config, field.name) for adapter in (one, other))
            if here != there and not (field.name == _TOKENS and None in (here, there)):
                raise ModelError(
                    f"{one.place} and {other.place} differ in {field.name}, {here} and {there}; one adapter has one"
                )


def _join_names(config: Any, adapters: Sequence[Adapter]) -> None:
    configs = [adapter.config for adapter in adapters]
    layers = [getattr(each, "layers_to_transform", None) for each in configs]
    if all(layers) and all(each.target_modules == config.target_modules for each in configs):
        config.layers_to_transform = sorted({index for of_one in layers for index in of_one or ()})
        return
    for name in _NAMES.intersection(vars(config)):
        setattr(config, name, None)
    config.target_modules = {name for adapter in adapters for name in adapter.modules}


def _join_numbers(config: Any, number: str, pattern: str, adapters: Sequence[Adapter]) -> None:
    """Set the numbers of modules that differ from the common one in the table of exceptions."""
    said = [(getattr(adapter.config, number), getattr(adapter.config, pattern)) for adapter in adapters]
    if all(each == said[0] for each in said):
        return
    exceptions = {}
    for adapter, (default, table) in zip(adapters, said, strict=True):
        numbers = _numbers(adapter.modules, default, table or {})
        exceptions.update({name: value for name, value in numbers.items() if value != getattr(config, number)})
    setattr(config, pattern, exceptions)


def _numbers(modules: Iterable[str], default: Any, table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: table.get(get_pattern_key(list(table), name), default) for name in modules}


def named_model(directories: Sequence[Path]) -> str:
    """Return the base model that the first of these adapters names. Raises `ConfigError` if it is missing."""
    named = read_adapter(directories[0]).config.base_model_name_or_path
    if not named:
        raise ConfigError(f"{directories[0]} does not name its base model: name it with --model")
    return str(named)
