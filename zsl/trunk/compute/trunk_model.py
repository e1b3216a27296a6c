"""Trunk model: run the cut's layers on activations, with or without an autograd graph.

Runs the family's own base-model `forward` on a placeholder, so that masks, rotary embeddings and per-layer attention
types are those of transformers. A hook replaces the input of the cut's first layer by the activations; another captures
the output of its last layer. Keeps no state between passes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from zsl.models.quantize import bits_of
from zsl.split.sides import numbers_in
from zsl.split.stack import find_stack
from zsl.trunk.compute.adapters import FlatGradients, PassAdapters
from zsl.trunk.compute.attention import flash_is_slow, layout_of, segments_attention
from zsl.trunk.compute.by_layers import Layer, gradients_at, gradients_by_layers
from zsl.trunk.compute.frozen_linear import FrozenLinear
from zsl.trunk.compute.graph_sizes import GraphSizes
from zsl.trunk.compute.keys_and_values import KeysAndValues, PackedCaches, no_keys_and_values
from zsl.trunk.compute.linear_outputs import LinearLayers, LinearOutputs
from zsl.trunk.compute.passes import Pass, Rows, Sequences
from zsl.wire.messages import Cut, Reveal

# Rotary embeddings whose frequencies depend on the longest row of a pass: requests would change each other's results.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

Revealed = Mapping[Reveal, Sequence[torch.Tensor]]  # of one pass, a tensor for each layer or router


@dataclass(frozen=True, slots=True)
class Graph:
    """A forward with its autograd graph, which `gradients` consumes. `revealed`: tensors within that graph."""

    leaf: torch.Tensor  # [rows, tokens, hidden]
    output: torch.Tensor  # [rows, tokens, hidden]
    nbytes: int  # of saved tensors, without weights, and nodes
    adapters: PassAdapters | None = None
    revealed: Revealed = field(default_factory=dict)

    def gradients(self, at_output: torch.Tensor) -> torch.Tensor:
        """Return the vector-Jacobian product `[rows, tokens, hidden]`. Call it once."""
        at_input, _ = gradients_at(self.output, self.leaf, at_output)
        return at_input

    def all_gradients(
        self, at_output: torch.Tensor, members: Collection[int], at_revealed: Mapping[Reveal, torch.Tensor]
    ) -> tuple[torch.Tensor, FlatGradients]:
        """Return the vector-Jacobian product and the gradients of the members' adapters. Call it once.

        `at_revealed`: gradients at revealed tensors, which are stacked, to add.
        """
        outputs, gradients = [self.output], [at_output]
        for name, stacked in at_revealed.items():
            outputs += self.revealed[name]
            gradients += [one.view(tensor.shape) for one, tensor in zip(stacked, self.revealed[name], strict=True)]
        if self.adapters is None or not members:
            return gradients_at(outputs, self.leaf, gradients)[0], {}
        at_input, at_leaves = gradients_at(outputs, self.leaf, gradients, self.adapters.leaves(members))
        return at_input, self.adapters.flat_gradients(members, at_leaves)


@dataclass(slots=True)
class _Separated:
    """Calls of the layers in a dry run, in order, without computing them."""

    layers: list[Layer]
    complete: bool = True  # each layer's input is the output of the previous one
    _returned: torch.Tensor | None = None

    def passed(self, forward: Callable[..., Any], first: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call of a layer, and return its input unchanged."""
        if args:
            entering, args = args[0], args[1:]
        else:
            kwargs = kwargs.copy()
            entering = kwargs.pop(first)
        other_inputs = pytree.tree_leaves((args, kwargs))
        if (self._returned is not None and entering is not self._returned) or any(
            isinstance(value, torch.Tensor) and value.requires_grad for value in other_inputs
        ):
            self.complete = False
        self._returned = entering
        self.layers.append(lambda x: forward(x, *args, **kwargs))
        return entering


class TrunkModel:
    """Runs passes of a model from `zsl.models.loading.load_trunk_part`. Not thread-safe."""

    def __init__(self, model: PreTrainedModel, cut: Cut) -> None:
        self.model = model
        self._cut = cut
        layers = find_stack(model).layers
        self._layer_count = len(layers)
        self._cache: Cache | None = None
        self._packed_caches: PackedCaches | None = None
        first = layers[cut.start]
        self._first_parameter = next(iter(inspect.signature(first.forward).parameters))
        first.register_forward_pre_hook(self._enter, with_kwargs=True)
        layers[cut.stop - 1].register_forward_hook(self._leave)
        self._separated: _Separated | None = None
        self._revealing: dict[Reveal, list[torch.Tensor]] = {}
        for layer in layers[cut.start : cut.stop - 1]:
            layer.register_forward_hook(self._pass_between)
        for index in range(cut.start, cut.stop):
            layers[index].forward = partial(self._layer, layers[index].forward)
        self._linear_layers = LinearLayers(
            (f"{index}.{name}", module)
            for index in range(cut.start, cut.stop)
            for name, module in layers[index].named_modules()
        )
        self.graph_sizes = GraphSizes(model.parameters())
        self._entering: torch.Tensor | None = None
        self._leaving: torch.Tensor | None = None
        self._attend: Callable[[], AbstractContextManager[None]] = nullcontext
        self.most_swapped_rows = 0  # in passes of several caches (`zsl.trunk.compute.few_rows`)
        self.own_attention = model.config._attn_implementation == "sdpa" and flash_is_slow(self.dtype, self.device)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def parameter_count(self) -> int:
        return sum(numbers_in(parameter) for parameter in self.model.parameters())

    @property
    def masks_by_padding(self) -> bool:
        """True if the attention mask depends on the padding of a row, as in chunked attention."""
        return "chunked_attention" in (getattr(self.model.config.get_text_config(), "layer_types", None) or ())

    @property
    def mixes_rows(self) -> bool:
        """True if a row's result depends on other rows of its pass, so that requests may not be merged."""
        kinds = {str(getattr(module, "rope_type", "")) for module in self.model.modules()}
        if any(kind in LENGTH_DEPENDENT_ROPE for kind in kinds):
            return True
        # On a GPU, the features of 8-bit layers that are not quantized are those with an outlier in any token.
        return self.device.type != "cpu" and any(bits_of(module) == "8bit" for module in self.model.modules())

    @property
    def linear_features(self) -> Mapping[str, tuple[int, int]]:
        """Inputs and outputs of the linear layers, by path (`zsl.wire.adapter_layout`)."""
        return {path: layer.features for path, layer in self.linear_layers.items()}

    @property
    def linear_layers(self) -> Mapping[str, FrozenLinear]:
        """Linear layers, by path."""
        return self._linear_layers.by_path

    @property
    def linear_weights(self) -> list[torch.Tensor]:
        """Weights `[out, in]` of the linear layers of type `nn.Linear`."""
        return [layer.matrix() for layer in self.linear_layers.values() if layer.is_plain]

    @property
    def _adapters(self) -> PassAdapters | None:
        return self._linear_layers.adapters

    def adapted(self, adapters: PassAdapters | None) -> AbstractContextManager[None]:
        """Run passes with these adapters in the linear layers."""
        return self._linear_layers.adapted(adapters)

    def routers(self) -> tuple[int, int]:
        """Count the layers with experts, and the experts of each, in a pass of two tokens."""
        activations = torch.zeros(1, 2, self.hidden_size, dtype=self.dtype, device=self.device)
        with self.revealing(["router_logits"]) as revealed:
            self.forward(Rows(activations))
            found = revealed["router_logits"]
            return len(found), found[0].shape[-1] if found else 0

    def no_keys_and_values(self) -> KeysAndValues | None:
        """Make an empty cache; None if a layer keeps something else than keys and values."""
        return no_keys_and_values(self.model.config.get_text_config(decoder=True), self._cut)

    @contextmanager
    def behind(self, cache: KeysAndValues | PackedCaches | None) -> Iterator[None]:
        """Run passes behind the tokens of a cache, or of those of a packed row's requests, which take the keys and
        values of each pass."""
        self._cache = None if cache is None else cache.in_model(self._cut, self._layer_count)
        self._packed_caches = cache if isinstance(cache, PackedCaches) else None
        try:
            yield
        finally:
            self._cache = self._packed_caches = None

    def _revealed(self) -> Revealed:
        return {name: tuple(tensors) for name, tensors in self._revealing.items()}

    @contextmanager
    def revealing(self, names: Collection[Reveal]) -> Iterator[Revealed]:
        """Yield the tensors of these names from inside the trunk, in order, as those of the last pass."""
        self._revealing = {name: [] for name in names}
        try:
            yield self._revealing
        finally:
            self._revealing = {}

    def forward(self, inputs: Pass) -> torch.Tensor:
        """Compute the output activations `[rows, tokens, hidden]`, without a graph."""
        with torch.no_grad():
            return self._run(inputs, inputs.activations)

    def forward_with_linear_outputs(self, inputs: Pass) -> tuple[torch.Tensor, LinearOutputs | None]:
        """Compute the output without a graph, and the linear outputs (None if the model modifies them in place)."""
        with self._linear_layers.recording(inputs.rows, inputs.tokens) as linear_outputs:
            output = self.forward(inputs)
        return output, linear_outputs()

    def graph(self, inputs: Pass, linear_outputs: LinearOutputs | None = None) -> Graph:
        """Compute the output with its autograd graph, for immediate use (`nbytes` is 0).

        With the `linear_outputs` of its forward, no linear layer computes again.
        """
        leaf = inputs.activations.detach().requires_grad_()
        linear_layers: AbstractContextManager[object] = nullcontext()
        if linear_outputs is not None:
            linear_layers = self._linear_layers.replaying(inputs.rows, inputs.tokens, linear_outputs)
        with torch.enable_grad(), linear_layers:
            return Graph(leaf, self._run(inputs, leaf), 0, self._adapters, self._revealed())

    def gradients_by_layers(
        self,
        inputs: Pass,
        at_output: torch.Tensor,
        members: Collection[int] = (),
        *,
        keeps_inputs: bool = False,
        after_layer: Callable[[], object] = lambda: None,
    ) -> tuple[torch.Tensor, FlatGradients]:
        """Compute `graph(inputs).all_gradients(at_output, members)` with the graph of one layer at a time (of all
        layers if they cannot be called separately), and with the inputs of some layers or of all."""
        adapters = self._adapters
        with self.separate_layers(inputs) as layers:
            if layers:
                leaves = adapters.leaves(members) if adapters else []
                at_input, at_leaves = gradients_by_layers(
                    layers,
                    inputs.activations,
                    at_output,
                    leaves,
                    keeps_inputs=keeps_inputs,
                    after_layer=after_layer,
                )
                return at_input, adapters.flat_gradients(members, at_leaves) if adapters else {}
        return self.graph(inputs).all_gradients(at_output, members, {})

    @contextmanager
    def separate_layers(self, inputs: Pass) -> Iterator[list[Layer]]:
        """Yield the layers as functions of their input, from a dry run that computes no layer.

        Empty if the model does anything between layers except pass the output of one to the next.
        """
        self._separated = separated = _Separated([])
        try:
            self.graph(inputs)
        finally:
            self._separated = None
        with self._attend():
            yield separated.layers if separated.complete else []

    def graph_to_keep(self, inputs: Pass, *, with_linear_outputs: bool) -> tuple[Graph, LinearOutputs | None]:
        """Compute the output with a graph of known `nbytes`, and optionally the linear outputs."""
        leaf = inputs.activations.detach().requires_grad_()
        with ExitStack() as stack:
            linear_outputs = None
            if with_linear_outputs:
                linear_outputs = stack.enter_context(self._linear_layers.recording(inputs.rows, inputs.tokens))
            stack.enter_context(torch.enable_grad())
            output, nbytes = self.graph_sizes.of(inputs, self._adapters, lambda: self._run(inputs, leaf))
        revealed = self._revealed()
        nbytes += sum(tensor.nbytes for tensors in revealed.values() for tensor in tensors)
        graph = Graph(leaf, output, nbytes, self._adapters, revealed)
        return graph, linear_outputs() if linear_outputs else None

    def _run(self, inputs: Pass, activations: torch.Tensor) -> torch.Tensor:
        attend: Callable[[], AbstractContextManager[None]] = nullcontext
        prefix = self._adapters.prefix_cache() if self._adapters else None
        if isinstance(inputs, Sequences):
            # Unused, but with a mask transformers does not search the positions for packed sequences.
            mask: torch.Tensor | None = torch.ones(activations.shape[:2], dtype=torch.bool, device=self.device)
            layout = self._packed_caches or layout_of(
                inputs.lengths, inputs.masked, inputs.seen, invariant=inputs.invariant, device=self.device
            )
            attend = partial(segments_attention, self.model.config, layout)
        else:
            mask = inputs.attention_mask
            if self.own_attention and prefix is None and self._cache is None:
                attend = partial(segments_attention, self.model.config, None)
        placeholder = torch.zeros((), dtype=self.dtype, device=self.device).expand(activations.shape)
        self._entering, self._attend = activations, attend
        for tensors in self._revealing.values():
            tensors.clear()
        routers = "router_logits" in self._revealing
        further: dict[str, Any] = {"output_router_logits": True} if routers else {}
        try:
            with attend(), self._linear_layers.swapped(0 if self._packed_caches is None else self.most_swapped_rows):
                result = self.model(
                    inputs_embeds=placeholder,
                    attention_mask=mask,
                    position_ids=inputs.position_ids,
                    past_key_values=prefix if self._cache is None else self._cache,
                    use_cache=self._cache is not None,
                    **further,
                )
            if routers:
                self._revealing["router_logits"] += result.get("router_logits", ())
            assert self._leaving is not None
            return self._leaving
        finally:
            self._entering = self._leaving = None

    def _layer(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._separated is not None:
            return self._separated.passed(forward, self._first_parameter, args, kwargs)
        return forward(*args, **kwargs)

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (self._entering, *args[1:]), kwargs
        return args, {**kwargs, self._first_parameter: self._entering}

    def _pass_between(self, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if "hidden_states" in self._revealing:
            self._revealing["hidden_states"].append(output)

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self._leaving = output
