"""bfloat16: on the wire as a knob of its own, and in the trunk with an attention that is not the flash kernel's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import zsl
from support import batches
from support.compare import numbers_of, within
from support.daemon import Daemon
from support.models import CONFIGS, CUT, with_lora
from support.relay import Relay
from zsl.errors import BadDtypeError
from zsl.models.loading import load_trunk_part
from zsl.models.reference import resolve
from zsl.split.cut import parse_cut
from zsl.trunk.compute.passes import Rows
from zsl.trunk.compute.trunk_model import TrunkModel

EAGER = ("gemma2", "xglm")  # families that do not run sdpa
WITHOUT_FLOAT64 = ("mixtral", "gpt_oss")  # torch's product of experts takes none

# What bfloat16 can hold, 8 bits, and the few roundings of two layers.
BFLOAT16_TOLERANCE = 0.03


def activation_bytes(endpoint: str, path: str, **how: object) -> tuple[int, dict[str, torch.Tensor]]:
    """The bytes of the largest frame that a client sends, and its gradients."""
    with Relay(endpoint) as relay:
        trunk = zsl.RemoteTrunk(relay.endpoint, **how)  # type: ignore[arg-type]
        numbers = numbers_of(with_lora(zsl.load_client(path, trunk)), batches.plain())
        trunk.close()
        return max(map(len, relay.from_client)), {k: v for k, v in numbers.gradients.items() if v is not None}


def test_the_wire_dtype_halves_the_bytes_and_keeps_the_gradient_to_its_precision(
    serve: Callable[..., Daemon], checkpoints: Callable[..., Path]
) -> None:
    endpoint, path = serve("llama").endpoint, str(checkpoints("llama"))
    full, exact = activation_bytes(endpoint, path)
    half, rounded = activation_bytes(endpoint, path, wire_dtype=torch.bfloat16)
    assert half * 2 == full
    assert exact.keys() == rounded.keys()
    for name, gradient in exact.items():
        assert within(BFLOAT16_TOLERANCE)(rounded[name], gradient), name
    assert any(not torch.equal(rounded[name], gradient) for name, gradient in exact.items())


def test_a_dtype_that_does_not_travel_is_refused_at_once() -> None:
    with pytest.raises(BadDtypeError, match="int8"):
        zsl.RemoteTrunk("127.0.0.1:5555", wire_dtype=torch.int8)


@pytest.mark.parametrize("family", [family for family in CONFIGS if family not in EAGER + WITHOUT_FLOAT64])
def test_a_bfloat16_trunk_is_as_near_to_the_truth_as_with_sdpa(family: str, checkpoints: Callable[..., Path]) -> None:
    """Both are compared with float64: the one may not be worse than twice the other."""
    reference, cut = resolve(str(checkpoints(family))), parse_cut(CUT)
    torch.manual_seed(0)
    activations, gradients = torch.randn(2, 2, 20, 32)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    errors = {}
    truth = results(TrunkModel(load_trunk_part(reference, cut, torch.float64), cut), activations, gradients, mask)
    for own in (True, False):
        trunk = TrunkModel(load_trunk_part(reference, cut, torch.bfloat16), cut)
        trunk.own_attention = own and trunk.own_attention
        found = results(trunk, activations, gradients, mask)
        errors[own] = [float((f.double() - t).abs().max() / t.abs().max()) for f, t in zip(found, truth, strict=True)]
    for ours, theirs in zip(errors[True], errors[False], strict=True):
        assert ours <= 2 * theirs


def results(
    trunk: TrunkModel, activations: torch.Tensor, gradients: torch.Tensor, mask: torch.Tensor
) -> list[torch.Tensor]:
    """Outputs and gradients, without and with a mask; padded tokens too: the last one predicts the first token."""
    found = []
    for one in (None, mask):
        graph = trunk.graph(Rows(activations.to(trunk.dtype), one))
        found += [graph.output.detach(), graph.gradients(gradients.to(trunk.dtype))]
    return found
