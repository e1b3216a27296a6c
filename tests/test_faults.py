"""Faults with a real model: a daemon killed at any point, a line that breaks, a storm of bad messages. Every optimizer
step uses one gradient, and it is that of the fault-free run, bit for bit."""

from __future__ import annotations

import random
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import torch
from peft import PeftModel

import zsl
from support import batches
from support.daemon import Daemon
from support.echo import NO_ADAPTER
from support.faulty_link import FaultyLink
from support.history import History, check, digest
from support.models import CUT, LAYERS, local_model, with_lora
from support.mutations import mutated
from support.peer import Peer, forward
from zsl.client.gradient_sum import StepSums, micro_batch
from zsl.wire.frames import encode
from zsl.wire.messages import (
    Backward,
    Bye,
    Cancel,
    Header,
    Hello,
    Ping,
    Release,
    StatusRequest,
    TensorDescriptor,
    Welcome,
)

STEPS = 5
MICRO_BATCHES = 2  # of a step, whose gradients of the trunk's adapters are summed up at the daemon
LEARNING_RATE = 1e-2
FAILPOINTS = ["before-forward", "after-forward", "before-backward", "after-backward"]
RANDOM_KILLS = 4
STEP_SECONDS = 0.1  # about as long as a step takes
WAIT_SECONDS = 120
HIDDEN = 32
BAD_MESSAGES = 100_000
BURST = 500


def train(
    model: PeftModel,
    history: History,
    *,
    steps: int = STEPS,
    micro_batches: int = MICRO_BATCHES,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """AdamW on sums over micro-batches, each gradient noted when it is used."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE)
    for step in range(steps):
        history.begin("client", step)
        optimizer.zero_grad()
        sums = StepSums()
        for number in range(micro_batches):
            with micro_batch(sums, is_last=number == micro_batches - 1):
                model(**batches.plain(seed=micro_batches * step + number)).loss.backward()
        gradients = [b"" if parameter.grad is None else parameter.grad.numpy().data for parameter in trainable]
        history.gradient("client", step, digest(gradients))
        optimizer.step()
        on_step()


@pytest.fixture(scope="module")
def path(checkpoints: Callable[..., Path]) -> str:
    return str(checkpoints("llama"))


@pytest.fixture(scope="module")
def oracle(path: str) -> History:
    """The whole model on this machine, where nothing can fail."""
    history = History()
    train(with_lora(local_model(path), layers=range(LAYERS)), history)
    return history


@contextmanager
def split_model(path: str, endpoint: str) -> Iterator[PeftModel]:
    trunk = zsl.RemoteTrunk(endpoint, connect_timeout_seconds=60, request_timeout_seconds=60)
    try:
        yield with_lora(zsl.load_client(path, trunk), layers=range(LAYERS))
    finally:
        trunk.close()


def violations(path: str, endpoint: str, oracle: History) -> list[str]:
    """Collect the violations of a training through a trunk."""
    history = History()
    with split_model(path, endpoint) as model:
        train(model, history)
    return check(history, oracle)


@pytest.mark.parametrize("place", FAILPOINTS)
def test_a_daemon_killed_anywhere_in_a_step_leaves_every_gradient_as_it_was(
    path: str, oracle: History, serve: Callable[..., Daemon], tmp_path: Path, place: str
) -> None:
    """In the second micro-batch of the second step, the sum of whose first is lost; another daemon is on the list."""
    options = ["--model", path, "--cut", CUT, "--max-batch-tokens", "512", "--merge-below-tokens", "64"]
    fails = {"ZSL_FAILPOINT": f"{place}:kill:4"}
    with Daemon(*options, log=tmp_path / "log", environment=fails) as first:
        assert violations(path, f"{first.endpoint},{serve('llama').endpoint}", oracle) == []
        assert first.wait() == -signal.SIGKILL


class MortalDaemon:
    """A daemon that dies again and again, at each failpoint and at random moments, and is started on its port."""

    def __init__(self, options: list[str], log: Path, chance: random.Random) -> None:
        self.progress = threading.Semaphore(0)  # the client has taken a step
        self.kills: Counter[str] = Counter()
        self._options, self._log, self._chance = options, log, chance
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.endpoint = f"tcp://127.0.0.1:{self._port}"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._live)

    def _live(self) -> None:
        # Of the 400 requests of the training, so that all lives have some of them.
        deaths = [f"{place}:kill:{self._chance.randrange(2, 24)}" for place in FAILPOINTS] + [""] * RANDOM_KILLS
        self._chance.shuffle(deaths)
        for death in deaths:
            with Daemon(*self._options, log=self._log, port=self._port, environment={"ZSL_FAILPOINT": death}) as daemon:
                if not death:
                    while self.progress.acquire(blocking=False):
                        pass
                    assert self.progress.acquire(timeout=WAIT_SECONDS)
                    self._over.wait(self._chance.uniform(0, STEP_SECONDS))
                    daemon.process.kill()
                assert daemon.process.wait(WAIT_SECONDS) == -signal.SIGKILL
                self.kills[death.partition(":")[0]] += 1
        with Daemon(*self._options, log=self._log, port=self._port):
            self._over.wait()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(2 * WAIT_SECONDS)


@pytest.mark.timeout(600)
@pytest.mark.long
def test_a_daemon_killed_again_and_again_leaves_the_weights_of_a_long_training_as_they_were(
    path: str, tmp_path: Path
) -> None:
    """Fifty steps of AdamW over four micro-batches each, with adapters on all layers."""
    how: dict[str, Any] = {"steps": 50, "micro_batches": 4}
    whole, oracle, history = with_lora(local_model(path), layers=range(LAYERS)), History(), History()
    train(whole, oracle, **how)
    options = ["--model", path, "--cut", CUT, "--max-batch-tokens", "512", "--merge-below-tokens", "64"]
    with MortalDaemon(options, tmp_path / "log", random.Random(0)) as daemon:
        with split_model(path, daemon.endpoint) as model:
            train(model, history, **how, on_step=daemon.progress.release)
    assert daemon.kills == {**dict.fromkeys(FAILPOINTS, 1), "": RANDOM_KILLS}
    assert check(history, oracle) == []
    expected = whole.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_a_line_that_breaks_and_flips_bits_leaves_every_gradient_as_it_was(
    path: str, oracle: History, serve: Callable[..., Daemon]
) -> None:
    with FaultyLink(serve("llama").port) as link:
        over = threading.Event()

        def break_line() -> None:
            chance = random.Random(0)
            while not over.wait(0.3):
                if link.to_come:
                    continue  # faults that pile up while little is sent would let no handshake through
                way = chance.choice(["up", "down"])
                if chance.random() < 0.5:
                    link.flip_bits(way, after_bytes=1 + chance.randrange(8_000))  # type: ignore[arg-type]
                else:
                    link.reset(way, after_bytes=1 + chance.randrange(8_000))  # type: ignore[arg-type]

        breaker = threading.Thread(target=break_line)
        breaker.start()
        try:
            for _ in range(50):
                assert violations(path, link.endpoint, oracle) == []
                if link.happened["flip_bits"] > 1 and link.happened["reset"] > 1:
                    break
        finally:
            over.set()
            breaker.join(20)
        assert link.happened["flip_bits"] > 1 and link.happened["reset"] > 1, link.happened


@pytest.mark.timeout(300)
@pytest.mark.long
def test_a_hundred_thousand_bad_messages_change_no_bit_of_a_client_that_trains_beside(
    path: str, oracle: History, serve: Callable[..., Daemon]
) -> None:
    # Some of the bad messages are whole requests: in one pass with others a result has the same bits on some CPUs only.
    daemon = serve("llama", "--merge-below-tokens", "0")
    with ThreadPoolExecutor(1) as pool:
        storm = pool.submit(send_bad_messages, daemon.endpoint, BAD_MESSAGES, random.Random(0))
        trained = 0
        while not storm.done():
            assert violations(path, daemon.endpoint, oracle) == []
            trained += 1
        sent, answered = storm.result()
    assert sent == BAD_MESSAGES and answered > BAD_MESSAGES / 10
    assert trained > 1
    with zsl.TrunkClient(daemon.endpoint) as client:
        assert client.status().queued_requests == 0
        assert daemon.process.poll() is None


def send_bad_messages(endpoint: str, count: int, chance: random.Random) -> tuple[int, int]:
    """From a session of its own each time: how many were sent, and how many of them were answered."""
    sent = answered = 0
    while sent < count:
        with Peer(endpoint) as peer:
            good = [[bytes(frame) for frame in encode(*message)] for message in good_messages(peer.hello())]
            stream = mutated(good, chance)
            for _ in range(BURST):
                peer.send_frames(next(stream) or [b""])
            sent += BURST
            answered += peer.answers_until_quiet()
            peer.leave_nothing()
    return sent, answered


def good_messages(welcome: Welcome) -> list[tuple[Header, list[bytes]]]:
    """One of each type."""
    named = {"session": welcome.session, "epoch": welcome.epoch}
    gradients = TensorDescriptor(role="gradients", dtype="f32", shape=(1, 2, HIDDEN), nbytes=8 * HIDDEN)
    activations = gradients.model_copy(update={"role": "activations"})
    work = {**named, "attempt": 0, "budget_ms": 20_000, "step": 1}
    return [
        (Hello(request=9, software="t", dtype="f32", model=welcome.model, cut=welcome.cut, resume=None), []),
        forward(welcome, 1, hidden=HIDDEN, keep=True),
        forward(welcome, 2, rows=2, tokens=3, hidden=HIDDEN),
        (Backward(**work, **NO_ADAPTER, request=3, tensors=[gradients]), [bytes(gradients.nbytes)]),
        (Backward(**work, **NO_ADAPTER, request=4, tensors=[activations, gradients]), [bytes(gradients.nbytes)] * 2),
        (Release(**named, step=1), []),
        (Cancel(**named, request=1), []),
        (Ping(**named, request=5), []),
        (StatusRequest(request=6), []),
        (Bye(**named), []),
    ]
