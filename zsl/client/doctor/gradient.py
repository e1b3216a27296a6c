"""Verify a daemon's gradient against the whole model, or against central differences of its forward.

With the whole model: compare one training step of it with the same step through the daemon. Without: compare a
directional derivative by central differences of the daemon's forward with its vector-Jacobian product.
"""

from __future__ import annotations

import gc
import re
import warnings
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from zsl.client.model import load_client
from zsl.client.remote import RemoteTrunk
from zsl.client.trunk_client import TrunkClient
from zsl.models.loading import load_whole
from zsl.models.reference import ModelReference
from zsl.split.stack import find_stack
from zsl.wire.messages import Cut, FloatDtypeName
from zsl.wire.tensors import TORCH_DTYPES

SEED = 0
ROWS, TOKENS = 2, 16  # of the batch of one step
DIRECTIONS, DIRECTION_TOKENS = 8, 8
LORA_RANK = 4
LORA_B_SIZE = 0.01
IN_FRONT, BEHIND = "the gradients in front of the trunk", "the gradients behind the trunk"
# Step sizes for activations of size 1. Long steps are inexact where the trunk is far from linear, short ones by
# rounding. The best size depends on the trunk, so two are tried.
STEPS: dict[FloatDtypeName, tuple[float, float]] = {"f32": (1e-2, 1e-3), "bf16": (0.2, 0.05), "f16": (0.1, 0.02)}


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """Results of one training step: the loss, and by name the logits and the gradients, each flattened."""

    loss: float
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Difference:
    """Difference between two steps. `largest`: of tensor `name`, relative to it, in Euclidean norms. 0: bit-equal.

    Norms of whole tensors, because single numbers may be small differences of large ones, and mostly rounding.
    """

    loss: float
    gradients: int  # number of compared elements
    largest: float
    name: str


def compare_with_local(reference: ModelReference, trunk: RemoteTrunk, dtype: FloatDtypeName) -> Difference:
    """Compare a step of the whole model here with one through `trunk`: logits, loss, the gradients of a LoRA on every
    linear module outside the trunk, and the gradient at the embeddings.

    The models are loaded one after the other, so that only one is in memory. Raises `ZslError`.
    """
    torch_dtype = TORCH_DTYPES[dtype]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about modes and dtypes, which other checks report
        split = load_client(reference, trunk, dtype=torch_dtype, layers="client")
    welcome = trunk.client.welcome
    tokens = min(TOKENS, welcome.limits.max_row_tokens)
    through = _one_step(split, welcome.cut, tokens)
    del split
    gc.collect()  # modules and their hooks are reference cycles
    whole = load_whole(reference, torch_dtype)
    whole.config.use_cache = False
    return _difference(through, _one_step(whole, welcome.cut, tokens))


def _one_step(model: PreTrainedModel, cut: Cut, tokens: int) -> StepNumbers:
    embeddings: list[torch.Tensor] = []

    def keep_gradient(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        output.requires_grad_().retain_grad()
        embeddings.append(output)
        return output

    model.requires_grad_(False)
    hook = model.get_input_embeddings().register_forward_hook(keep_gradient)
    trained: nn.Module = _with_lora(model, cut)
    generator = torch.Generator().manual_seed(SEED)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (ROWS, tokens), generator=generator)  # [rows, tokens]
    try:
        output = trained.eval()(input_ids=ids, labels=ids)
        output.loss.backward()
    finally:
        hook.remove()
    in_front = [_flat(embeddings[0].grad)]
    behind: list[torch.Tensor] = []
    inside = re.escape(find_stack(model).name)
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            layer = re.search(rf"(?:^|\.){inside}\.(\d+)\.", name)
            assert layer is not None, name
            (in_front if int(layer[1]) < cut.start else behind).append(_flat(parameter.grad))
    tensors = {"the logits": _flat(output.logits.detach()), IN_FRONT: torch.cat(in_front)}
    if behind:
        tensors[BEHIND] = torch.cat(behind)
    return StepNumbers(float(output.loss), tensors)


def _flat(tensor: torch.Tensor | None) -> torch.Tensor:
    """Flatten a tensor to float64, which holds every element exactly. Return no elements for None."""
    return torch.zeros(0, dtype=torch.float64) if tensor is None else tensor.double().flatten()


def _with_lora(model: PreTrainedModel, cut: Cut) -> nn.Module:
    """Add a LoRA to every linear module of the layers outside the trunk, with `lora_B` not at zero: otherwise half of
    the gradients are zero."""
    stack = find_stack(model)
    outside = [layer for layer in range(len(stack.layers)) if not cut.start <= layer < cut.stop]
    prefixes = tuple(f"{stack.name}.{layer}." for layer in outside)
    linear = {
        name: module
        for name, module in model.named_modules()
        if name.startswith(prefixes) and type(module).__name__ in ("Linear", "Conv1D")
    }
    if not linear:
        return model
    transposed = any(type(module).__name__ == "Conv1D" for module in linear.values())
    config = LoraConfig(r=LORA_RANK, target_modules=sorted(linear), fan_in_fan_out=transposed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        made = get_peft_model(model, config)
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=LORA_B_SIZE)
    return made


def _difference(one: StepNumbers, other: StepNumbers) -> Difference:
    largest, worst = 0.0, "nothing"
    for name, tensor in one.tensors.items():
        theirs = other.tensors[name]
        if torch.equal(tensor, theirs):
            continue
        difference = float("inf")
        if tensor.shape == theirs.shape and tensor.isfinite().all() and theirs.isfinite().all():
            difference = float((tensor - theirs).norm() / theirs.norm())
        if difference >= largest:
            largest, worst = difference, name
    gradients = sum(other.tensors[name].numel() for name in (IN_FRONT, BEHIND) if name in other.tensors)
    return Difference(other.loss, gradients, largest, worst)


@dataclass(frozen=True, slots=True)
class Derivatives:
    """Directional derivatives, from the vector-Jacobian product and from central differences.

    `difference`: between the two, for the step size that agrees best, relative to the derivatives' norm. `uncertainty`:
    of the central differences, from those of the two step sizes: the difference of their errors against the product, or
    of their norms, which shrink if a step is so long that the trunk's variations cancel.
    """

    difference: float
    uncertainty: float


def compare_with_differences(client: TrunkClient) -> Derivatives:
    """Compare <vjp(x; u), v> with <u, f(x + εv) − f(x − εv)> / 2ε, for random u, v and activations x `[8, 8, hidden]`.

    Both are uᵀJv, if f is the trunk and vjp the product with its Jacobian J; the second up to terms of ε² (the central
    difference: Nocedal and Wright, "Numerical Optimization", section 8.1) and the rounding of f, divided by ε. The
    sums are in float64. A row's tokens attend to each other, so that one direction meets all of the trunk.

    Raises `ZslError`.
    """
    welcome = client.welcome
    limits = welcome.limits
    tokens = min(DIRECTION_TOKENS, limits.max_row_tokens, limits.max_request_tokens)
    rows = max(1, min(DIRECTIONS, limits.max_request_tokens // tokens))
    generator = torch.Generator().manual_seed(SEED)
    shape = (3, rows, tokens, welcome.model.hidden_size)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    x, u, v = drawn.to(TORCH_DTYPES[welcome.dtype])  # each [rows, tokens, hidden], in the trunk's dtype
    step = client.forward(x.float(), keep=True)
    gradients = client.backward(step, u.float()).tensor
    by_product, by_differences = [], []  # per step size, one derivative a row
    for epsilon in STEPS[welcome.dtype]:
        # In float64, then rounded to the trunk's dtype, so that the distance between the two is known exactly.
        ahead, behind = ((x.double() + sign * epsilon * v.double()).to(x.dtype) for sign in (1, -1))
        change = client.forward(ahead.float()).output.double() - client.forward(behind.float()).output.double()
        by_differences.append(_inner(u, change) / (2 * epsilon))
        by_product.append(_inner(gradients, ahead.double() - behind.double()) / (2 * epsilon))
    errors = [found - product for found, product in zip(by_differences, by_product, strict=True)]
    sizes = [float(found.norm()) for found in by_differences]
    size = max(*sizes, *(float(product.norm()) for product in by_product), torch.finfo(torch.float64).tiny)
    return Derivatives(
        difference=min(float(error.norm()) for error in errors) / size,
        uncertainty=max(
            float((errors[0] - errors[1]).norm()) / size,
            1 - min(sizes) / max(*sizes, torch.finfo(torch.float64).tiny),
        ),
    )


def _inner(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the inner product of each row of `[rows, tokens, hidden]`, in float64."""
    return (one.double() * other.double()).flatten(1).sum(1)
