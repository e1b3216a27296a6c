"""Frozen linear layers of the trunk: their weights as PEFT reads them, and products whose graphs keep none of these."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from zsl.models.quantize import bits_of, dequantized


class FrozenLinear:
    """A linear layer: `nn.Linear`, transformers' `Conv1D`, or a quantized layer of bitsandbytes."""

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        self.quantized = bits_of(module) is not None

    @staticmethod
    def is_one(module: nn.Module) -> bool:
        """Return whether a module is a linear layer of these types."""
        return type(module) in (nn.Linear, Conv1D) or bits_of(module) is not None

    @property
    def is_plain(self) -> bool:
        """True for `nn.Linear`."""
        return type(self._module) is nn.Linear

    @property
    def features(self) -> tuple[int, int]:
        """Inputs and outputs."""
        if self.quantized:
            return self._module.in_features, self._module.out_features
        outputs, inputs = self.matrix().shape
        return inputs, outputs

    @property
    def bias(self) -> torch.Tensor | None:
        bias: torch.Tensor | None = self._module.bias
        return bias

    def matrix(self) -> torch.Tensor:
        """Return the weight `[out, in]`, dequantized as PEFT does it."""
        if self.quantized:
            return dequantized(self._module)
        weight: torch.Tensor = self._module.weight
        return weight.t() if type(self._module) is Conv1D else weight

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x @ matrix.T`, computed in the dtype of `x`."""
        result: torch.Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return result

    @torch.no_grad()
    def row_norms(self) -> torch.Tensor:
        """Return the norms of the rows `[out]`, as PEFT computes the first magnitude of DoRA.

        It has the dtype of the weight, or single precision for a quantized one.
        """
        matrix = self.matrix()
        # PEFT adds B @ A, which is zero, but decides the strides, and with them the rounding.
        dtype = torch.float32 if self.quantized else matrix.dtype
        return _row_norms(matrix, torch.zeros(matrix.shape, dtype=dtype, device=matrix.device))

    @torch.no_grad()
    def adapted_row_norms(self, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        """Return the norms of the rows `[out]` of `matrix + scaling * b @ a`, in the adapter's dtype, as PEFT does.

        PEFT runs the identity through A and B. Its product with A is `a.T`.
        """
        return _row_norms(self.matrix().to(a.dtype), scaling * F.linear(a.t().contiguous(), b).t())


def _row_norms(matrix: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    weight = matrix + added
    norms: torch.Tensor = torch.linalg.norm(weight, dim=1)
    return norms.to(weight.dtype)


class _Product(torch.autograd.Function):
    """Product with a frozen matrix, which is converted again in the backward rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: FrozenLinear) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.matrix().to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.layer.matrix().to(gradient.dtype), None
