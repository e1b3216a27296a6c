"""Clients that share passes get the gradients of the whole local model, whatever their batches bring along."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.daemon import Daemon
from support.forks import forks
from support.forms import FORMS
from support.merged_client import CLIENTS, WAIT_SECONDS, Client, Report, run_in_process

FEW_STEPS, STEPS = 24, 200
MASKED = {"left_padded", "left_padded_with_positions", "ragged", "with_holes"}
RESTARTING = {"packed_by_trl", "restarting_in_rows", "restarting_alike"}


def check(reports: Sequence[Report], steps: int) -> None:
    """Every gradient was right, and enough was merged for that to say something."""
    assert [report.steps for report in reports] == [steps] * len(CLIENTS)
    assert [report.wrong for report in reports] == [[]] * len(CLIENTS)
    shared = sum((report.shared for report in reports), Counter[str]())
    for forms in (MASKED, RESTARTING):
        assert sum(shared[form] for form in forms) >= steps // 8, shared


def test_the_clients_send_every_form() -> None:
    assert {form for way in CLIENTS for form in way.forms} == FORMS.keys() >= MASKED | RESTARTING


@pytest.mark.parametrize(
    ("family", "packs", "steps"),
    [
        ("llama", True, FEW_STEPS),
        pytest.param("llama", True, STEPS, marks=pytest.mark.long),
        pytest.param("xglm", False, STEPS, marks=pytest.mark.long),
    ],
)
def test_four_clients_in_threads_get_the_local_gradients(
    family: str, packs: bool, steps: int, serve: Callable[..., Daemon], checkpoints: Callable[..., Path]
) -> None:
    endpoint = serve(family).endpoint
    clients = [Client(str(checkpoints(family)), endpoint, way) for way in CLIENTS]
    assert {client.packs for client in clients} == {packs}
    barrier = threading.Barrier(len(clients))
    with ThreadPoolExecutor(len(clients)) as threads:
        futures = [threads.submit(client.run, steps, barrier) for client in clients]
        reports = [future.result(2 * WAIT_SECONDS) for future in futures]
    for client in clients:
        client.close()
    check(reports, steps)


@pytest.mark.long
def test_four_clients_in_processes_get_the_local_gradients(
    serve: Callable[..., Daemon], checkpoints: Callable[..., Path]
) -> None:
    tasks = [(str(checkpoints("llama")), serve("llama").endpoint, way, STEPS) for way in CLIENTS]
    with forks().Pool(len(tasks)) as processes:
        reports = processes.map_async(run_in_process, tasks, chunksize=1).get(2 * WAIT_SECONDS)
    check(reports, STEPS)
