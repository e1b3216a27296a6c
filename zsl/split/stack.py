"""Find the decoder layers of a model, and check that the model can be split between them.

The stack is the one `ModuleList` whose length is the number of hidden layers. The check calls the first layer on the
meta device (no memory, no arithmetic), and examines its inputs and outputs. There is no table of architectures.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from zsl.errors import ConfigError, ModelError
from zsl.text.first_line import first_line

# Held while transformers builds or loads a model: it changes torch's default dtype and its own initialization for all
# threads, which would affect a model that another thread builds.
BUILDING = threading.RLock()

# The tensors that a layer may accept: the trunk rebuilds each of them from activations, 2-D mask and positions.
REBUILT_BY_THE_TRUNK = frozenset({"hidden_states", "attention_mask", "position_ids", "position_embeddings"})

# How the names of transformers' classes with a language-modelling head end.
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True)
class Stack:
    """Decoder layers of a model. `name` is the path of the `ModuleList` within the model."""

    name: str
    layers: nn.ModuleList

    @property
    def parent_name(self) -> str:
        """Path of the module that owns the list and runs the layers."""
        return self.name.rpartition(".")[0]

    @property
    def leaf_name(self) -> str:
        """Name of the list itself, such as `h` or `layers`: PEFT's `layers_pattern`."""
        return self.name.rpartition(".")[2]


def layer_count(config: PreTrainedConfig) -> int:
    """Return the number of decoder layers. Raises `ModelError` if `config` does not state it."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if layers is None:
        raise ModelError(f"{config.model_type}: its configuration states no number of hidden layers")
    return int(layers)


def find_stack(model: PreTrainedModel) -> Stack:
    """Find the decoder stack of a model. Raises `ModelError` if none, or more than one, is found."""
    layers = layer_count(model.config)
    found = [
        Stack(name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    ]
    if len(found) != 1:
        raise ModelError(
            f"{model.config.model_type}: {len(found)} module lists have the model's {layers} layers, one is needed; "
            "zsl cannot split this architecture"
        )
    return found[0]


def embedding_rows(model: Any) -> int | None:
    """Return the number of rows of the input embeddings, or None for a model without them."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return None if weight is None else int(weight.shape[0])


def whole_class(config: PreTrainedConfig, auto_class: Any = AutoModelForCausalLM) -> type[PreTrainedModel]:
    """Return the class of the whole model, as `auto_class` picks it. Raises `ConfigError` or `ModelError`.

    `AutoModelForCausalLM` is refused for a checkpoint with another head.
    """
    mapping = getattr(auto_class, "_model_mapping", None)
    if mapping is None:
        name = getattr(auto_class, "__name__", repr(auto_class))
        raise ConfigError(f"auto_class {name}: one of transformers' AutoModelFor… classes is needed")
    found = _mapped(mapping, config, auto_class.__name__)
    if auto_class is AutoModelForCausalLM:
        _check_is_language_model(config)
    return found


def base_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of the model without its head, as `AutoModel` picks it. Raises `ModelError`."""
    return _mapped(MODEL_MAPPING, config, "AutoModel")


def _mapped(mapping: Any, config: PreTrainedConfig, kind: str) -> type[PreTrainedModel]:
    try:
        found = mapping[type(config)]
    except KeyError:
        raise ModelError(f"{config.model_type}: transformers' {kind} has no class for this type") from None
    cls: type[PreTrainedModel] = found[0] if isinstance(found, tuple | list) else found
    return cls


def _check_is_language_model(config: PreTrainedConfig) -> None:
    """Raise `ModelError` for a checkpoint with another head: a classifier, a reward model."""
    said = config.architectures or []
    base: Any = MODEL_MAPPING.get(type(config), ())
    bases = {cls.__name__ for cls in (base if isinstance(base, tuple | list) else (base,))}
    if said and not any(name.endswith(_LANGUAGE_MODELS) or name in bases for name in said):
        raise ModelError(
            f"the checkpoint is of a {', '.join(said)}, whose head zsl would leave out: name one of a causal language "
            "model, or give load_client the auto_class of its head"
        )


class _FirstLayerSeen(Exception):
    pass


def check_can_be_split(config: PreTrainedConfig) -> None:
    """Raise `ModelError`, with the architecture and the reason, for a model that cannot be split.

    Refused: layers that do not return one tensor of the shape of their input, layers that need a tensor which cannot
    be rebuilt from activations, 2-D mask and positions, and layers whose attention is not causal.
    """
    cls = base_class(config)
    if dropped := getattr(config.get_text_config(), "layerdrop", 0):
        raise ModelError(
            f"{config.model_type}: layerdrop = {dropped} leaves out layers at random in training, and a trunk does "
            "not: set layerdrop to 0 in its config.json"
        )
    try:
        with BUILDING, torch.device("meta"):
            model: Any = cls(config)
            model = model.to(torch.bfloat16)
    except Exception as error:  # architectures raise all kinds for an incomplete configuration
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"{config.model_type}: transformers cannot make this model ({reason})") from error
    stack = find_stack(model)
    # Encoders have a causal language model's class too, for a configuration that makes decoders of them.
    if any(getattr(module, "is_causal", True) is False for module in stack.layers.modules()):
        raise ModelError(
            f"{config.model_type}: its attention is not causal: it is an encoder, or has one; zsl splits decoders only"
        )
    runner = model.get_submodule(stack.parent_name)
    if not isinstance(runner, PreTrainedModel):
        raise ModelError(
            f"{config.model_type}: its layers are run by a {type(runner).__name__}, which gets a prepared mask "
            "instead of the 2-D one that a trunk needs; zsl cannot split this architecture"
        )
    seen: dict[str, Any] = {}

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        bound = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
        arguments = {**bound, **bound.pop("kwargs", {})}
        seen["input"] = next(iter(arguments.values()))
        seen["tensors"] = {name for name, value in arguments.items() if _holds_tensor(value)}
        seen["output"] = output
        raise _FirstLayerSeen

    stack.layers[0].register_forward_hook(look, with_kwargs=True)
    problem = _call_on_meta(model)
    if problem is not None:
        raise ModelError(f"{config.model_type}: its first layer could not be tried on the meta device ({problem})")
    first, output = seen["input"], seen["output"]
    if not isinstance(output, torch.Tensor) or output.shape != first.shape:
        kind = type(output).__name__ if not isinstance(output, torch.Tensor) else f"a tensor {tuple(output.shape)}"
        raise ModelError(
            f"{config.model_type}: its layers return {kind}, not one tensor of the input's shape; "
            "zsl cannot split this architecture"
        )
    # The first argument is the hidden state; its name varies.
    extra = sorted(seen["tensors"] - REBUILT_BY_THE_TRUNK - {_first_parameter(stack.layers[0])})
    if extra:
        raise ModelError(
            f"{config.model_type}: its layers take {', '.join(extra)}, which a trunk cannot rebuild; "
            "zsl cannot split this architecture"
        )


def _call_on_meta(model: PreTrainedModel) -> str | None:
    """Run `model` up to the end of its first layer. Returns the reason of a failure, or None."""
    rows, tokens = 1, 2
    hidden = model.config.get_text_config().hidden_size
    problem = None
    # Masks are read as values in some models and shaped in others; a meta tensor has shapes only. A 4-D mask passes
    # through transformers' mask functions unread; models without those functions take a 2-D one, or read even that.
    for mask_shape in ((rows, 1, tokens, tokens), (rows, tokens), None):
        try:
            with torch.no_grad(), torch.device("meta"):
                model(
                    inputs_embeds=torch.zeros(rows, tokens, hidden, dtype=torch.bfloat16),
                    attention_mask=None if mask_shape is None else torch.zeros(mask_shape),
                    use_cache=False,
                )
        except _FirstLayerSeen:
            return None
        except Exception as error:  # any exception means that the first layer cannot be called
            problem = problem or f"{type(error).__name__}: {first_line(error)[:160]}"
    return problem or "the model never called its layers"


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (
        isinstance(value, tuple | list) and any(isinstance(item, torch.Tensor) for item in value)
    )


def _first_parameter(layer: nn.Module) -> str:
    return next(iter(inspect.signature(layer.forward).parameters))
