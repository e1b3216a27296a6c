"""Sums of adapter gradients over micro-batches are the local ones, in whatever order and however often they come."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from zsl.errors import UnknownSumError
from zsl.trunk.adapter import AdapterUse, AdapterVersion
from zsl.trunk.compute.gradient_sums import add_to_sums
from zsl.wire.adapter_layout import AdapterLayout, LoraModule
from zsl.wire.messages import AdapterSum

MODULE = LoraModule(
    path="2.up", inputs=3, outputs=4, rank=1, scaling=1.0, dropout=0.0, has_bias=False, has_magnitude=False
)


def version() -> AdapterVersion:
    return AdapterVersion(b"v" * 16, AdapterLayout(dtype="f32", modules=(MODULE,)), "f32", bytearray(28))


def use(of: AdapterVersion, position: int, *, name: int = 1, last: bool = False) -> AdapterUse:
    return AdapterUse(of, gradients=last, sum=AdapterSum(name=name, position=position))


def parts(number: int, seed: int = 0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(7, generator=random) for _ in range(number)]


def local_sum(gradients: list[torch.Tensor]) -> torch.Tensor:
    total = gradients[0].clone()
    for gradient in gradients[1:]:
        total += gradient
    return total


@given(st.integers(1, 6), st.lists(st.integers(1, 3), max_size=6), st.randoms(use_true_random=False))
def test_a_sum_is_the_local_one_bit_for_bit_however_passes_divide_it(number: int, cuts: list[int], random) -> None:  # type: ignore[no-untyped-def]
    """Each pass takes the next few backwards, in any order within it, and sometimes one that was added before."""
    of, gradients, done = version(), parts(number), 0
    sizes = iter([*cuts, *[1] * number])
    while done < number:
        batch = list(range(done, min(done + next(sizes), number)))
        done = batch[-1] + 1
        if batch[0] > 0 and random.random() < 0.5:
            batch.append(random.randrange(batch[0]))  # repeated
        random.shuffle(batch)
        uses = [use(of, position, last=position == number - 1) for position in batch]
        answers = add_to_sums(uses, {index: gradients[position] for index, position in enumerate(batch)})
    (answer,) = answers.values()
    assert isinstance(answer, torch.Tensor) and torch.equal(answer, local_sum(gradients))
    again = add_to_sums([use(of, number - 1, last=True)], {0: gradients[-1]})[0]
    assert isinstance(again, torch.Tensor) and torch.equal(again, local_sum(gradients))


def test_a_sum_without_its_predecessors_is_unknown_and_a_new_name_starts_another() -> None:
    of, gradients = version(), parts(3)
    assert isinstance(add_to_sums([use(of, 1)], {0: gradients[1]})[0], UnknownSumError)
    assert add_to_sums([use(of, 0)], {0: gradients[0]}) == {}
    assert isinstance(add_to_sums([use(of, 2, last=True)], {0: gradients[2]})[0], UnknownSumError)
    assert isinstance(add_to_sums([use(of, 1, name=2)], {0: gradients[1]})[0], UnknownSumError)
    assert add_to_sums([use(of, 0, name=2)], {0: gradients[2]}) == {}
    answer = add_to_sums([use(of, 1, name=2, last=True)], {0: gradients[0]})[0]
    assert isinstance(answer, torch.Tensor) and torch.equal(answer, gradients[2] + gradients[0])


def test_gradients_without_a_sum_are_answered_as_they_are_and_only_if_asked_for() -> None:
    of, (gradient,) = version(), parts(1)
    answers = add_to_sums([AdapterUse(of, gradients=True), AdapterUse(of)], {0: gradient, 1: gradient})
    assert answers.keys() == {0} and answers[0] is gradient
