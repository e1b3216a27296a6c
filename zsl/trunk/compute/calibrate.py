"""Start-up calibration of a loaded trunk: test packing and determinism, measure costs and memory.

Runs a few passes with random inputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from zsl.trunk.adapter import AdapterUse, AdapterVersion
from zsl.trunk.compute.adapters import PassAdapters, RequestAdapter, SeparateAdapters, Span, request_adapter
from zsl.trunk.compute.by_layers import Layer, layer_gradients, most_kept
from zsl.trunk.compute.frozen_linear import FrozenLinear
from zsl.trunk.compute.live_bytes import peak_bytes
from zsl.trunk.compute.packing import alone, packed
from zsl.trunk.compute.passes import Rows, sequences_of
from zsl.trunk.compute.prefix import SeenKeys
from zsl.trunk.compute.trunk_model import TrunkModel
from zsl.trunk.costs import Costs, GraphMemory, PassMemory, fit_cost, fit_graph_memory
from zsl.trunk.work import Shape
from zsl.wire.adapter_layout import AdapterLayout, LoraModule
from zsl.wire.messages import Cut

COST_TOKENS = (8, 96)
MEMORY_TOKENS = (8, 48, 96)
LAYER_TOKENS = (16, 64, 256)
# Ratio of the resident memory of a layer's backward to that of its tensors, from copies in kernels and fragmentation:
# 1.4 to 1.6 on Linux.
BESIDE_TENSORS = 1.6
# The fastest of repeated measurements counts: at least this many, and for at least this time.
COST_REPEATS = 3
COST_SECONDS = 0.2
COMPOSITIONS, COMPOSITIONS_OF_A_FORM = 12, 4
SEED = 0
TYPICAL_RANK = 8  # of the adapter whose memory is measured

Timed = TypeVar("Timed")
Result = tuple[torch.Tensor, torch.Tensor]  # output and gradient at the input, [rows, tokens, hidden]
Bits = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Form:
    """Shape of a test request, with an optional mask and positions as rows of integers."""

    shape: Shape
    attention_mask: Bits | None = None
    position_ids: Bits | None = None


def plain(rows: int, tokens: int) -> Form:
    return Form(Shape(rows, tokens, (tokens,) * rows))


# Equal and different lengths, one of a single token.
PLAIN = (plain(1, 5), plain(2, 3), plain(1, 1), plain(1, 5))
# Padding on the left and on the right, a hole, a row without a token, one without padding; shifted positions.
MASKED = (
    Form(Shape(3, 5, (5, 5, 5), frozenset({0, 1, 2})), ((0, 0, 1, 1, 1), (1, 1, 0, 1, 1), (0, 0, 0, 0, 0))),
    Form(Shape(2, 4, (4, 4), frozenset({0})), ((1, 1, 1, 0), (1, 1, 1, 1)), ((3, 4, 5, 6), (0, 1, 2, 3))),
)
RESTARTING = (
    Form(Shape(1, 7, (3, 4)), None, ((0, 1, 2, 0, 1, 2, 3),)),
    Form(Shape(2, 5, (2, 3, 2, 3)), None, ((0, 1, 6, 7, 8),)),
)


@dataclass(frozen=True, slots=True)
class PackedForms:
    """Forms of requests that a family packs: plain, with a mask, and with positions that start again in a row."""

    plain: bool = False
    masks: bool = False
    restarts: bool = False


def find_packed_forms(trunk: TrunkModel) -> PackedForms:
    """Test which requests, packed into one row, have the same outputs and gradients as alone."""
    if trunk.mixes_rows or not _packs(trunk, PLAIN):
        return PackedForms()
    masks = not trunk.masks_by_padding and _packs(trunk, (*MASKED, *PLAIN))
    return PackedForms(True, masks, _packs(trunk, (*RESTARTING, *PLAIN)))


def _packs(trunk: TrunkModel, forms: Sequence[Form]) -> bool:
    random = torch.Generator().manual_seed(SEED)
    parts = [random_request(trunk, form, random) for form in forms]
    gradients = [torch.randn(part.activations.shape, generator=random).to(part.activations) for part in parts]
    shapes = [form.shape for form in forms]
    try:
        together = _packed_results(trunk, parts, shapes, gradients, pass_tokens=0)
    except Exception:  # any error of the family's code on a packed row
        return False
    separate = [_alone_result(trunk, part, gradient) for part, gradient in zip(parts, gradients, strict=True)]
    # Relative to the largest magnitude. A family that does not pack is off by far more. Random inputs are out of
    # distribution and amplify rounding errors.
    tolerance = math.sqrt(torch.finfo(trunk.dtype).eps)
    return all(
        is_close(ours, theirs, tolerance)
        for pair in zip(together, separate, strict=True)
        for ours, theirs in zip(*pair, strict=True)
    )


def is_deterministic(trunk: TrunkModel, pass_tokens: int, forms: PackedForms) -> bool:
    """Test that output and gradient of a request are equal bit for bit in random passes of `pass_tokens`."""
    random = torch.Generator().manual_seed(SEED)

    def below(stop: int) -> int:
        return int(torch.randint(0, stop, (), generator=random))

    special = [*(MASKED if forms.masks else ()), *(RESTARTING if forms.restarts else ())]
    probes = [plain(1, 1 + below(max(pass_tokens // 4, 1))), *special]
    for form in probes:
        room = pass_tokens - form.shape.total_tokens
        if room < 0:
            continue
        probe = random_request(trunk, form, random)
        gradient = torch.randn(probe.activations.shape, generator=random).to(probe.activations)
        (expected,) = _packed_results(trunk, [probe], [form.shape], [gradient], pass_tokens=pass_tokens)
        for _ in range(COMPOSITIONS if form is probes[0] else COMPOSITIONS_OF_A_FORM):
            neighbours = _random_forms(room, special, below)
            place = below(len(neighbours) + 1)
            others = [random_request(trunk, one, random) for one in neighbours]
            gradients = [torch.randn(one.activations.shape, generator=random).to(probe.activations) for one in others]
            found = _packed_results(
                trunk,
                [*others[:place], probe, *others[place:]],
                [*(one.shape for one in neighbours[:place]), form.shape, *(one.shape for one in neighbours[place:])],
                [*gradients[:place], gradient, *gradients[place:]],
                pass_tokens=pass_tokens,
            )[place]
            if not all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True)):
                return False
    return True


def _random_forms(room: int, special: Sequence[Form], below: Callable[[int], int]) -> list[Form]:
    """Draw up to six forms of at most `room` tokens in total: rows of any length, sometimes a special form."""
    forms: list[Form] = []
    while room > 0 and len(forms) < 6:
        form = special[below(len(special))] if special and below(3) == 0 else plain(1, 1 + below(room))
        if form.shape.total_tokens > room:
            form = plain(1, room)
        forms.append(form)
        room -= form.shape.total_tokens
    return forms


def measure_costs(trunk: TrunkModel, clock: Callable[[], float] = time.perf_counter) -> Costs:
    """Measure a few short passes, and fit the costs of this trunk on this device."""
    random = torch.Generator().manual_seed(SEED)
    samples: dict[str, list[tuple[int, float]]] = {"forward": [], "backward": [], "linear_outputs": []}
    for tokens in COST_TOKENS:
        part = alone(random_request(trunk, plain(1, tokens), random)).inputs
        gradient = torch.ones_like(part.activations)
        _, linear_outputs = trunk.forward_with_linear_outputs(part)  # and warm up
        best = {name: float("inf") for name in samples}
        begun = clock()
        repeats = 0
        while repeats < COST_REPEATS or clock() - begun < COST_SECONDS:
            repeats += 1
            graph, forward_seconds = timed(lambda: trunk.graph(part), trunk.device, clock)  # noqa: B023
            _, backward_seconds = timed(lambda: graph.gradients(gradient), trunk.device, clock)  # noqa: B023
            _, linear_outputs_seconds = timed(
                lambda: trunk.graph(part, linear_outputs).gradients(gradient),  # noqa: B023
                trunk.device,
                clock,
            )
            for name, seconds in zip(samples, (forward_seconds, backward_seconds, linear_outputs_seconds), strict=True):
                best[name] = min(best[name], seconds)
        for name, seconds in best.items():
            samples[name].append((tokens, seconds))
    forward, backward, from_linear_outputs = (fit_cost(samples[name]) for name in samples)
    return Costs(forward, backward, from_linear_outputs)


def measure_graph_memory(trunk: TrunkModel, adapter: RequestAdapter | None = None) -> GraphMemory:
    """Measure three graphs, and fit the memory that a graph of this trunk keeps, without or with an adapter."""
    random, samples = torch.Generator().manual_seed(SEED), []
    for tokens in MEMORY_TOKENS:
        request = random_request(trunk, plain(1, tokens), random)
        with trunk.adapted(_adapters_of_one(adapter, tokens)):
            graph, linear_outputs = trunk.graph_to_keep(request, with_linear_outputs=True)
        samples.append((tokens, graph.nbytes + (0 if linear_outputs is None else linear_outputs.nbytes)))
    return fit_graph_memory(samples)


def measure_pass_memory(
    trunk: TrunkModel, graph_memory: GraphMemory, adapter: RequestAdapter | None = None
) -> PassMemory:
    """Measure the first and last layer, and fit the peak memory of a backward computed layer by layer."""
    random, samples, kept = torch.Generator().manual_seed(SEED), [], (0, 0)
    for tokens in LAYER_TOKENS:
        # A mask with a hole: the mask that families build from it is quadratic in the row length.
        mask = ((0, *(1,) * (tokens - 1)),)
        rows = random_request(trunk, Form(Shape(1, tokens, (tokens,), frozenset({0})), mask), random)
        adapters = _adapters_of_one(adapter, tokens)
        leaves = adapters.leaves([0]) if adapters else []
        with trunk.adapted(adapters), trunk.separate_layers(rows) as layers:
            if not layers:
                return PassMemory(graph_memory, 0)
            input_bytes = trunk.hidden_size * trunk.dtype.itemsize
            kept = most_kept(len(layers)) * input_bytes, most_kept(len(layers), keeps_inputs=True) * input_bytes
            nbytes = max(_layer_bytes(layer, rows.activations, leaves) for layer in (layers[0], layers[-1]))
        samples.append((tokens, round(nbytes * BESIDE_TENSORS)))
    return PassMemory(fit_graph_memory(samples), *kept)


def typical_adapter(trunk: TrunkModel) -> RequestAdapter | None:
    """Make an adapter of `TYPICAL_RANK` on all linear layers; None for a trunk without linear layers."""
    modules = tuple(
        LoraModule(
            path=path,
            inputs=inputs,
            outputs=outputs,
            rank=TYPICAL_RANK,
            scaling=1.0,
            dropout=0.0,
            has_bias=False,
            has_magnitude=False,
        )
        for path, (inputs, outputs) in trunk.linear_features.items()
    )
    if not modules:
        return None
    # In single precision, as PEFT makes the adapters of a model in half precision.
    layout = AdapterLayout(dtype="f32", modules=modules)
    version = AdapterVersion(bytes(16), layout, "f32", bytearray(layout.nbytes("f32")))
    return request_adapter(AdapterUse(version), trunk.linear_layers, trunk.device, trains=True)


def merges_adapters(trunk: TrunkModel) -> bool:
    """Test that every linear layer gets the tokens of the pass in their order, `[rows, tokens, features]`.

    The tokens of a layer that gets others, such as a routed expert, cannot be told apart by request; nor those of one
    that is not called in the test.
    """
    request = random_request(trunk, plain(2, 3), torch.Generator().manual_seed(SEED))
    seen = _SeenInputs()
    with trunk.adapted(seen):
        trunk.forward(request)
    shapes = seen.shapes
    return shapes.keys() == trunk.linear_features.keys() and all(shape == {(2, 3)} for shape in shapes.values())


def key_sizes(trunk: TrunkModel, cut: Cut) -> dict[str, tuple[int, int]]:
    """Return the heads of each layer's keys and values, and their size, by path; empty if the family takes no prefix:
    a layer keeps no keys in the cache of transformers, or values of another size."""
    seen = _WithCache()
    try:
        with trunk.adapted(seen):
            trunk.forward(random_request(trunk, plain(2, 3), torch.Generator().manual_seed(SEED)))
    except Exception:  # any error of the family's code with a cache
        return {}
    found = seen.keys.sizes
    return found if found.keys() == set(map(str, range(cut.start, cut.stop))) else {}


class _WithCache(SeparateAdapters):
    """No adapters, but a cache that notes the sizes of keys."""

    def __init__(self) -> None:
        super().__init__([])
        self.keys = SeenKeys()

    def prefix_cache(self) -> SeenKeys:
        return self.keys


class _SeenInputs(SeparateAdapters):
    """No adapters: notes the shapes of the linear layers' inputs, without their features, by path."""

    def __init__(self) -> None:
        super().__init__([])
        self.shapes: dict[str, set[tuple[int, ...]]] = {}

    def adapted_output(self, path: str, x: torch.Tensor, output: torch.Tensor, layer: FrozenLinear) -> torch.Tensor:
        self.shapes.setdefault(path, set()).add(tuple(x.shape[:-1]))
        return output


def _adapters_of_one(adapter: RequestAdapter | None, tokens: int) -> PassAdapters | None:
    return None if adapter is None else SeparateAdapters([Span(tokens, 0, adapter)])


def _layer_bytes(layer: Layer, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> int:
    return peak_bytes(lambda: layer_gradients(layer, x, x, weights))


def timed(run: Callable[[], Timed], device: torch.device, clock: Callable[[], float]) -> tuple[Timed, float]:
    """Return the result of a run on this device, and its seconds."""
    begun = clock()
    result = run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return result, clock() - begun


def random_request(trunk: TrunkModel, form: Form, random: torch.Generator) -> Rows:
    """Make a random request of this form."""

    def optional(bits: Bits | None) -> torch.Tensor | None:
        return None if bits is None else torch.tensor(bits, device=trunk.device)

    shape = (form.shape.rows, form.shape.tokens, trunk.hidden_size)
    activations = torch.randn(shape, generator=random).to(trunk.device, trunk.dtype)
    return Rows(activations, optional(form.attention_mask), optional(form.position_ids))


def _alone_result(trunk: TrunkModel, part: Rows, gradient: torch.Tensor) -> Result:
    graph = trunk.graph(part)
    return graph.output.detach(), graph.gradients(gradient)


def _packed_results(
    trunk: TrunkModel,
    parts: Sequence[Rows],
    shapes: Sequence[Shape],
    gradients: Sequence[torch.Tensor],
    *,
    pass_tokens: int,
) -> list[Result]:
    """Return output and gradient of each part, as the daemon computes them: a backward from linear outputs."""
    sequences = [sequences_of(part, shape) for part, shape in zip(parts, shapes, strict=True)]
    merged = packed(sequences, [(shape.rows, shape.tokens) for shape in shapes], pass_tokens=pass_tokens)
    output, linear_outputs = trunk.forward_with_linear_outputs(merged.inputs)
    at_input = trunk.graph(merged.inputs, linear_outputs).gradients(merged.join(gradients))
    return list(zip(merged.split(output), merged.split(at_input), strict=True))


def is_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> bool:
    scale = float(theirs.abs().max()) or 1.0
    return float((ours - theirs).abs().max()) <= tolerance * scale
