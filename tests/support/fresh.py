"""A process that has never heard of zsl: what transformers and PEFT alone make of files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SCRIPT = """
import sys, warnings
warnings.simplefilter("error")
import torch, transformers
warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
from safetensors.torch import load_file, save_file
given, got, *places = sys.argv[1:]
torch.set_num_threads(2)
results = {}
for checkpoint, adapter in zip(places[::2], places[1::2]):
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.config.use_cache and model.generation_config.use_cache in (None, True)
    if adapter:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        results[str(len(results))] = model.eval()(input_ids=load_file(given)["ids"], use_cache=False).logits
assert "zsl" not in sys.modules
save_file(results, got)
"""


def logits_elsewhere(directory: Path, ids: torch.Tensor, *pairs: tuple[Path, Path | None]) -> list[torch.Tensor]:
    """The logits of each (checkpoint, adapter or none), from a process of its own. A warning fails it.

    `directory` is to write in.
    """
    given, got = directory / "ids.safetensors", directory / "logits.safetensors"
    save_file({"ids": ids}, given)
    places = [str(place or "") for pair in pairs for place in pair]
    command = [sys.executable, "-c", SCRIPT, str(given), str(got), *places]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=directory)
    assert finished.returncode == 0, finished.stderr
    assert "Found missing" not in finished.stderr and "newly initialized" not in finished.stderr, finished.stderr
    logits = load_file(got)
    return [logits[str(index)] for index in range(len(pairs))]
