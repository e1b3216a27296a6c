"""Export adapters as one PEFT adapter of the whole model, and check that PEFT loads it.

Needs the whole model's configuration, but not its weights.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from zsl.adapters.embeddings import SAVE_BY_ZSL, own_weights
from zsl.adapters.union import Adapter, narrowed, read_adapter, union
from zsl.errors import ModelError
from zsl.files.new_directory import new_directory
from zsl.models.reference import ModelReference
from zsl.split.meta_model import meta_model
from zsl.split.stack import find_stack
from zsl.text.first_line import first_line

# Beginning of PEFT's warning about a file without the weights that its configuration requires.
_MISSING = "Found missing adapter keys"


CARD = """\
---
{header}
---

# Adapter for {base_model}

It was trained by split learning, with zsl: one machine held the first and last layers, another one those between them.
It is an adapter of the whole model, and needs no more than PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base_model}")
model = PeftModel.from_pretrained(model, "path/to/this/directory")
```

| | |
|---|---|
{rows}
"""


@dataclass(frozen=True)
class Exported:
    """Facts about an exported adapter, for display. `layers` are the indices of the adapted layers."""

    method: str
    rank: int | None
    layers: Sequence[int]
    tensors: int
    parameters: int
    base_model: str | None

    def rows(self) -> dict[str, str]:
        """Return the facts as text, by name."""
        rows = {"method": self.method}
        if self.rank is not None:
            rows["rank"] = str(self.rank)
        if self.layers:
            rows["layers"] = ", ".join(map(str, self.layers))
        return rows | {"tensors": str(self.tensors), "parameters": f"{self.parameters:,}"}


def export(
    places: Sequence[Path],
    reference: ModelReference,
    target: Path,
    *,
    base_model: str | None = None,
    facts: Mapping[str, str] | None = None,
) -> Exported:
    """Write the adapters in `places` to `target`, as one adapter of the whole model of `reference`.

    `base_model` is the hub id in its configuration, by default that of `reference`. `facts` are added to the model
    card. PEFT loads the result, and every tensor is compared, before it is moved to `target`.
    Raises `ModelError`, `ConfigError` if `target` exists, `RunFailed` if it cannot be written.
    """
    base_model = base_model or reference.hub_id
    adapter = whole_adapter(places, reference)
    exported = Exported(
        method=adapter.method,
        rank=getattr(adapter.config, "r", None),
        layers=_layers_of(adapter, reference),
        tensors=len(adapter.tensors),
        parameters=sum(tensor.numel() for tensor in adapter.tensors.values()),
        base_model=base_model,
    )
    with new_directory(target) as written:
        write_whole_adapter(adapter, reference, written, base_model=base_model)
        _model_card(exported, facts or {}).save(written / "README.md")
    return exported


def whole_adapter(places: Sequence[Path], reference: ModelReference) -> Adapter:
    """Read the adapters in these directories as one of the whole model. Raises `ModelError`."""
    return union([narrowed(read_adapter(place), reference.config) for place in places])


def write_whole_adapter(
    adapter: Adapter, reference: ModelReference, directory: Path, *, base_model: str | None = None
) -> None:
    """Write an adapter into a directory, and check that PEFT loads it. Raises `ModelError`, `OSError`."""
    config = copy.deepcopy(adapter.config)
    config.inference_mode = True
    config.base_model_name_or_path = base_model
    config.revision = None
    config.save_pretrained(str(directory))
    tensors = {name: tensor.contiguous() for name, tensor in adapter.tensors.items()}
    save_file(tensors, directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    _check_loads(adapter, reference, directory)


def _check_loads(adapter: Adapter, reference: ModelReference, directory: Path) -> None:
    """Raise `ModelError` unless PEFT loads these tensors on the whole model from a directory, bit for bit."""
    model = adapter.meta_model(reference.config)
    lacking = own_weights(adapter.tensors, adapter.config, model).lacking
    if adapter.rows is not None and lacking:
        raise ModelError(
            f"{adapter.place} is of a model that was resized to {adapter.rows} tokens, and lacks {lacking}: give the "
            f"adapter of the other side too, or {SAVE_BY_ZSL}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", _MISSING)
            loaded: Any = PeftModel.from_pretrained(
                model, str(directory), autocast_adapter_dtype=False, torch_device="cpu"
            )
    except (UserWarning, OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"PEFT does not load {adapter.place} on a whole {reference.config.model_type} model: {first_line(error)}"
        ) from error
    found = loaded.state_dict() | get_peft_model_state_dict(loaded, save_embedding_layers=False)
    wrong = [name for name, tensor in adapter.tensors.items() if not _same(found.get(name), tensor)]
    if wrong:
        raise ModelError(
            f"{adapter.place} does not fit a whole {reference.config.model_type} model: {len(wrong)} of its "
            f"{len(adapter.tensors)} tensors match no module, for example {wrong[0]}"
        )


def _same(found: torch.Tensor | None, tensor: torch.Tensor) -> bool:
    """Return whether PEFT loaded the tensor, bit for bit; it may have a wider dtype."""
    if found is None or found.shape != tensor.shape:
        return False
    loaded, expected = (each.detach().to(tensor.dtype).reshape(-1).view(torch.uint8) for each in (found, tensor))
    return torch.equal(loaded, expected)


def _layers_of(adapter: Adapter, reference: ModelReference) -> list[int]:
    inside = f".{find_stack(meta_model(reference.config)).name}."
    found = {name.partition(inside)[2].partition(".")[0] for name in adapter.tensors}
    return sorted(int(index) for index in found if index.isdigit())


def _model_card(exported: Exported, facts: Mapping[str, str]) -> ModelCard:
    """Return the model card, in PEFT's form, with facts about the training."""
    data = ModelCardData(
        base_model=exported.base_model,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["peft", "zsl", "split-learning", exported.method.lower()],
    )
    rows = "\n".join(f"| {name} | {value} |" for name, value in {**exported.rows(), **facts}.items())
    card = CARD.format(header=data.to_yaml(), rows=rows, base_model=exported.base_model or "the base model")
    return ModelCard(card)
