"""`--deterministic packed`: a request's answer is the same bit for bit whoever shares its passes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import zsl
from support.daemon import Daemon
from support.models import CUT
from test_merging import backward_work, forward_work, run, split_randomly, tensors
from zsl.errors import WrongModelError
from zsl.split.cut import parse_cut
from zsl.trunk.compute.calibrate import PackedForms, is_deterministic
from zsl.trunk.compute.engine import TorchCompute
from zsl.trunk.daemon.load import plan_trunk
from zsl.trunk.work import Alone, Keep

PASS_TOKENS = 64
COMPOSITIONS = 25


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def compute(request: pytest.FixtureRequest, checkpoints: Callable[..., Path]) -> TorchCompute:
    plan = plan_trunk(str(checkpoints("llama")), parse_cut(CUT), request.param, "cpu", forward_only=False)
    found = plan.load(max_batch_tokens=PASS_TOKENS, deterministic=True)
    assert found.traits.deterministic
    return found


@pytest.mark.parametrize("keep", [Keep.INPUT, Keep.LINEAR_OUTPUTS])
def test_random_company_changes_no_bit_of_output_or_gradient(compute: TorchCompute, keep: Keep) -> None:
    source = random.Random(0)
    mine = forward_work(0, rows=2, tokens=9, keep=keep)
    (done,) = run(compute, [mine])
    expected = [*tensors([done]), *tensors(list(run(compute, [backward_work(mine, done, 0)])))]
    for composition in range(COMPOSITIONS):
        room = PASS_TOKENS - mine.shape.total_tokens
        works = [mine]
        while room and len(works) < 6:
            works.append(forward_work(100 * composition + room, tokens=source.randint(1, room), keep=keep))
            room -= works[-1].shape.total_tokens
        order = split_randomly(len(works), source)
        outcomes = {
            i: one for batch in order for i, one in zip(batch, run(compute, [works[i] for i in batch]), strict=True)
        }
        found = tensors([outcomes[0]])
        for batch in split_randomly(len(works), source):
            gradients = run(compute, [backward_work(works[i], outcomes[i], i) for i in batch])
            if 0 in batch:
                found += tensors([gradients[batch.index(0)]])
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True)), composition


def test_the_self_test_would_notice() -> None:
    """Without the fixed length the bits do depend on the company; where they do not, the test above shows nothing."""

    class Leaky:
        """A trunk whose rounding depends on the length of the pass."""

        mixes_rows = False
        hidden_size, dtype, device = 4, torch.float32, torch.device("cpu")

        def forward_with_linear_outputs(self, inputs: object) -> tuple[torch.Tensor, None]:
            activations: torch.Tensor = inputs.activations  # type: ignore[attr-defined]
            return activations + activations.abs().sum() * 1e-9, None

        def graph(self, inputs: object, linear_outputs: object) -> object:
            return self

        def gradients(self, at_output: torch.Tensor) -> torch.Tensor:
            return at_output

    assert not is_deterministic(Leaky(), 16, PackedForms(plain=True))  # type: ignore[arg-type]


def test_a_client_that_insists_is_refused_by_a_daemon_that_is_not_deterministic(
    serve: Callable[..., Daemon], checkpoints: Callable[..., Path]
) -> None:
    trunk = zsl.RemoteTrunk(serve("llama").endpoint, deterministic="packed")
    with pytest.raises(WrongModelError, match="--deterministic packed"):
        zsl.load_client(str(checkpoints("llama")), trunk)
    trunk.close()


def test_a_deterministic_daemon_says_so_and_serves_who_insists(
    tmp_path: Path, checkpoints: Callable[..., Path]
) -> None:
    path = str(checkpoints("llama"))
    options = ["--model", path, "--cut", CUT, "--deterministic", "packed", "--max-batch-tokens", "48"]
    with Daemon(*options, log=tmp_path / "log") as daemon:
        assert daemon.ready["deterministic"] and daemon.ready["max_batch_tokens"] == 48
        trunk = zsl.RemoteTrunk(daemon.endpoint, deterministic="packed")
        assert zsl.load_client(path, trunk) is not None
        assert trunk.client.welcome.deterministic
        trunk.close()


def test_requests_longer_than_a_pass_run_alone_in_their_own_shape(compute: TorchCompute) -> None:
    long = forward_work(1, rows=3, tokens=30, keep=Keep.GRAPH, sharing=Alone())
    (done,) = run(compute, [long])
    assert len(tensors([done])) == 1
