"""Micro-batches in flight at the same time give the gradient of micro-batches one after the other."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import Trainer, TrainingArguments

import zsl
from support import batches
from support.daemon import Daemon
from support.models import with_lora
from zsl.client.overlap import current_lane, run_overlapped
from zsl.client.trunk_client import TrunkClient
from zsl.errors import ConfigError, ModelError

MICRO_BATCHES = 6


@contextmanager
def split_model(path: Path, endpoint: str, mode: str) -> Iterator[PeftModel]:
    trunk = zsl.RemoteTrunk(endpoint, mode=mode)  # type: ignore[arg-type]
    yield with_lora(zsl.load_client(str(path), trunk))
    trunk.close()


def gradients(model: PeftModel, in_flight: int, samples: list[dict[str, Any]]) -> tuple[list[float], list[Any]]:
    model.zero_grad(set_to_none=True)

    def micro_batch(sample: dict[str, Any]) -> float:
        loss = model(**sample).loss
        loss.backward()
        return float(loss.detach())

    tasks = [partial(micro_batch, sample) for sample in samples]
    losses = [task() for task in tasks] if in_flight == 1 else run_overlapped(tasks, in_flight=in_flight)
    return losses, [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("in_flight", [2, 4, 100])
def test_the_gradient_is_the_same_bit_for_bit(
    in_flight: int, serve: Callable[..., Daemon], checkpoints: Callable[..., Path]
) -> None:
    # Nothing is merged, so that not even rounding may differ.
    endpoint = serve("llama", "--merge-below-tokens", "0").endpoint
    samples = [batches.plain(seed=seed) for seed in range(MICRO_BATCHES)]
    with split_model(checkpoints("llama"), endpoint, "exact") as model:
        one_by_one, overlapped = gradients(model, 1, samples), gradients(model, in_flight, samples)
    assert one_by_one[0] == overlapped[0]
    assert all(torch.equal(*pair) for pair in zip(one_by_one[1], overlapped[1], strict=True))


@pytest.mark.parametrize("mode", ["straight-through", "none"])
def test_the_other_modes_overlap_too(
    mode: str, serve: Callable[..., Daemon], checkpoints: Callable[..., Path], recwarn: pytest.WarningsRecorder
) -> None:
    endpoint = serve("llama", "--merge-below-tokens", "0").endpoint
    samples = [*(batches.plain(seed=seed) for seed in range(3)), batches.padded("right")]
    with split_model(checkpoints("llama"), endpoint, mode) as model:
        one_by_one, overlapped = gradients(model, 1, samples), gradients(model, 3, samples)
    for ours, theirs in zip(one_by_one[1], overlapped[1], strict=True):
        assert (ours is None and theirs is None and mode == "none") or torch.equal(ours, theirs)
    assert mode == "none" or all(gradient is not None for gradient in overlapped[1])


def test_requests_of_a_step_are_in_flight_together(
    serve: Callable[..., Daemon], checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    submit, finish = TrunkClient.submit_forward, TrunkClient.finish_forward
    monkeypatch.setattr(TrunkClient, "submit_forward", lambda *a, **k: (events.append("sent"), submit(*a, **k))[1])
    monkeypatch.setattr(TrunkClient, "finish_forward", lambda *a, **k: (events.append("back"), finish(*a, **k))[1])
    with split_model(checkpoints("llama"), serve("llama").endpoint, "exact") as model:
        gradients(model, 4, [batches.plain(seed=seed) for seed in range(MICRO_BATCHES)])
    assert events[:4] == ["sent"] * 4
    assert events.count("back") == MICRO_BATCHES


def test_an_error_in_one_micro_batch_ends_the_step_and_leaves_no_thread(
    serve: Callable[..., Daemon], checkpoints: Callable[..., Path]
) -> None:
    samples = [batches.plain(seed=1), {**batches.plain(seed=2), "output_attentions": True}, batches.plain(seed=3)]
    with split_model(checkpoints("llama"), serve("llama").endpoint, "exact") as model:
        with pytest.raises(ModelError, match="output_attentions"):
            gradients(model, 3, samples)
        assert gradients(model, 3, [samples[0]])[0] == gradients(model, 1, [samples[0]])[0]


def arguments(directory: Path, **changes: Any) -> TrainingArguments:
    made = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        seed=0,
        use_cpu=True,
        **changes,
    )
    made.dataloader_pin_memory = False
    return made


class OverlappingTrainer(zsl.OverlapMixin, Trainer):
    pass


def test_trainer_with_overlap_has_the_losses_of_trainer_without(
    tmp_path: Path, serve: Callable[..., Daemon], checkpoints: Callable[..., Path]
) -> None:
    rows = batches.tokens(22, 16).tolist()  # the last step of an epoch has fewer micro-batches
    data = Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")
    endpoint = serve("llama", "--merge-below-tokens", "0").endpoint
    losses = []
    for make in (Trainer, partial(OverlappingTrainer, overlap=4)):
        with split_model(checkpoints("llama"), endpoint, "exact") as model:
            trainer = make(model=model, args=arguments(tmp_path), train_dataset=data)
            trainer.train()
            losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
            losses.append([float(p.detach().sum()) for p in model.parameters() if p.requires_grad])
    assert losses[0] == losses[2] and len(losses[0]) == 3
    assert losses[1] == losses[3]


def drawing(answers: list[Future[None]], place: int) -> tuple[float, float]:
    """A micro-batch that draws a number on each side of its wait for the trunk."""
    first = float(torch.rand(()))
    lane = current_lane()
    assert lane is not None
    lane.wait(answers[place], 20)
    return first, float(torch.rand(()))


def test_what_a_micro_batch_draws_does_not_depend_on_which_answer_comes_first() -> None:
    drawn = []
    for order in ([0, 1, 2], [2, 0, 1]):
        torch.manual_seed(0)
        steps = []
        for _ in range(2):
            answers: list[Future[None]] = [Future() for _ in range(3)]
            with ThreadPoolExecutor(1) as pool:
                for place in order:
                    pool.submit(answers[place].set_result, None)
                steps.append(run_overlapped([partial(drawing, answers, n) for n in range(3)], in_flight=2))
        drawn.append(steps)
    assert drawn[0] == drawn[1]
    numbers = [number for step in drawn[0] for pair in step for number in pair]
    assert len(set(numbers)) == len(numbers), "each draws its own, and another step others"


def test_a_step_that_draws_nothing_leaves_the_random_numbers_as_they_were() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run_overlapped([lambda: None] * 3, in_flight=2)
    assert torch.equal(torch.get_rng_state(), before)


def micro_batch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "zsl-micro-batch"]


@pytest.mark.parametrize("goes_on_for", [3, 10_000])
def test_a_micro_batch_that_catches_everything_does_not_keep_a_step_that_failed(
    goes_on_for: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zsl.client.overlap, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(zsl.client.overlap, "GIVE_UP_SECONDS", 0.5)
    enough = threading.Event()

    def retries() -> None:
        lane = current_lane()
        assert lane is not None
        for _ in range(goes_on_for):
            try:
                lane.wait(Future(), 20)
            except:  # noqa: E722
                if enough.is_set():
                    return

    def fails() -> None:
        raise ZeroDivisionError

    ended = ThreadPoolExecutor(1).submit(run_overlapped, [retries, fails], in_flight=2)
    try:
        with pytest.raises(ZeroDivisionError):
            ended.result(10)
    finally:
        enough.set()
    for thread in micro_batch_threads():
        thread.join(10)
    assert micro_batch_threads() == []


def test_ctrl_c_leaves_the_random_numbers_as_they_were_and_no_thread() -> None:
    def interrupted() -> None:
        _thread.interrupt_main()  # which waits for this micro-batch
        for _ in range(1_000):
            torch.rand(100)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    # A shell starts background jobs with SIGINT ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_overlapped([interrupted] * 2, in_flight=2)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert torch.equal(torch.get_rng_state(), before)
    assert micro_batch_threads() == []


def test_more_overlap_than_micro_batches_is_refused(tmp_path: Path, checkpoints: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="gradient_accumulation_steps = 4"):
        OverlappingTrainer(overlap=5, model=torch.nn.Linear(1, 1), args=arguments(tmp_path))
