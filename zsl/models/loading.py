"""Load the part of a model that a side owns, with plain `from_pretrained`."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from zsl.errors import ModelError
from zsl.models.identity import RANDOM_SEED
from zsl.models.quantize import compute_as_in_training, keep_as_loaded, quantization_config
from zsl.models.random_weights import initialize_by_name
from zsl.models.reference import ModelReference
from zsl.split.cut import check_cut
from zsl.split.parts import PartName
from zsl.split.slots import middle_only, put_ghosts, with_hole
from zsl.split.stack import BUILDING, base_class, check_can_be_split, layer_count, whole_class
from zsl.text.first_line import first_line
from zsl.wire.messages import Cut, Quantization

AdaptedLayers = Literal["client", "all"]


def load_client_part(
    reference: ModelReference,
    cut: Cut,
    dtype: torch.dtype = torch.float32,
    *,
    quantize: Quantization | None = None,
    layers: AdaptedLayers = "client",
    auto_class: Any = AutoModelForCausalLM,
) -> PreTrainedModel:
    """Load the model that `auto_class` picks, with pass-throughs in place of the cut's layers, which need no memory.

    A head that the checkpoint lacks is initialized as transformers does, except that of a causal language model.
    `layers="all"`: they have those layers' modules, with weights that hold no memory, for adapters.
    `quantize` loads the linear layers in 4 or 8 bits; see `zsl.models.quantize`.
    `use_cache` is off in forwards that do not ask for it; `generate` does.
    Raises `ModelError`.
    """
    _check(reference, "client", cut)
    cls = with_hole(whole_class(reference.config, auto_class), cut)
    quantization = quantization_config(reference, quantize, dtype, auto_class) if quantize else None
    model = _load(cls, reference, dtype, quantization, may_lack_head=auto_class is not AutoModelForCausalLM)
    keep_as_loaded(model)
    if layers == "all":
        put_ghosts(model)
    del model.layers_in_trunk
    if reference.part is not None:
        model.name_or_path = reference.hub_id or ""  # an adapter is saved for the whole model, not for the part
    model.config.use_cache = False
    return model


def load_trunk_part(
    reference: ModelReference,
    cut: Cut,
    dtype: torch.dtype = torch.float32,
    *,
    quantize: Quantization | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Load the base model with the cut's layers only, frozen and in eval mode. Raises `ModelError`.

    `quantize`: load the linear layers in 4 or 8 bits; see `zsl.models.quantize`. `device`: where that is done.
    """
    _check(reference, "trunk", cut)
    cls = middle_only(base_class(reference.config), reference.config, cut)
    if quantize is None:
        model = _load(cls, reference, dtype)
    else:
        model = _load(cls, reference, dtype, quantization_config(reference, quantize, dtype), device=str(device))
    model.config.use_cache = False
    model.eval().requires_grad_(False)
    keep_as_loaded(model)
    compute_as_in_training(model)
    return model


def load_whole(reference: ModelReference, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load the whole model, with the same weights as the two parts. Raises `ModelError`."""
    if reference.part is not None:
        raise ModelError(f"{reference.part.described(reference.text)}: the whole model is needed here")
    return _load(whole_class(reference.config), reference, dtype)


def _check(reference: ModelReference, part: PartName, cut: Cut) -> None:
    check_cut(cut, layer_count(reference.config))
    check_can_be_split(reference.config)
    if reference.part is not None:
        reference.part.cut_for(reference.text, part, cut)


def check_part_loads(reference: ModelReference) -> None:
    """Raise `ModelError` if the referenced part lacks a tensor that its side needs. Allocates no weights."""
    config, part = reference.config, reference.part
    if part is None:
        return
    if part.part == "client":
        cls = with_hole(whole_class(config), part.cut)
    else:
        cls = middle_only(base_class(config), config, part.cut)
    _load(cls, reference, torch.float32, device="meta")


def _load(
    cls: Any,
    reference: ModelReference,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None = None,
    *,
    device: str | None = None,
    may_lack_head: bool = False,
) -> PreTrainedModel:
    if reference.location is None:
        return _build_random(cls, reference, dtype)
    try:
        with BUILDING:
            model, loading = cls.from_pretrained(
                reference.location,
                config=reference.config,
                dtype=dtype,
                use_safetensors=True,
                variant=reference.part.variant if reference.part is not None else None,
                output_loading_info=True,
                quantization_config=quantization,
                device_map=device,
            )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ModelError(f"model {reference.text!r} cannot be loaded: {first_line(error)}") from error
    loaded: PreTrainedModel = model
    missing = sorted(loading["missing_keys"])
    if may_lack_head and loaded.base_model is not loaded:
        missing = [name for name in missing if name.startswith(f"{loaded.base_model_prefix}.")]
    if missing:
        raise ModelError(f"model {reference.text!r}: the checkpoint lacks {', '.join(missing[:3])}")
    return loaded


def _build_random(cls: Any, reference: ModelReference, dtype: torch.dtype) -> PreTrainedModel:
    # Built on the meta device, so that modules that are replaced never have memory.
    with BUILDING, torch.device("meta"):
        model: PreTrainedModel = cls._from_config(reference.config, dtype=dtype)
    model.to_empty(device="cpu")
    model.tie_weights()
    initialize_by_name(model, RANDOM_SEED)
    model.eval()
    return model
