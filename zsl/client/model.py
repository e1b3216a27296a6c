"""`load_client`: load a transformers model with a `RemoteTrunk` in place of the trunk's layers."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any, get_args

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate

from zsl.client.prefix import find_prefix
from zsl.client.remote import RemoteTrunk
from zsl.client.revealed import ARGUMENTS
from zsl.client.row_norms import RowNorms
from zsl.errors import ConfigError, ModelError
from zsl.models.identity import identify
from zsl.models.loading import AdaptedLayers, load_client_part
from zsl.models.reference import ModelReference, resolve
from zsl.split.slots import copy_plain_attributes
from zsl.split.stack import find_stack, whole_class
from zsl.split.trunk_lora import slots_of
from zsl.wire.messages import Cut, Quantization

# Arguments of a model that need data from inside the trunk that the daemon does not send.
_REFUSED = {
    "output_attentions": "the attentions inside the trunk stay there; "
    "for those of your own layers register forward hooks on them",
}
_LABELS = ("labels", "shift_labels", "start_positions", "end_positions")  # names in the losses of transformers


def load_client(
    model: str | ModelReference,
    trunk: RemoteTrunk,
    *,
    cut: Cut | None = None,
    dtype: torch.dtype = torch.float32,
    quantize: Quantization | None = None,
    layers: AdaptedLayers = "all",
    auto_class: Any = AutoModelForCausalLM,
    **config: Any,
) -> PreTrainedModel:
    """Load the real class of `model` (`GPT2LMHeadModel`, …) with `trunk` in place of the layers that the daemon holds.

    The cut is the daemon's; give `cut` to require one. The daemon must serve the same configuration and weights.
    Only the layers outside the cut are loaded; `model` may be the client's part that `zsl split` wrote.
    `quantize`: load the client's linear layers in 4 or 8 bits, by bitsandbytes; the trunk stays as the daemon has it.
    `layers`: those that adapters may be put on. With "all", the modules of the trunk's layers are in their places,
    without their weights; LoRA, DoRA and IA³ on them are sent to the trunk, and the keys and values of prefix tuning.
    With "client", only this process's layers are.
    `auto_class`: the class of transformers that picks the head, such as `AutoModelForSequenceClassification`. One that
    the checkpoint lacks is initialized as on the local model.
    `config`: fields of the configuration to replace, as in `from_pretrained`: `num_labels=3`.
    Raises `ConfigError`, `ModelError`, `TrunkUnreachable` or `WrongModelError`.
    """
    if layers not in get_args(AdaptedLayers):
        raise ConfigError(f"layers {layers!r}: one of {', '.join(get_args(AdaptedLayers))}")
    reference = resolve(model) if isinstance(model, str) else model
    if config:
        reference = reference.with_config(config)
    whole_class(reference.config, auto_class)  # raises before the connection is opened
    if reference.part is not None:
        cut = reference.part.cut_for(reference.text, "client", cut)
    welcome = trunk.connect(identify(reference), cut=cut, dtype=dtype, quantize=quantize)
    client_model = load_client_part(
        reference, welcome.cut, dtype, quantize=quantize, layers=layers, auto_class=auto_class
    )
    put_trunk(client_model, trunk, welcome.cut)
    RowNorms(trunk.client).give_to(slots_of(client_model))
    if not welcome.caches and getattr(client_model, "generation_config", None) is not None:  # a classifier has none
        client_model.generation_config.use_cache = False
    return client_model


def put_trunk(model: PreTrainedModel, trunk: RemoteTrunk, cut: Cut) -> None:
    """Put the trunk into the first removed layer's slot, with hooks that pass it mask, positions and labels.

    A trunk with the modules of another model stays there; this one gets a copy, on the same connection.
    """
    stack = find_stack(model)
    slot = stack.layers[cut.start]
    if trunk.has_modules:
        trunk = trunk.without_modules()
    copy_plain_attributes(slot, trunk)
    trunk.adopt(slot)
    stack.layers[cut.start] = trunk
    trunk.in_model = True
    # The module that runs the layers. A causal language model may call it without its base model in between.
    runner = model.get_submodule(stack.parent_name)
    arguments_of_model, arguments_of_runner = _arguments_of(model), _arguments_of(runner)
    padding_of = _note_padding(model)
    call = threading.local()

    def note_labels(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = arguments_of_model(args, kwargs)
        call.labels = tuple(arguments[name] for name in _LABELS if arguments.get(name) is not None)

    def forget_labels(*_: Any) -> None:
        call.__dict__.pop("labels", None)

    def observe(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = arguments_of_runner(args, kwargs)
        labels, past = call.__dict__.get("labels", ()), arguments.get("past_key_values")

        def is_asked(name: str) -> bool:
            asked = arguments.get(name)
            return bool(asked or (asked is None and getattr(module.config, name, False)))

        prefix = find_prefix(past, range(cut.start, cut.stop))
        if prefix and is_asked("use_cache"):
            raise ModelError(
                "the trunk keeps no keys and values behind a prefix: pass use_cache=False, and generate "
                "with the whole model"
            )
        for name, reason in _REFUSED.items():
            if is_asked(name):
                asked = arguments.get(name)
                raise ModelError(f"{name}={asked or True!r:.40} is not supported by a split model: {reason}")
        # Looked up in each call: a copy of the model has a copy of the trunk.
        layers = getattr(module, stack.leaf_name)
        in_slot = layers[cut.start]
        if isinstance(in_slot, RemoteTrunk):  # `Sides` runs the model without a trunk
            in_slot.observe_inputs(
                padding_of(arguments.get("attention_mask")),
                arguments.get("position_ids"),
                labels,
                {index: layers[index] for index in range(cut.start, cut.stop)},
                tuple(name for argument, (name, _) in ARGUMENTS.items() if is_asked(argument)),
                prefix,
                behind_cache=prefix is None and isinstance(past, Cache) and past.get_seq_length() > 0,
            )

    model.register_forward_pre_hook(note_labels, with_kwargs=True)
    model.register_forward_hook(forget_labels, always_call=True)
    runner.register_forward_pre_hook(observe, with_kwargs=True)


def _note_padding(model: PreTrainedModel) -> Callable[[Any], Any]:
    """Note the mask `[rows, tokens]` of which `generate` makes 4-D ones for a static cache, which cannot cross.

    Return a function that maps the latest ones of this thread to the noted mask, and other masks to themselves.
    """
    make: Callable[..., Any] = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    noted = threading.local()

    def make_and_note(**kwargs: Any) -> Any:
        made = make(**kwargs)
        # As `generate` does to them later, so that they stay the same objects.
        made = {kind: one if one is None else one.contiguous() for kind, one in _by_kind(made).items()}
        noted.made, noted.padding = made, kwargs["attention_mask"]
        return made if len(made) > 1 or "" not in made else made[""]

    def padding_of(mask: Any) -> Any:
        made, padding = noted.__dict__.pop("made", None), noted.__dict__.pop("padding", None)
        given = _by_kind(mask)
        if made and given.keys() == made.keys() and all(given[kind] is made[kind] for kind in made):
            return padding
        return mask

    model.create_masks_for_generate = make_and_note  # type: ignore[assignment]
    return padding_of


def _by_kind(mask: Any) -> dict[str, Any]:
    """Return masks by the types of layers, or the only mask, under the empty name."""
    return mask if isinstance(mask, dict) else {"": mask}


def _arguments_of(module: Any) -> Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]:
    """Return a function that maps the arguments of a module's call to their names."""
    signature = inspect.signature(module.forward)

    def arguments_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if not args:
            return kwargs
        arguments = signature.bind(*args, **kwargs).arguments
        return {**arguments, **arguments.pop("kwargs", {})}

    return arguments_of
