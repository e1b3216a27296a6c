"""Plan and load a trunk: check the model reference without weights, then load and calibrate it.

Used by the daemon, and by programs that serve a trunk from Python.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace

import torch

from zsl.errors import ModelError, StartupError
from zsl.models.identity import identify
from zsl.models.loading import load_trunk_part
from zsl.models.quantize import check_can_be_quantized
from zsl.models.reference import ModelReference, resolve
from zsl.split.cut import check_cut
from zsl.split.stack import check_can_be_split, layer_count
from zsl.text.first_line import first_line
from zsl.trunk.compute.calibrate import (
    find_packed_forms,
    is_deterministic,
    key_sizes,
    measure_costs,
    measure_graph_memory,
    measure_pass_memory,
    merges_adapters,
    typical_adapter,
)
from zsl.trunk.compute.engine import TorchCompute
from zsl.trunk.compute.few_rows import most_swapped_rows
from zsl.trunk.compute.trunk_model import TrunkModel
from zsl.trunk.compute.try_caches import measure_cache_memory, measure_shared_decode, merges_caches
from zsl.trunk.costs import UNKNOWN_COSTS, BatchLimits, batch_limits
from zsl.trunk.malloc import give_back_freed_memory
from zsl.trunk.settings import TrunkInfo, TrunkTraits
from zsl.wire.messages import Cut, Quantization, Reveal
from zsl.wire.tensors import encode_tensor, float_wire_name

# For a model whose configuration states no maximum position.
DEFAULT_ROW_TOKENS = 32_768
# Length of a pass of a deterministic trunk. Fixed, not measured: it must be equal after a restart.
DETERMINISTIC_PASS_TOKENS = 256


@dataclass(frozen=True)
class TrunkPlan:
    """A valid model, cut, dtype and device to serve. Holds no weights."""

    reference: ModelReference
    cut: Cut
    dtype: torch.dtype
    device: torch.device
    info: TrunkInfo

    def load(
        self,
        *,
        max_batch_tokens: int | None = None,
        merge_below_tokens: int | None = None,
        deterministic: bool = False,
        pass_memory_bytes: int | None = None,
    ) -> TorchCompute:
        """Load the weights, and calibrate the trunk. Raises `ModelError` or `StartupError`.

        Batch sizes that are None follow from measured costs. With `deterministic`, every pass that may be shared has
        `max_batch_tokens` tokens; `traits.deterministic` of the result tells whether the self-test passed.
        A backward whose graph would take more than `pass_memory_bytes` is computed layer by layer.
        """
        bits = self.info.quantization
        model = load_trunk_part(self.reference, self.cut, self.dtype, quantize=bits, device=self.device)
        try:
            model.to(self.device)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise StartupError(f"the trunk cannot be moved to {self.device}: {first_line(error)}") from error
        trunk = TrunkModel(model, self.cut)
        routers = (0, 0)
        if "router_logits" in self.info.reveals:
            routers = trunk.routers()
            if not routers[0]:
                raise StartupError(f"--reveal router-logits: layers {self.cut} of this model have no routers")
        forms = find_packed_forms(trunk)
        costs = UNKNOWN_COSTS
        limits = BatchLimits()
        if deterministic:
            pass_tokens = max_batch_tokens or DETERMINISTIC_PASS_TOKENS
            limits = BatchLimits(pass_tokens, pass_tokens)
            deterministic = forms.plain and is_deterministic(trunk, pass_tokens, forms)
        elif max_batch_tokens is None or merge_below_tokens is None:
            costs = measure_costs(trunk)
            limits = batch_limits(costs)
        limits = BatchLimits(
            limits.max_batch_tokens if max_batch_tokens is None else max_batch_tokens,
            limits.merge_below_tokens if merge_below_tokens is None else merge_below_tokens,
        )
        graph_memory = measure_graph_memory(trunk)
        adapter = typical_adapter(trunk)
        with_adapters = measure_graph_memory(trunk, adapter)
        cache_memory = measure_cache_memory(trunk)
        merges = not trunk.mixes_rows and limits.merge_below_tokens > 0
        may_merge_caches = merges and forms.plain and cache_memory is not None
        if may_merge_caches and trunk.device.type == "cpu" and not deterministic:
            trunk.most_swapped_rows = most_swapped_rows(trunk.linear_weights)
        caches_merge = may_merge_caches and merges_caches(trunk)
        if caches_merge and costs is not UNKNOWN_COSTS:
            costs = replace(costs, saved_by_shared_decode_seconds=measure_shared_decode(trunk))
        traits = TrunkTraits(
            parameters=trunk.parameter_count,
            weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
            merges=merges,
            packs=forms.plain,
            packs_masks=forms.masks,
            packs_restarts=forms.restarts,
            deterministic=deterministic,
            costs=costs,
            batch_limits=limits,
            graph_memory=graph_memory,
            pass_memory=measure_pass_memory(trunk, graph_memory),
            adaptable=trunk.linear_features,
            key_sizes=key_sizes(trunk, self.cut),
            merges_adapters=merges and merges_adapters(trunk),
            graph_memory_with_adapters=with_adapters,
            pass_memory_with_adapters=measure_pass_memory(trunk, with_adapters, adapter),
            routers=routers,
            weight_norms={
                path: encode_tensor("weight_norms", layer.row_norms().float())
                for path, layer in trunk.linear_layers.items()
            },
            cache_memory=cache_memory,
            merges_caches=caches_merge,
        )
        if pass_memory_bytes is not None:
            # The resident size is the baseline of the growth: free what loading and calibration left.
            gc.collect()
            give_back_freed_memory()
        return TorchCompute(trunk, traits, pass_memory_bytes=pass_memory_bytes)


def plan_trunk(
    model: str,
    cut: Cut | None,
    dtype: torch.dtype,
    device: str,
    *,
    forward_only: bool,
    quantize: Quantization | None = None,
    reveals: tuple[Reveal, ...] = (),
) -> TrunkPlan:
    """Resolve and check model, cut and device, without weights. Raises `ModelError` or `StartupError`."""
    reference = resolve(model)
    check_can_be_split(reference.config)  # before its files are read
    if quantize is not None:
        check_can_be_quantized(reference, quantize)
    layers = layer_count(reference.config)
    if reference.part is not None:
        cut = reference.part.cut_for(model, "trunk", cut)
    cut = cut or default_cut(layers)
    check_cut(cut, layers)
    info = TrunkInfo(
        model=identify(reference),
        cut=cut,
        dtype=float_wire_name(dtype),
        forward_only=forward_only,
        max_row_tokens=getattr(reference.config.get_text_config(), "max_position_embeddings", None)
        or DEFAULT_ROW_TOKENS,
        quantization=quantize,
        reveals=reveals,
    )
    return TrunkPlan(reference, cut, dtype, checked_device(device), info)


def default_cut(layers: int) -> Cut:
    """Return the cut that leaves two layers at each end to the client. Raises `ModelError` under 5 layers."""
    if layers < 5:
        raise ModelError(f"a model of {layers} layers has no default cut; choose one with --cut START:STOP")
    return Cut(start=2, stop=layers - 2)


def checked_device(name: str) -> torch.device:
    """Return the torch device of this name. Raises `StartupError` if it is invalid or missing."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise StartupError(f"device {name!r} cannot be used: {first_line(error)}") from error
    return device
