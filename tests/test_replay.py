"""A daemon that is killed and started again costs time, never a result."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import zsl
from support import batches
from support.compare import differing, numbers_of
from support.daemon import Daemon
from support.faulty_link import FaultyLink
from support.models import CUT, local_model, with_lora


@pytest.fixture
def arguments(checkpoints: Callable[..., Path]) -> list[str]:
    return ["--model", str(checkpoints("llama")), "--cut", CUT, "--threads", "2"]


def test_killed_between_forward_and_backward_the_gradient_is_that_of_the_local_model(
    arguments: list[str], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    path, batch = str(checkpoints("llama")), batches.plain()
    with Daemon(*arguments, log=tmp_path / "first.log") as first, FaultyLink(first.port) as link:
        trunk = zsl.RemoteTrunk(link.endpoint, connect_timeout_seconds=60)
        split, whole = with_lora(zsl.load_client(path, trunk)), with_lora(local_model(path))
        output = split(**batch)
        first.kill()
        with Daemon(*arguments, log=tmp_path / "second.log") as second:
            link.retarget(second.port)
            output.loss.backward()
            gradients = {name: p.grad for name, p in split.named_parameters() if p.requires_grad}
            expected = numbers_of(whole, batch)
            assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.gradients.items())
            assert differing(numbers_of(split, batch), expected) == []
            trunk.close()


@pytest.mark.long
def test_killed_with_a_request_in_flight_the_request_is_answered_by_the_next_daemon(
    arguments: list[str], tmp_path: Path
) -> None:
    with Daemon(*arguments, log=tmp_path / "first.log") as first, FaultyLink(first.port) as link:
        with zsl.TrunkClient(link.endpoint, connect_timeout_seconds=60) as client:
            activations = torch.randn(2, 8, 32)
            expected = client.forward(activations).output
            first.signal(signal.SIGSTOP)
            step, future = client.submit_forward(activations)
            first.kill()
            with Daemon(*arguments, log=tmp_path / "second.log") as second:
                link.retarget(second.port)
                client.finish_forward(step, future.result(60))
                assert torch.equal(step.output, expected)
