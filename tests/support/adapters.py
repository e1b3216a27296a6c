"""Adapters of the trunk's layers, made of a local PEFT model or at random, as the daemon has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from zsl.split.stack import find_stack
from zsl.trunk.adapter import AdapterVersion
from zsl.wire.adapter_layout import AdaptedModule, AdapterLayout, Ia3Module, LoraModule, PrefixLayer, version_of
from zsl.wire.tensors import TORCH_DTYPES, encode_tensor, float_wire_name


def version_from(
    modules: Iterable[AdaptedModule],
    weights: Iterable[torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    wire_dtype: torch.dtype = torch.float32,
) -> AdapterVersion:
    """A version of these modules, with weights in the order of the layout. `dtype`: of the computation."""
    layout = AdapterLayout(dtype=float_wire_name(dtype), modules=tuple(modules))
    flat = torch.cat([weight.detach().reshape(-1) for weight in weights]).to(wire_dtype)
    buffer = bytearray(encode_tensor("weights", flat)[1])
    name = float_wire_name(wire_dtype)
    return AdapterVersion(version_of(layout.encoded(), name, buffer), layout, name, buffer)


def random_version(
    adaptable: Mapping[str, tuple[int, int]],
    seed: int,
    *,
    rank: int = 8,
    scaling: float = 2.0,
    dropout: float = 0.0,
    dora: bool = False,
    chosen: Callable[[str], bool] = lambda path: True,
    dtype: torch.dtype = torch.float32,
) -> AdapterVersion:
    """A version with random weights for the `chosen` modules of a trunk; every third has a bias.

    With `dora` none has; the magnitudes are of the size of the norms that they replace.
    """
    random = torch.Generator().manual_seed(seed)
    modules = [
        LoraModule(
            path=path,
            inputs=size[0],
            outputs=size[1],
            rank=rank,
            scaling=scaling,
            dropout=dropout,
            has_bias=not (dora or at % 3),
            has_magnitude=dora,
        )
        for at, (path, size) in enumerate(adaptable.items())
        if chosen(path)
    ]
    weights: list[torch.Tensor] = []
    for module in modules:
        weights += [torch.randn(shape, generator=random) * 0.1 for shape in module.shapes]
        if dora:
            weights[-1] += 0.4
    return version_from(modules, weights, dtype=dtype)


def random_ia3(
    adaptable: Mapping[str, tuple[int, int]], seed: int, *, twice: bool = False, dtype: torch.dtype = torch.float32
) -> AdapterVersion:
    """A version of IA³ with random vectors for the modules of a trunk, on the inputs of every second."""
    random = torch.Generator().manual_seed(seed)
    modules = [
        Ia3Module(path=path, inputs=size[0], outputs=size[1], at_input=bool(at % 2))
        for _ in range(1 + twice)
        for at, (path, size) in enumerate(adaptable.items())
    ]
    weights = [1 + torch.randn(shape, generator=random) * 0.3 for module in modules for shape in module.shapes]
    return version_from(modules, weights, dtype=dtype)


@dataclass(frozen=True)
class LocalStep:
    """Numbers of a local PEFT model in the layers of the cut."""

    activations: torch.Tensor
    output: torch.Tensor
    at_output: torch.Tensor
    at_input: torch.Tensor
    version: AdapterVersion
    gradients: torch.Tensor  # flat, in the order of the version's layout


def local_step(model: PreTrainedModel, ids: torch.Tensor, layers: range, *configs: PeftConfig) -> LocalStep:
    """One step of a model with adapters of these configurations, all active, seen at the edges of `layers`."""
    peft_model = get_peft_model(model, configs[0], "0", autocast_adapter_dtype=True)
    for index, config in enumerate(configs[1:], 1):
        peft_model.add_adapter(str(index), config)
    peft_model.base_model.set_adapter([str(index) for index in range(len(configs))])
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            elif "ia3_l" in name:
                parameter.normal_(1, 0.3)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    return step_of(peft_model, ids, layers)


def step_of(peft_model: PeftModel, ids: torch.Tensor, layers: range) -> LocalStep:
    """One step of a PEFT model, seen at the edges of `layers`."""
    seen = _at_edges(peft_model, ids, layers)
    modules, weights = adapted_modules(find_stack(peft_model.get_base_model()).layers, layers)
    gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    return _local_step(seen, modules, weights, gradients)


def prefix_step(model: PreTrainedModel, ids: torch.Tensor, layers: range, tokens: int) -> LocalStep:
    """One step of a model with prefix tuning, seen at the edges of `layers`."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
    peft_model = get_peft_model(model, config)
    seen = _at_edges(peft_model, ids, layers)
    made = peft_model.peft_config["default"]
    heads, dim = made.num_attention_heads, made.token_dim // made.num_attention_heads  # type: ignore[attr-defined]
    weight = peft_model.prompt_encoder["default"].embedding.weight

    def of_layers(all_layers: torch.Tensor) -> list[torch.Tensor]:
        by_layer = all_layers.view(tokens, -1, 2, heads * dim)
        return [part for index in layers for part in by_layer[:, index].unbind(1)]

    modules = [PrefixLayer(path=str(index), rows=1, tokens=tokens, heads=heads, dim=dim) for index in layers]
    return _local_step(seen, modules, of_layers(weight), of_layers(weight.grad))


def _at_edges(peft_model: PeftModel, ids: torch.Tensor, layers: range) -> dict[str, torch.Tensor]:
    """Input and output of these layers in one step, with their gradients."""
    seen: dict[str, torch.Tensor] = {}

    def note(name: str, tensor: torch.Tensor) -> None:
        tensor.retain_grad()
        seen[name] = tensor

    stack = find_stack(peft_model.get_base_model()).layers
    stack[layers.start].register_forward_pre_hook(lambda layer, args: note("input", args[0]))
    stack[layers.stop - 1].register_forward_hook(lambda layer, args, output: note("output", output))
    peft_model(input_ids=ids, labels=ids).loss.backward()
    return seen


def _local_step(
    seen: Mapping[str, torch.Tensor],
    modules: Sequence[AdaptedModule],
    weights: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
) -> LocalStep:
    version = version_from(modules, weights, dtype=weights[0].dtype, wire_dtype=weights[0].dtype)
    at_input, at_output = seen["input"].grad, seen["output"].grad
    assert at_input is not None and at_output is not None
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    return LocalStep(seen["input"].detach(), seen["output"].detach(), at_output, at_input, version, flat)


def adapted_modules(stack: nn.ModuleList, layers: range) -> tuple[list[AdaptedModule], list[torch.Tensor]]:
    """The active adapters of these layers of a PEFT model, and their weights in the order of the layout."""
    modules: list[AdaptedModule] = []
    weights: list[torch.Tensor] = []
    for index in layers:
        for name, module in stack[index].named_modules():
            if isinstance(module, IA3Layer):
                for adapter in module.active_adapters:
                    sizes = {"inputs": module.in_features, "outputs": module.out_features}
                    modules.append(Ia3Module(path=f"{index}.{name}", at_input=module.is_feedforward, **sizes))
                    weights.append(module.ia3_l[adapter])
            if isinstance(module, LoraLayer):
                for adapter in module.active_adapters:
                    if adapter not in module.lora_A:
                        continue
                    a, b = module.lora_A[adapter], module.lora_B[adapter]
                    assert isinstance(a, nn.Linear) and isinstance(b, nn.Linear)
                    modules.append(
                        LoraModule(
                            path=f"{index}.{name}",
                            inputs=a.in_features,
                            outputs=b.out_features,
                            rank=module.r[adapter],
                            scaling=float(module.scaling[adapter]),
                            dropout=0.0,
                            has_bias=b.bias is not None,
                            has_magnitude=adapter in module.lora_magnitude_vector,
                        )
                    )
                    weights += [a.weight, b.weight, *([] if b.bias is None else [b.bias])]
                    if adapter in module.lora_magnitude_vector:
                        weights.append(module.lora_magnitude_vector[adapter].weight)
    return modules, weights


def flat_gradients(buffers: Mapping[str, tuple[object, object]], version: AdapterVersion) -> torch.Tensor:
    """The adapter gradients of an answer."""
    descriptor, buffer = buffers["adapter_gradients"]
    dtype = TORCH_DTYPES[version.dtype]
    assert (descriptor.dtype, descriptor.shape) == (version.dtype, (version.layout.elements,))  # type: ignore[attr-defined]
    return torch.frombuffer(bytearray(buffer), dtype=dtype)  # type: ignore[arg-type]
