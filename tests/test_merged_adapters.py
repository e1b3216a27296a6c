"""Requests with adapters that share passes: the numbers that each gets alone, whatever its neighbours send."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.adapters import random_ia3, random_version, version_from
from support.compare import within
from test_adapted_passes import Gradients, backward_of, compute_of, forward_of, gradients_in, run
from test_merging import tensors
from zsl.trunk.adapter import AdapterUse, AdapterVersion
from zsl.trunk.compute.engine import TorchCompute
from zsl.trunk.compute.rows import TokenRows
from zsl.trunk.compute.stacked_adapters import Company
from zsl.trunk.compute.stash import TorchStash
from zsl.trunk.work import Alone, Done, Keep, Packed, Sharing, Stacked
from zsl.wire.adapter_layout import LoraModule

HIDDEN = 32
CLOSE = within(1e-5)
TARGETS: list[Callable[[str], bool]] = [
    lambda path: True,
    lambda path: path.endswith(("q_proj", "v_proj")),
    lambda path: "mlp" in path and path.startswith("3."),
]
IA3, DORA = len(TARGETS), len(TARGETS) + 1


@dataclass(frozen=True)
class Tenant:
    """A request of one sequence, its adapter, and the gradients of its backward."""

    activations: torch.Tensor
    at_output: torch.Tensor
    use: AdapterUse | None


def tenant(compute: TorchCompute, seed: int, length: int = 8, seed_of_dropout: int | None = None, **how: Any) -> Tenant:
    source = torch.Generator().manual_seed(seed)
    activations, at_output = (torch.randn(1, length, HIDDEN, generator=source) for _ in range(2))
    use = AdapterUse(random_version(compute.traits.adaptable, seed, **how), seed_of_dropout)
    return Tenant(activations, at_output, use)


def with_ia3(compute: TorchCompute, one: Tenant, seed: int, **how: Any) -> Tenant:
    """The request with IA³ instead."""
    return replace(one, use=AdapterUse(random_ia3(compute.traits.adaptable, seed, **how)))


@pytest.fixture(scope="module")
def compute(checkpoints: Callable[..., Path]) -> TorchCompute:
    return compute_of(checkpoints("llama"))


Step = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # output, gradient at the input, of the adapter


def steps_of(
    compute: TorchCompute,
    tenants: Sequence[Tenant],
    backs: Sequence[Sequence[int]],
    *,
    keep: Keep = Keep.GRAPH_AND_LINEAR_OUTPUTS,
    sharing: Sharing = Packed(),  # noqa: B008
) -> list[Step]:
    """Run one merged forward of all, and backwards of these groups of them."""
    works = [forward_of(one.activations, one.use, sharing, keep) for one in tenants]
    done = run(compute, works)
    gradients: dict[int, Gradients] = {}
    for group in backs:
        coming = [backward_of(works[index], done[index], tenants[index].at_output) for index in group]
        for index, back, outcome in zip(group, coming, run(compute, coming), strict=True):
            gradients[index] = gradients_in(outcome, back)
    return [(output, *gradients[index]) for index, output in enumerate(tensors(list(done)))]


def alone(compute: TorchCompute, one: Tenant) -> Step:
    return steps_of(compute, [one], [[0]], keep=Keep.GRAPH, sharing=Alone())[0]


def same(ours: Step, theirs: Step, how: Callable[[torch.Tensor, torch.Tensor], bool] = CLOSE) -> bool:
    pairs = list(zip(ours, theirs, strict=True))
    return all(a is b is None or (a is not None and b is not None and how(a, b)) for a, b in pairs)


POISONS = ("nan gradients", "infinite gradients", "huge activations", "huge weights", "huge scaling")


def poisoned(one: Tenant, how: str) -> Tenant:
    """A request whose backward or whose forward is not finite, within what the daemon accepts."""
    assert one.use is not None
    if "gradients" in how:
        return replace(one, at_output=torch.full_like(one.at_output, float(how[:3])))
    if how == "huge activations":
        return replace(one, activations=one.activations * 1e30)
    layout = one.use.version.layout
    if how == "huge scaling":
        modules = [
            module.model_copy(update={"scaling": 1e300}) if isinstance(module, LoraModule) else module
            for module in layout.modules
        ]
        version = AdapterVersion(bytes(16), layout.model_copy(update={"modules": tuple(modules)}), "f32", bytearray())
        return replace(one, use=replace(one.use, version=replace(version, weights=one.use.version.weights)))
    flat = torch.frombuffer(one.use.version.weights, dtype=torch.float32)
    return replace(one, use=replace(one.use, version=version_from(layout.modules, [flat.sign() * 3e38])))


Drawn = tuple[int, int, int, bool, "str | None", float]
drawn_tenants = st.lists(
    st.tuples(
        st.integers(1, 12),  # length
        st.integers(2, 64),  # rank
        st.integers(0, DORA),  # target
        st.booleans(),  # without an adapter
        st.sampled_from((None, None, None, *POISONS)),
        st.sampled_from((0.0, 0.3)),  # dropout
    ),
    min_size=2,
    max_size=8,
)


@settings(max_examples=25, derandomize=True)
@given(drawn_tenants, st.randoms(use_true_random=False), st.sampled_from(list(Keep)[1:]))
def test_company_changes_no_number_of_a_request(
    compute: TorchCompute, drawn: list[Drawn], source: random.Random, keep: Keep
) -> None:
    tenants, bad = [], set()
    for seed, (length, rank, target, bare, poison, dropout) in enumerate(drawn):
        if target == IA3:
            one = with_ia3(compute, tenant(compute, seed, length), seed, twice=rank % 2 > 0)
        else:
            how = {"dora": True} if target == DORA else {"chosen": TARGETS[target]}
            one = tenant(compute, seed, length, seed, rank=rank, dropout=dropout, **how)
        if poison:
            bad.add(seed)
            one = poisoned(one, poison)
        tenants.append(replace(one, use=None) if bare else one)
    order = source.sample(range(len(tenants)), len(tenants))
    cut = source.randint(0, len(order))
    found = steps_of(compute, tenants, [group for group in (order[:cut], order[cut:]) if group], keep=keep)
    for index in set(range(len(tenants))) - bad:
        assert same(found[index], alone(compute, tenants[index])), (index, drawn)


@pytest.mark.parametrize("keep", [Keep.INPUT, Keep.GRAPH_AND_LINEAR_OUTPUTS])
def test_a_neighbour_that_overflows_changes_nothing_where_lengths_and_ranks_are_padded(
    compute: TorchCompute, keep: Keep
) -> None:
    tenants = [tenant(compute, seed, length=3 + 2 * seed, rank=5 + seed, dora=seed > 0) for seed in range(3)]
    expected = [alone(compute, one) for one in tenants]
    for bad in range(3):
        for how in POISONS:
            mix = [poisoned(one, how) if index == bad else one for index, one in enumerate(tenants)]
            found = steps_of(compute, mix, [[2, 0, 1]], keep=keep)
            assert not found[bad][1].isfinite().all() or how in ("huge activations", "huge scaling")
            assert all(same(found[index], expected[index]) for index in {0, 1, 2} - {bad}), (bad, how)


def test_a_merged_backward_layer_by_layer_has_the_bits_of_one_graph(
    compute: TorchCompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenants = [tenant(compute, seed, 4 + seed, 7, rank=5 + 4 * seed, dropout=0.2, dora=seed > 1) for seed in range(3)]
    expected = steps_of(compute, tenants, [range(3)], keep=Keep.INPUT)
    monkeypatch.setattr(compute, "_fits", lambda works: False)
    monkeypatch.setattr(compute, "_trim_over_budget", lambda: None)
    found = steps_of(compute, tenants, [range(3)], keep=Keep.INPUT)
    assert all(same(*pair, torch.equal) for pair in zip(found, expected, strict=True))


def test_requests_stacked_as_rows_are_told_apart_too(checkpoints: Callable[..., Path]) -> None:
    """Several rows each; the middle one without an adapter."""
    compute = compute_of(checkpoints("xglm"))
    assert not compute.traits.packs and compute.traits.merges_adapters
    tenants = [tenant(compute, seed, rank=3 + seed) for seed in range(3)]
    tenants = [
        replace(one, activations=one.activations.repeat(2, 1, 1) * 0.9, at_output=one.at_output.repeat(2, 1, 1))
        for one in tenants
    ]
    tenants[1] = replace(tenants[1], use=None)
    found = steps_of(compute, tenants, [[2, 0, 1]], sharing=Stacked(8, False, False))
    for one, ours in zip(tenants, found, strict=True):
        assert same(ours, alone(compute, one))


def test_several_adapters_of_one_request_and_biases_and_computations_in_other_precisions_share_a_pass(
    compute: TorchCompute,
) -> None:
    """One adapts each module twice, and by IA³ too; two compute in half precision, whose rounding is coarser."""
    tenants = [tenant(compute, seed, rank=4, seed_of_dropout=5, dropout=0.2, dora=seed < 2) for seed in range(3)]
    first, last = (one.use for one in (tenants[0], tenants[2]))
    assert first is not None and last is not None
    modules = first.version.layout.modules
    lora = torch.frombuffer(first.version.weights, dtype=torch.float32)
    ia3 = random_ia3(compute.traits.adaptable, 3)
    both = [lora, lora, torch.frombuffer(ia3.weights, dtype=torch.float32)]
    twice = version_from([*modules, *modules, *ia3.layout.modules], both)
    tenants[0] = replace(tenants[0], use=replace(first, version=twice))
    half = random_version(compute.traits.adaptable, 2, rank=4, dtype=torch.bfloat16)
    tenants.append(replace(tenants[2], use=AdapterUse(half)))
    tenants.append(with_ia3(compute, tenants[2], 4, dtype=torch.bfloat16))
    for group in (tenants[:3], tenants[1:]):
        found = steps_of(compute, group, [range(len(group))])
        for one, ours in zip(group, found, strict=True):
            in_half = one.use is not None and one.use.version.layout.dtype == "bf16"
            assert same(ours, alone(compute, one), within(0.03) if in_half else CLOSE)


def test_weights_are_stacked_once_for_forward_and_backward(
    compute: TorchCompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the tokens of requests of equal length are taken as they are, in whatever order the requests come."""
    made: list[int] = []
    whole: list[bool] = []
    make, rows_of = Company.__init__, TokenRows.of

    def note(company: Company, adapters: Any) -> None:
        made.append(len(adapters))
        make(company, adapters)

    def note_rows(*of: Any) -> TokenRows:
        rows = rows_of(*of)
        whole.append(rows.is_whole)
        return rows

    monkeypatch.setattr(Company, "__init__", note)
    monkeypatch.setattr(TokenRows, "of", note_rows)
    tenants = [tenant(compute, seed, length=5) for seed in range(3)]
    expected = [alone(compute, one) for one in tenants]
    for order in ([0, 1, 2], [2, 0, 1]):
        found = steps_of(compute, [tenants[index] for index in order], [[1, 2, 0]], keep=Keep.LINEAR_OUTPUTS)
        assert all(same(ours, expected[index]) for index, ours in zip(order, found, strict=True))
    assert made == [3]
    assert len(whole) == 4 and all(whole)


def test_a_graph_of_a_merged_pass_counts_the_stacked_weights(compute: TorchCompute) -> None:
    def stash_bytes(ranks: Sequence[int]) -> int:
        tenants = [tenant(compute, seed, length=6, rank=rank) for seed, rank in enumerate(ranks)]
        works = [forward_of(one.activations, one.use, Packed(), Keep.GRAPH) for one in tenants]
        total = 0
        for done in run(compute, works):
            assert isinstance(done, Done) and isinstance(done.stash, TorchStash)
            total += done.stash.nbytes
        return total

    small, large = stash_bytes((5, 5)), stash_bytes((8, 8))
    weights_and_products = sum(2 * (inputs + outputs) + 12 for inputs, outputs in compute.traits.adaptable.values())
    assert large - small == 3 * 4 * weights_and_products
    mixed = stash_bytes((5, 8))
    assert mixed == pytest.approx(large, rel=0.01), "padded"
    assert stash_bytes((8, 5)) == mixed, "remembered"


DETERMINISTIC_TOKENS = 64


@pytest.mark.parametrize(
    ("dtype", "keep"), [(torch.float32, Keep.LINEAR_OUTPUTS), (torch.bfloat16, Keep.INPUT)], ids=str
)
def test_a_deterministic_trunk_gives_the_same_bits_in_any_company(
    checkpoints: Callable[..., Path], dtype: torch.dtype, keep: Keep
) -> None:
    compute = compute_of(
        checkpoints("llama"), dtype, max_batch_tokens=DETERMINISTIC_TOKENS, merge_below_tokens=64, deterministic=True
    )
    assert compute.traits.deterministic and compute.traits.merges_adapters
    mine = [
        tenant(compute, 1, 9, 4, rank=6, dropout=0.1),
        with_ia3(compute, tenant(compute, 2, 7), 2, twice=True),
        tenant(compute, 3, 5, 4, rank=3, dropout=0.1, dora=True),
    ]
    expected = [steps_of(compute, [one], [[0]], keep=keep)[0] for one in mine]
    source = random.Random(0)
    for composition in range(8):
        tenants = [
            tenant(
                compute, 10 + 10 * composition + at, source.randint(1, 12), 3, rank=source.randint(2, 20), dora=at > 2
            )
            for at in range(source.randint(1, 4))
        ]
        if composition % 2:
            tenants[0] = poisoned(tenants[0], POISONS[composition // 2])
            tenants[-1] = replace(tenants[-1], use=None)
        places = sorted(source.sample(range(len(tenants) + len(mine)), len(mine)))
        for place, one in zip(places, mine, strict=True):
            tenants.insert(place, one)
        order = source.sample(range(len(tenants)), len(tenants))
        cut = source.randint(0, len(order))
        found = steps_of(compute, tenants, [group for group in (order[:cut], order[cut:]) if group], keep=keep)
        assert all(same(found[at], want, torch.equal) for at, want in zip(places, expected, strict=True)), composition
