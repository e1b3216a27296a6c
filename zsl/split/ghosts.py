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

AskNorms = Callable[[], torch.Tensor]


class GhostWeight(nn.Parameter):
    """Parameter that has a shape, a dtype and a device, and memory for one element.

    Conversions and copies are ghosts. Every operation that needs its values raises `ModelError`, but the one by which
    PEFT makes the first magnitude of DoRA: the norms of the rows of a linear weight, to which it has added zeros.

    `ask_norms` gets them from the trunk. A ghost that was pickled has lost it.
    """

    path: str  # within the model without adapters
    ask_norms: AskNorms | None = None

    @classmethod
    def like(cls, tensor: torch.Tensor, shape: torch.Size, path: str, ask_norms: AskNorms | None = None) -> Self:
        """Make a ghost with the dtype and the device of `tensor`."""
        element = torch.empty((), dtype=tensor.dtype, device=tensor.device)
        ghost: Self = torch.Tensor._make_subclass(cls, element.expand(shape), False)
        ghost.path, ghost.ask_norms = path, ask_norms
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
            if func is torch.Tensor.add and isinstance(args[0], GhostWeight) and not kwargs:
                return _plus(*args)
            raise _needed(name, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = memo[id(self)] = self.like(self, self.shape, self.path, self.ask_norms)
        return copied

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return _rebuilt, (type(self), tuple(self.shape), self.dtype, str(self.device), self.path)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.path}, {tuple(self.shape)}, {self.dtype}, {self.device})"


class _PlusZeros(GhostWeight):
    """Ghost within PEFT's computation of the first magnitude of DoRA: transposed, or with zeros added."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.requires_grad_:  # by nn.Parameter, of a transposed one
            return args[0]
        if func is torch.linalg.norm and kwargs == {"dim": 1}:
            return _row_norms(args[0])
        return super().__torch_function__(func, types, args, kwargs)


def _attribute(func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Read or write an attribute of the first argument, a ghost."""
    attribute = getattr(func.__self__, "__name__", "")  # type: ignore[attr-defined]
    ghost = args[0]
    if func.__name__ == "__get__":
        found = func(*args)
        if not isinstance(found, torch.Tensor):
            return found
        if attribute == "data":
            return _ghost_of(ghost, ghost)
        if attribute == "T" and ghost.dim() == 2:
            return _PlusZeros.like(ghost, found.shape, ghost.path, ghost.ask_norms)
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
        return _ghost_of(ghost, result)
    return result


def _ghost_of(ghost: GhostWeight, converted: torch.Tensor) -> GhostWeight:
    """Make a ghost like another one, with the dtype and the device of `converted`."""
    return type(ghost).like(converted, ghost.shape, ghost.path, ghost.ask_norms)


def _plus(ghost: GhostWeight, added: Any) -> GhostWeight:
    """Add zeros. Raises `ModelError` for other values."""
    if not isinstance(added, torch.Tensor) or added.shape != ghost.shape:
        raise _needed("add", (ghost,), {})
    if not added.is_meta and added.any():
        raise ModelError(
            f"{ghost.path} is in the trunk, and not in this process: DoRA on it has to begin with B = 0, as it does "
            f"with init_lora_weights=True or 'gaussian'; choose one of these, or {WAY_OUT}"
        )
    element = torch.empty((), dtype=torch.promote_types(ghost.dtype, added.dtype), device=added.device)
    return _PlusZeros.like(element, ghost.shape, ghost.path, ghost.ask_norms)


def _row_norms(ghost: GhostWeight) -> torch.Tensor:
    """Return the norms of the rows, which the trunk has. Raises `ZslError`."""
    if ghost.is_meta:
        return torch.empty(ghost.shape[:1], dtype=ghost.dtype, device="meta")
    if ghost.ask_norms is None:
        raise ModelError(
            f"{ghost.path} is in the trunk: DoRA on it begins with the norms of its rows, which only a model of "
            f"load_client can ask for, not one without a connection, or unpickled; load it so, or {WAY_OUT}"
        )
    norms = ghost.ask_norms()
    if norms.shape != ghost.shape[:1]:
        raise _needed("norm", (ghost,), {})
    return norms.to(ghost.device, ghost.dtype, copy=True)


def _element(argument: Any) -> Any:
    if isinstance(argument, GhostWeight):
        return torch.empty((), dtype=argument.dtype, device=argument.device)
    return argument


def _needed(name: str, args: Any, kwargs: dict[str, Any]) -> ModelError:
    """Return the error of an operation that needs the values of a ghost among its arguments."""
    flat = torch.utils._pytree.tree_leaves((args, kwargs))
    path = next((one.path for one in flat if isinstance(one, GhostWeight)), "a weight")
    return ModelError(
        f"{path} is in the trunk, and not in this process: {name} needs its values. Train LoRA, DoRA or IA³ on it, "
        f"which sends the adapter there, or {WAY_OUT}; merge the adapter with `zsl merge`"
    )


def _rebuilt(cls: type[GhostWeight], shape: tuple[int, ...], dtype: torch.dtype, device: str, path: str) -> GhostWeight:
    return cls.like(torch.empty((), dtype=dtype, device=device), torch.Size(shape), path)
