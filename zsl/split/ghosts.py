"""Parameters without memory, for the modules of the trunk's layers in the client's model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from zsl.errors import ModelError

WAY_OUT = (
    'leave the trunk\'s layers out with layers="client" (of load_client, or in [peft]), or layers_to_transform in LoRA'
)

# Methods and functions that read no values, by name.
_METADATA = {
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "is_contiguous"),
    *("data_ptr", "untyped_storage", "get_device", "is_floating_point", "is_complex", "is_signed", "is_inference"),
    *("is_conj", "is_neg", "is_pinned", "is_shared", "is_same_size", "is_set_to", "_is_view"),
    *("_has_compatible_shallow_copy_type", "__len__", "__hash__", "__dir__"),
}
# Those that make another tensor of the same shape, whose values need not be known.
_CONVERSIONS = {
    *("to", "type", "cpu", "cuda", "xpu", "half", "bfloat16", "float", "double"),
    *("detach", "clone", "contiguous", "empty_like", "pin_memory"),
}


class GhostWeight(nn.Parameter):
    """Parameter that has a shape, a dtype and a device, and memory for one element.

    Conversions and copies are ghosts. Every operation that needs its values raises `ModelError`.
    """

    path: str  # within the model without adapters

    @classmethod
    def like(cls, tensor: torch.Tensor, shape: torch.Size, path: str) -> Self:
        """Make a ghost with the dtype and the device of `tensor`."""
        element = torch.empty((), dtype=tensor.dtype, device=tensor.device)
        ghost: Self = torch.Tensor._make_subclass(cls, element.expand(shape), False)
        ghost.path = path
        return ghost

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        with torch._C.DisableTorchFunctionSubclass():
            if name in {"__get__", "__set__", "__delete__"}:
                return _attribute(func, args)
            if name in _METADATA:
                return func(*args, **kwargs)
            if name in _CONVERSIONS:
                return _converted(func, args, kwargs)
            if name == "share_memory_" or (name == "requires_grad_" and (*args, *kwargs.values(), True)[1] is False):
                return args[0]
            if name == "copy_" and isinstance(args[1], cls) and args[0].shape == args[1].shape:
                return args[0]
            raise _needed(name, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = memo[id(self)] = self.like(self, self.shape, self.path)
        return copied

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return _rebuilt, (type(self), tuple(self.shape), self.dtype, str(self.device), self.path)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.path}, {tuple(self.shape)}, {self.dtype}, {self.device})"


def _attribute(func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Read or write an attribute of the first argument, a ghost."""
    attribute = getattr(func.__self__, "__name__", "")  # type: ignore[attr-defined]
    ghost = args[0]
    if func.__name__ == "__get__":
        found = func(*args)
        if not isinstance(found, torch.Tensor):
            return found
        if attribute == "data":
            return GhostWeight.like(ghost, ghost.shape, ghost.path)
    elif func.__name__ == "__set__" and (
        (attribute == "requires_grad" and not args[1])
        or (attribute == "grad" and args[1] is None)
        or (attribute == "data" and isinstance(args[1], GhostWeight))
    ):
        return func(*args)
    raise _needed(attribute, args, {})


def _converted(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a conversion with one element for each ghost, and expand its result to the ghost's shape."""
    ghost = args[0] if args else kwargs.get("input")
    few = [_element(argument) for argument in args]
    named = {key: _element(value) for key, value in kwargs.items() if key != "memory_format"}
    result = func(*few, **named)
    if isinstance(ghost, GhostWeight) and isinstance(result, torch.Tensor):
        return GhostWeight.like(result, ghost.shape, ghost.path)
    return result


def _element(argument: Any) -> Any:
    if isinstance(argument, GhostWeight):
        return torch.empty((), dtype=argument.dtype, device=argument.device)
    return argument


def _needed(name: str, args: Any, kwargs: dict[str, Any]) -> ModelError:
    """Return the error of an operation that needs the values of a ghost among its arguments."""
    flat = torch.utils._pytree.tree_leaves((args, kwargs))
    path = next((one.path for one in flat if isinstance(one, GhostWeight)), "a weight")
    return ModelError(
        f"{path} is in the trunk, and not in this process: {name} needs its values. Train LoRA or IA³ on it, which "
        f"sends the adapter there, or {WAY_OUT}; merge the adapter with `zsl merge`"
    )


def _rebuilt(cls: type[GhostWeight], shape: tuple[int, ...], dtype: torch.dtype, device: str, path: str) -> GhostWeight:
    return cls.like(torch.empty((), dtype=dtype, device=device), torch.Size(shape), path)
