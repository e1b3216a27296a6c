"""Find the wrapped model, the active adapter and the changed base weights of a PEFT model.

PEFT's own functions cover a plain model with one adapter only. A model may be wrapped by torch.compile,
DistributedDataParallel or accelerate, have several adapters, and have base weights that were trained, or replaced by
`resize_token_embeddings`.
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
from zsl.split.loaded_weights import plain_name
from zsl.split.stack import embedding_rows


def unwrapped(model: Any) -> Any:
    """Return the model inside any wrappers of torch.compile, DistributedDataParallel and accelerate."""
    while (inner := extract_model_from_parallel(model, keep_torch_compile=False)) is not model:
        model = inner
    return model


def active_adapter(model: PeftModel) -> str:
    """Return the name of the active adapter. Raises `ModelError` if several are active, or none.

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
    """Return the weights of the base model that differ from its checkpoint, by their names in the PEFT model.

    These are the trained weights, resized embeddings, and weights that `load_state_dict` changed, without those in
    `saved`, which are the adapter's own.
    """
    base: Any = model.get_base_model()
    loaded = getattr(base, "embedding_rows", None)  # set on split models
    resized: set[int] = set()
    if loaded is not None and embedding_rows(base) != loaded:
        for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
            if layer is not None and not isinstance(layer, ModulesToSaveWrapper):
                resized.update(map(id, layer.parameters()))
    from_a_file = getattr(base, "loaded_weights", ())  # set on split models
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
        if (parameter.requires_grad or id(parameter) in resized or plain_name(name.removeprefix(prefix)) in from_a_file)
        and name not in saved
        and parameter.data_ptr() not in in_the_file
        and not of_an_adapter(name)
    }
