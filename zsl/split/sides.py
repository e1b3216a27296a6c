"""Find the side of each module of a client's model: *bottom* runs before the *trunk*, *top* after.

The model runs once on two tokens, with pass-throughs in place of the trunk, so that no table of names is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from zsl.split.slots import PassThrough
from zsl.split.stack import find_stack
from zsl.wire.messages import Cut

Side = Literal["bottom", "trunk", "top"]


class Sides:
    """Side of every module of a client's model that has parameters of its own."""

    def __init__(self, model: PreTrainedModel, cut: Cut) -> None:
        self._modules = {name: module for name, module in model.named_modules() if _owns_parameters(module)}
        self._sides: dict[str, Side] = {}
        stack = find_stack(model)
        layers, slots = stack.layers, range(cut.start, cut.stop)
        self._in_the_trunk = tuple(f"{stack.name}.{index}." for index in slots)
        self._sides.update((name, "trunk") for name in self._modules if name.startswith(self._in_the_trunk))
        in_slots = [layers[index] for index in slots]
        for index in slots:
            layers[index] = PassThrough(layers[index])
        passed_trunk = False

        def pass_trunk(*_: Any) -> None:
            nonlocal passed_trunk
            passed_trunk = True

        def note(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                self._sides.setdefault(name, "top" if passed_trunk else "bottom")

            return hook

        hooks = [layers[cut.start].register_forward_pre_hook(pass_trunk)]
        hooks += [module.register_forward_pre_hook(note(name)) for name, module in self._modules.items()]
        training = model.training
        try:
            with torch.no_grad():
                model.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))
        finally:
            model.train(training)
            for index, layer in zip(slots, in_slots, strict=True):
                layers[index] = layer
            for hook in hooks:
                hook.remove()

    def parameter_count(self, side: Side) -> int:
        """Return the number of parameters that this side computes with. A tied weight counts on both sides."""
        parameters = {p for name in self._names(side) for p in self._modules[name].parameters(recurse=False)}
        return sum(numbers_in(parameter) for parameter in parameters)

    def side_of(self, module_path: str) -> Side:
        """Return the side of a module, submodule or parameter, by its path within the model."""
        if module_path.startswith(self._in_the_trunk):
            return "trunk"
        path = module_path
        while path not in self._modules and path:
            path = path.rpartition(".")[0]
        return self._sides.get(path, "top")

    def _names(self, side: Side) -> Iterable[str]:
        return (name for name, found in self._sides.items() if found == side)


def numbers_in(parameter: nn.Parameter) -> int:
    """Return the number of elements of a parameter before quantization; bitsandbytes packs two 4-bit ones in a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()


def _owns_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))
