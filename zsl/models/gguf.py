"""Dequantize a GGUF file into a checkpoint directory, which is cached.

Transformers reads a GGUF file as a whole, so the conversion runs in a subprocess: the calling process never holds the
weights of the other side.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from zsl.errors import ModelError

logger = logging.getLogger(__name__)

# -P: a random.py in the working directory must not shadow the library's. The path of zsl is passed explicitly.
_ROOT = str(Path(__file__).resolve().parents[2])
_START = "import sys; sys.path.append(sys.argv[1]); from zsl.models.gguf import convert; convert(*sys.argv[2:])"


def dequantized_directory(file: Path) -> Path:
    """Return the checkpoint directory (fp32 safetensors, configuration, tokenizer) of a GGUF file.

    It is in the cache of huggingface_hub under the digest of the file's content, and is written if missing. Raises
    `ModelError` if the file cannot be read or converted.
    """
    from huggingface_hub.constants import HF_HOME

    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"model {str(file)!r}: {error.strerror}") from error
    directory = Path(HF_HOME) / "zsl" / "gguf" / digest[:32]
    if not directory.is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        locked = os.open(directory.parent, os.O_RDONLY)
        try:
            fcntl.flock(locked, fcntl.LOCK_EX)  # a command and its daemon need the file at once
            if not directory.is_dir():
                _convert_aside(file, directory)
        finally:
            os.close(locked)
    return directory


def _convert_aside(file: Path, directory: Path) -> None:
    logger.warning("dequantizing %s, once: that may take minutes", file)
    aside = Path(tempfile.mkdtemp(prefix=".converting-", dir=directory.parent))
    try:
        command = [sys.executable, "-P", "-c", _START, _ROOT, str(file.resolve()), str(aside)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            reason = (finished.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ModelError(f"model {str(file)!r} cannot be dequantized: {reason}")
        os.replace(aside, directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def convert(file: str, directory: str) -> None:
    """Write a GGUF file as a checkpoint into a directory. Needs the memory of the whole model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(Path(file).parent), "gguf_file": Path(file).name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The loaded model is marked as quantized, and transformers saves no quantized GGUF model; a new one is not marked.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**where).save_pretrained(directory)
