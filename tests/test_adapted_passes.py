"""Adapters in the trunk's layers, computed by the daemon: the numbers of a local PEFT model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from support.adapters import (
    LocalStep,
    adapted_modules,
    flat_gradients,
    local_step,
    prefix_step,
    random_version,
    step_of,
)
from support.batches import tokens
from support.models import CUT, tiny_model
from test_merging import tensors
from zsl.models.loading import load_whole
from zsl.models.reference import resolve
from zsl.split.cut import parse_cut
from zsl.split.stack import find_stack
from zsl.trunk.adapter import AdapterUse
from zsl.trunk.compute.adapters import request_adapter
from zsl.trunk.compute.calibrate import measure_pass_memory
from zsl.trunk.compute.engine import TorchCompute
from zsl.trunk.compute.stash import TorchStash
from zsl.trunk.compute.trunk_model import TrunkModel
from zsl.trunk.daemon.load import plan_trunk
from zsl.trunk.work import Alone, Batch, Done, Keep, Kind, Outcome, Shape, Sharing, Work
from zsl.wire.tensors import decode_tensor, encode_tensor

LAYERS = range(2, 4)


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **fields})


def compute_of(path: Path, dtype: torch.dtype = torch.float32, **how: Any) -> TorchCompute:
    plan = plan_trunk(str(path), parse_cut(CUT), dtype, "cpu", forward_only=False)
    return plan.load(**{"max_batch_tokens": 512, "merge_below_tokens": 64, **how})


def run(compute: TorchCompute, works: Sequence[Work]) -> list[Outcome]:
    return compute.run(Batch(tuple(works)))


def forward_of(activations: torch.Tensor, use: AdapterUse | None, sharing: Sharing, keep: Keep = Keep.NOTHING) -> Work:
    rows, length, _ = activations.shape
    shape = Shape(rows, length, (length,) * rows)
    buffers = {"activations": encode_tensor("activations", activations)}
    return Work(Kind.FORWARD, buffers, shape, sharing, keep, adapter=use)  # type: ignore[arg-type]


def backward_of(work: Work, outcome: Outcome, at_output: torch.Tensor) -> Work:
    """The backward of a forward's outcome, which asks for the adapter's gradients."""
    assert isinstance(outcome, Done), outcome
    buffers = {"gradients": encode_tensor("gradients", at_output)}
    use = work.adapter and replace(work.adapter, gradients=True)
    return replace(work, kind=Kind.BACKWARD, buffers=buffers, stash=outcome.stash, adapter=use)  # type: ignore[arg-type]


Gradients = tuple[torch.Tensor, torch.Tensor | None]


def gradients_in(outcome: Outcome, work: Work) -> Gradients:
    """Gradient at the input, and flat gradients of the adapter."""
    assert isinstance(outcome, Done), outcome
    buffers = dict(outcome.buffers)
    of_adapter = None
    if work.adapter is not None:
        of_adapter = flat_gradients(buffers, work.adapter.version)  # type: ignore[arg-type]
        del buffers["adapter_gradients"]
    return tensors([Done(buffers)])[0], of_adapter


def ia3() -> IA3Config:
    inward = ["down_proj", "o_proj", "up_proj"]
    return IA3Config(target_modules=["q_proj", "v_proj", *inward], feedforward_modules=inward)


CONFIGS: dict[str, list[PeftConfig]] = {
    "plain": [lora()],
    "patterns and bias": [
        lora(rank_pattern={"q_proj": 7}, alpha_pattern={"q_proj": 5}, use_rslora=True, lora_bias=True)
    ],
    "two active": [lora(), lora(r=3, target_modules=["q_proj", "down_proj"])],
    "dora": [lora(use_dora=True)],
    "dora between two of lora": [lora(), lora(r=3, use_dora=True), lora(r=2, use_rslora=True)],
    "ia3": [ia3()],
    "two of ia3": [ia3(), ia3()],
}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(
    ("family", "configs"),
    [
        *((family, "plain") for family in ("gpt2", "gemma2", "qwen3", "olmo2")),
        ("gpt2", "dora"),
        *(("llama", how) for how in CONFIGS),
    ],
)
def test_alone_all_numbers_are_those_of_a_local_peft_model(
    family: str, configs: str, checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [replace(config, fan_in_fan_out=family == "gpt2") for config in CONFIGS[configs]]
    step = local_step(tiny_model(family), tokens(2, 9, 3), LAYERS, *chosen)
    compute = compute_of(checkpoints(family))
    assert step.gradients.count_nonzero() > step.gradients.numel() / 2
    check_all_routes(compute, step, monkeypatch)


def test_a_prefix_alone_has_the_numbers_of_a_local_peft_model(
    checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are so many that a plain sum over them would add up in another order."""
    step = prefix_step(tiny_model("gemma2"), tokens(40, 9, 3), LAYERS, 5)
    compute = compute_of(checkpoints("gemma2"))
    assert step.gradients.count_nonzero() == step.gradients.numel()
    check_all_routes(compute, step, monkeypatch)


def check_all_routes(
    compute: TorchCompute, step: LocalStep, monkeypatch: pytest.MonkeyPatch, dropout_seed: int | None = None
) -> None:
    """From the graph, from linear outputs, from the input, and layer by layer."""
    for keep in (Keep.GRAPH, Keep.LINEAR_OUTPUTS, Keep.INPUT):
        work = forward_of(step.activations, AdapterUse(step.version, dropout_seed), Alone(), keep)
        (done,) = run(compute, [work])
        assert torch.equal(tensors([done])[0], step.output)
        back = backward_of(work, done, step.at_output)
        for by_layers in (False, True) if keep is Keep.INPUT else (False,):
            with monkeypatch.context() as patch:
                if by_layers:
                    patch.setattr(compute, "_fits", lambda works: False)
                    patch.setattr(compute, "_trim_over_budget", lambda: None)
                    patch.setattr(TrunkModel, "graph_to_keep", lambda *_: pytest.fail("a whole graph"))
                at_input, of_adapter = gradients_in(run(compute, [back])[0], back)
            assert of_adapter is not None
            assert torch.equal(at_input, step.at_input) and torch.equal(of_adapter, step.gradients), (keep, by_layers)


def test_half_precision_trunks_compute_with_adapters_in_single_precision(
    checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = compute_of(checkpoints("llama"), torch.bfloat16)
    compute.trunk.own_attention = False  # its attention on a CPU rounds less than the local model's
    for config in (lora(), lora(use_dora=True)):
        model = load_whole(resolve(str(checkpoints("llama"))), torch.bfloat16)
        step = local_step(model, tokens(1, 9, 3), LAYERS, config)
        assert step.version.dtype == step.version.layout.dtype == "f32" and step.activations.dtype == torch.bfloat16
        check_all_routes(compute, step, monkeypatch)


@pytest.mark.parametrize(("family", "dtype"), [("gpt2", torch.float32), ("llama", torch.bfloat16)], ids=str)
def test_the_norms_that_the_trunk_gives_are_the_first_magnitudes_of_a_local_peft_model(
    family: str, dtype: torch.dtype, checkpoints: Callable[..., Path]
) -> None:
    model = load_whole(resolve(str(checkpoints(family))), dtype)
    config = lora(use_dora=True, fan_in_fan_out=family == "gpt2")
    found = compute_of(checkpoints(family), dtype).traits.weight_norms
    modules = lora_layers(get_peft_model(model, config))
    assert len(modules) == len(found) > 0
    for module, norms in zip(modules, found.values(), strict=True):
        magnitude = module.lora_magnitude_vector["default"].weight
        assert isinstance(magnitude, torch.Tensor) and torch.equal(decode_tensor(*norms), magnitude)


def lora_layers(model: PeftModel) -> list[LoraLayer]:
    """Those of the cut, in order."""
    layers = find_stack(model.get_base_model()).layers
    return [one for index in LAYERS for one in layers[index].modules() if isinstance(one, LoraLayer)]


class Masked(nn.Module):
    """Dropout by known factors."""

    def __init__(self, factors: torch.Tensor) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factors.view(x.shape)


def test_with_dropout_all_numbers_are_those_of_a_local_peft_model_with_the_same_masks(
    checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both for LoRA and for DoRA, which computes its base output from the dropped input."""
    seed, dropout, ids, compute = 7, 0.3, tokens(2, 9, 3), compute_of(checkpoints("gpt2"))
    for dora in (False, True):
        config = lora(use_dora=dora, lora_dropout=dropout, fan_in_fan_out=True)
        model = get_peft_model(tiny_model("gpt2"), config).train()
        random = random_version(compute.traits.adaptable, 1)
        drops = request_adapter(AdapterUse(random, seed), {}, torch.device("cpu"), trains=True)
        for index, module in enumerate(lora_layers(model)):
            factors = drops.dropout(index, dropout, ids.numel(), module.in_features)
            assert factors is not None
            module.lora_dropout["default"] = Masked(factors)
            nn.init.normal_(module.lora_B["default"].weight, std=0.1)  # type: ignore[arg-type]
        step = step_of(model, ids, LAYERS)
        layout = step.version.layout
        modules = tuple(module.model_copy(update={"dropout": dropout}) for module in layout.modules)
        version = replace(step.version, layout=layout.model_copy(update={"modules": modules}))
        check_all_routes(compute, replace(step, version=version), monkeypatch, seed)


def test_gradients_of_adapters_are_answered_only_if_asked_for(checkpoints: Callable[..., Path]) -> None:
    step = local_step(tiny_model("llama"), tokens(1, 9, 3), LAYERS, lora())
    compute = compute_of(checkpoints("llama"))
    for keep in (Keep.GRAPH, Keep.INPUT):
        work = forward_of(step.activations, AdapterUse(step.version), Alone(), keep)
        (done,) = run(compute, [work])
        assert isinstance(done, Done) and isinstance(done.stash, TorchStash)
        back = backward_of(work, done, step.at_output)
        (answer,) = run(compute, [replace(back, adapter=work.adapter)])
        assert isinstance(answer, Done) and answer.buffers.keys() == {"gradients"}
        assert torch.equal(tensors([answer])[0], step.at_input)


@pytest.mark.parametrize(("family", "heads", "merges"), [("gpt2", 4, True), ("llama", 2, True), ("opt", 4, False)])
def test_a_trunk_says_which_modules_may_have_adapters_and_whether_their_requests_may_share_a_pass(
    family: str, heads: int, merges: bool, checkpoints: Callable[..., Path]
) -> None:
    """OPT's feed-forward layers get the tokens of all rows as one matrix."""
    traits = compute_of(checkpoints(family)).traits
    model = get_peft_model(tiny_model(family), lora(fan_in_fan_out=family == "gpt2"))
    modules, _ = adapted_modules(find_stack(model.get_base_model()).layers, LAYERS)
    assert traits.adaptable == {module.path: (module.inputs, module.outputs) for module in modules}
    assert traits.merges and traits.merges_adapters is merges
    assert traits.key_sizes == {"2": (heads, 8), "3": (heads, 8)}


def test_the_memory_of_a_graph_with_adapters_is_known_before_its_pass_and_counted_for_its_stash(
    checkpoints: Callable[..., Path],
) -> None:
    compute = compute_of(checkpoints("llama"))
    activations = torch.randn(1, 60, 32)

    def stash_bytes(use: AdapterUse | None) -> int:
        (done,) = run(compute, [forward_of(activations, use, Alone(), Keep.GRAPH)])
        assert isinstance(done, Done) and isinstance(done.stash, TorchStash)
        return done.stash.nbytes - done.stash.inputs_bytes

    ranks = {rank: AdapterUse(random_version(compute.traits.adaptable, 1, rank=rank)) for rank in (8, 64)}
    plain, small, large = stash_bytes(None), stash_bytes(ranks[8]), stash_bytes(ranks[64])
    assert [stash_bytes(None), stash_bytes(ranks[8])] == [plain, small], "remembered"
    modules = len(compute.traits.adaptable)
    assert large - small == modules * 60 * (64 - 8) * 4, "what the second product of each adapter needs"
    assert stash_bytes(AdapterUse(random_version(compute.traits.adaptable, 1, dropout=0.1), 7)) > small
    dora = AdapterUse(random_version(compute.traits.adaptable, 1, dora=True))
    linear_outputs = 60 * 4 * sum(outputs for _, outputs in compute.traits.adaptable.values())
    expected = compute.traits.graph_memory_with_adapters.nbytes((60,)) - linear_outputs
    assert small == pytest.approx(expected, rel=0.1)
    with_dora, by_layers = compute.traits.memory_of([None, ranks[8], dora])
    assert stash_bytes(dora) == pytest.approx(with_dora.nbytes((60,)) - linear_outputs, rel=0.15)
    assert stash_bytes(dora) > 1.5 * small
    trunk = compute.trunk
    measured = measure_pass_memory(
        trunk, with_dora, request_adapter(dora, trunk.linear_layers, trunk.device, trains=True)
    )
    assert by_layers.nbytes((200,)) == pytest.approx(measured.nbytes((200,)), rel=0.1)
    assert compute.traits.graph_memory.nbytes((60,)) < compute.traits.graph_memory_with_adapters.nbytes((60,))
    assert compute.traits.pass_memory.nbytes((60,)) < compute.traits.pass_memory_with_adapters.nbytes((60,))
