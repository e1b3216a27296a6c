"""Pass tensors from inside the trunk to transformers, which collects hidden states and router logits of a call.

Uses a private variable of `transformers.utils.output_capturing`, as read in transformers 5.23. Its hooks are on classes
of layers; the trunk is none of them, so it adds its own in its turn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from zsl.errors import InternalError, ModelError
from zsl.wire.messages import Cut, Reveal

# Arguments of a model that need these tensors, and the way without them.
ARGUMENTS: dict[str, tuple[Reveal, str]] = {
    "output_hidden_states": ("hidden_states", "for those of your own layers register forward hooks on them"),
    "output_router_logits": ("router_logits", "leave it out, and for TRL's trainers set router_aux_loss_coef=0.0"),
}
Tensors = Mapping[Reveal, torch.Tensor]


def _collected() -> dict[str, Any]:
    """Return what transformers collects in this call, by name."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return {}
    found: dict[str, Any] = _active_collector.get() or {}
    return found


def check_reveals(asked: Collection[Reveal], allowed: Collection[Reveal], endpoint: str) -> None:
    """Raise `ModelError` for what the trunk does not reveal."""
    for argument, (name, instead) in ARGUMENTS.items():
        if name in asked and name not in allowed:
            raise ModelError(
                f"{argument}=True is not supported by this split model: the trunk at {endpoint} keeps its "
                f"{name.replace('_', ' ')}; its owner can start it with --reveal {name.replace('_', '-')}; {instead}"
            )


def check_collected(asked: Collection[Reveal]) -> None:
    """Raise `ModelError` for a model that collects its tensors itself, where those of the trunk would lack."""
    lacking = [name for name in asked if name not in _collected()]
    if lacking:
        raise ModelError(
            f"this architecture collects its {lacking[0].replace('_', ' ')} in a way of its own, or this version of "
            "transformers does, and those of the trunk would lack"
        )


def check_shapes(revealed: Tensors, activations: torch.Tensor, cut: Cut) -> None:
    """Check revealed tensors of a call with activations `[rows, tokens, hidden]`. Raises `InternalError`."""
    tokens = activations.shape[:2].numel()
    for name, tensor in revealed.items():
        if name == "hidden_states":
            fits = tuple(tensor.shape) == (cut.stop - cut.start - 1, *activations.shape)
        else:
            fits = tensor.ndim == 3 and tensor.shape[1] == tokens
        if not fits:
            raise InternalError(f"the trunk answered with {name} of {tuple(tensor.shape)}, which do not fit the call")


def collect(asked: Collection[Reveal], revealed: Tensors, entering: torch.Tensor, leaving: torch.Tensor) -> None:
    """Add the trunk's tensors to what transformers collects: between those of the layers before and behind it."""
    collected = _collected()
    if "hidden_states" in asked:
        states, selection = collected["hidden_states"], collected.get("_hidden_states_layers")
        inside = revealed["hidden_states"].unbind(0) if "hidden_states" in revealed else ()
        # The first layer's input is the first of all; in front of a trunk with layers before it, they have added it.
        for state in (*(() if states else (entering,)), *inside, leaving):
            states.append(state if selection is None or len(states) in selection else None)
    if "router_logits" in asked:
        collected["router_logits"].extend(revealed["router_logits"].unbind(0))
