"""Questions about a PEFT model that PEFT answers for a plain model with one adapter only.

A model may be in the wrappers of torch.compile, DistributedDataParallel or accelerate, have several adapters, and have
weights of its own that were trained, or made new by `resize_token_embeddings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel  # type: ignore[import-untyped]
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import ModulesToSaveWrapper

from zsl.errors import ModelError
from zsl.split.stack import embedding_rows


def unwrapped(model: Any) -> Any:
    """The model inside the wrappers of torch.compile, DistributedDataParallel and accelerate; itself without one."""
    while (inner := extract_model_from_parallel(model, keep_torch_compile=False)) is not model:
        model = inner
    return model


def active_adapter(model: PeftModel) -> str:
    """The name of the adapter that the model computes with. Raises `ModelError` if those are several, or none.

    `PeftModel.active_adapter` does not follow `base_model.set_adapter`.
    """
    names = list(dict.fromkeys(model.active_adapters))
    if len(names) != 1:
        raise ModelError(
            f"{len(names)} adapters of {', '.join(model.peft_config)} are active, and one is needed: choose it with "
            "model.set_adapter(name)"
        )
    return names[0]


def base_weights(model: PeftModel, saved: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the base model that its checkpoint does not have: those that were trained, and resized embeddings.

    So are those that `load_state_dict` changed. By their names in the PEFT model, without those in `saved`, the
    adapter's own.
    """
    base: Any = model.get_base_model()
    loaded = getattr(base, "embedding_rows", None)  # of a split model
    resized: set[int] = set()
    if loaded is not None and embedding_rows(base) != loaded:
        for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
            if layer is not None and not isinstance(layer, ModulesToSaveWrapper):
                resized.update(map(id, layer.parameters()))
    from_a_file = getattr(base, "loaded_weights", ())  # of a split model
    prefix = next((name for name, module in model.named_modules() if module is base), "") + "."
    in_the_file = {tensor.data_ptr() for tensor in saved.values()}
    configs: Any = model.peft_config
    kinds = (PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type) for config in configs.values())
    prefixes = tuple(prefix for prefix in kinds if prefix)

    def of_an_adapter(name: str) -> bool:
        return any(part in model.peft_config or part.startswith(prefixes) for part in name.split("."))

    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if (parameter.requires_grad or id(parameter) in resized or _plain(name.removeprefix(prefix)) in from_a_file)
        and name not in saved
        and parameter.data_ptr() not in in_the_file
        and not of_an_adapter(name)
    }


def note_loaded_weights(model: Any, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    """Remember the names of a split model's weights that `load_state_dict` is going to change.

    PEFT calls it for an adapter's file, which may hold weights of the base model. A pre-hook.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        new: Any = state_dict.get(prefix + name)
        fits = isinstance(new, torch.Tensor) and new.shape == parameter.shape
        if fits and not torch.equal(new.to(parameter), parameter.detach()):
            model.loaded_weights.add(_plain(name))


def _plain(name: str) -> str:
    """The name of a weight before PEFT put a layer of its own around it."""
    return ".".join(part for part in name.split(".") if part != "base_layer")
