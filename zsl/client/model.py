"""`load_client`: a real transformers model with the trunk in its hole."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from zsl.client.remote import RemoteTrunk
from zsl.errors import ModelError
from zsl.split.identity import identify
from zsl.split.loading import load_client_part
from zsl.split.quantize import Quantization
from zsl.split.reference import ModelReference, resolve
from zsl.split.slots import copy_plain_attributes
from zsl.split.stack import find_stack
from zsl.wire.messages import Cut

# Arguments of a model that reach into the trunk in a way that does not cross.
_REFUSED = {
    "use_cache": "the trunk keeps no keys and values; pass use_cache=False",
    "past_key_values": "the trunk keeps no keys and values; pass use_cache=False",
    "output_hidden_states": "the hidden states inside the trunk stay there",
    "output_attentions": "the attentions inside the trunk stay there",
    "output_router_logits": "the routers inside the trunk stay there, and the loss would lack their share",
}


def load_client(
    model: str | ModelReference,
    trunk: RemoteTrunk,
    *,
    cut: Cut | None = None,
    dtype: torch.dtype = torch.float32,
    quantize: Quantization | None = None,
) -> PreTrainedModel:
    """The real class of `model` (`GPT2LMHeadModel`, …) with `trunk` in place of the layers that the daemon holds.

    The cut is the daemon's; give `cut` to insist on one. The daemon must serve the same configuration and weights.
    Only the layers outside the cut are loaded; `model` may be the client's part that `zsl split` wrote.
    `quantize`: its linear layers in 4 or 8 bits, by bitsandbytes; the trunk is as the daemon has it.
    Raises `ModelError`, `TrunkUnreachable` or `WrongModelError`.
    """
    reference = resolve(model) if isinstance(model, str) else model
    if reference.part is not None:
        cut = reference.part.cut_for(reference.text, "client", cut)
    welcome = trunk.connect(identify(reference), cut=cut, dtype=dtype)
    client_model = load_client_part(reference, welcome.cut, dtype, quantize=quantize)
    put_trunk(client_model, trunk, welcome.cut)
    return client_model


def put_trunk(model: PreTrainedModel, trunk: RemoteTrunk, cut: Cut) -> None:
    """Put the trunk into the first slot of the hole, and let it know what the model is called with."""
    stack = find_stack(model)
    copy_plain_attributes(stack.layers[cut.start], trunk)
    stack.layers[cut.start] = trunk
    # The module that runs the layers. A causal language model may call it without its base model in between.
    runner = model.get_submodule(stack.parent_name)
    signature = inspect.signature(runner.forward)

    def observe(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = signature.bind(*args, **kwargs).arguments
        arguments = {**arguments, **arguments.pop("kwargs", {})}
        for name, reason in _REFUSED.items():
            asked = arguments.get(name)
            if asked or (asked is None and getattr(module.config, name, False)):
                raise ModelError(f"{name}={asked or True!r:.40} is not supported by a split model: {reason}")
        # Found anew in each call: a copy of the model has a copy of the trunk.
        in_slot = getattr(module, stack.leaf_name)[cut.start]
        if isinstance(in_slot, RemoteTrunk):  # `Sides` runs the model with nothing in the hole
            in_slot.observe_inputs(arguments.get("attention_mask"), arguments.get("position_ids"))

    trunk.in_model = True
    runner.register_forward_pre_hook(observe, with_kwargs=True)
