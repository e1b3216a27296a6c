"""The checker finds each way in which a run can break the promise, and nothing in a run that kept it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from support.history import Event, History, check, digest

STEPS = 3
GRADIENTS = [digest([bytes([step])]) for step in range(STEPS + 1)]


def step(history: History, number: int, client: str = "a") -> None:
    """As it should be: two micro-batches, one gradient."""
    history.begin(client, number)
    history.micro_batch(client, number, 0)
    history.micro_batch(client, number, 1)
    history.gradient(client, number, GRADIENTS[number])


def run(client: str = "a") -> History:
    history = History()
    for number in range(STEPS):
        step(history, number, client)
    return history


ORACLE = run()


def test_a_run_like_the_oracle_s_has_no_violations() -> None:
    assert check(run(), ORACLE) == []


def test_the_order_of_micro_batches_within_a_step_and_of_clients_is_free() -> None:
    history, oracle = History(), History()
    for number in range(STEPS):
        for client in ("a", "b"):
            step(oracle, number, client)
    for client in ("b", "a"):
        for number in range(STEPS):
            history.begin(client, number)
            history.micro_batch(client, number, 1)
            history.micro_batch(client, number, 0)
            history.gradient(client, number, GRADIENTS[number])
    assert check(history, oracle) == []


def test_an_error_may_end_a_step_that_is_begun_again_or_a_run() -> None:
    history = History()
    step(history, 0)
    history.begin("a", 1)
    history.micro_batch("a", 1, 0)
    history.error("a", 1, TimeoutError())
    assert check(history, ORACLE) == []
    step(history, 1)
    step(history, 2)
    assert check(history, ORACLE) == []


def leave_open(history: History) -> None:
    step(history, 0)
    history.begin("a", 1)


def go_on_without_gradient(history: History) -> None:
    history.begin("a", 0)
    step(history, 1)
    step(history, 2)


def use_two_gradients(history: History) -> None:
    step(history, 0)
    history.gradient("a", 0, GRADIENTS[0])
    step(history, 1)
    step(history, 2)


def use_a_gradient_after_an_error(history: History) -> None:
    history.begin("a", 0)
    history.error("a", 0, TimeoutError())
    history.gradient("a", 0, GRADIENTS[0])


def do_a_finished_step_again(history: History) -> None:
    step(history, 0)
    step(history, 0)


def use_another_gradient(history: History) -> None:
    step(history, 0)
    history.begin("a", 1)
    history.micro_batch("a", 1, 0)
    history.micro_batch("a", 1, 1)
    history.gradient("a", 1, GRADIENTS[0])
    step(history, 2)


def use_a_micro_batch_twice(history: History) -> None:
    history.begin("a", 0)
    for micro_batch in (0, 1, 1):
        history.micro_batch("a", 0, micro_batch)
    history.gradient("a", 0, GRADIENTS[0])
    step(history, 1)
    step(history, 2)


def skip_a_step(history: History) -> None:
    step(history, 0)
    step(history, 2)


def go_back(history: History) -> None:
    step(history, 0)
    step(history, 1)
    history.begin("a", 0)
    history.error("a", 0, TimeoutError())


def stop_early(history: History) -> None:
    step(history, 0)


def do_nothing(history: History) -> None:
    pass


def go_too_far(history: History) -> None:
    for number in range(STEPS + 1):
        step(history, number)


def hear_of_a_step_that_is_over(history: History) -> None:
    step(history, 0)
    history.begin("a", 1)
    history.micro_batch("a", 0, 1)
    history.error("a", 1, TimeoutError())


def be_a_stranger(history: History) -> None:
    for client in ("a", "b"):
        for number in range(STEPS):
            step(history, number, client)


BROKEN: dict[Callable[[History], None], str] = {
    leave_open: "step 1 was neither finished nor ended by an error",
    go_on_without_gradient: "step 0 was neither finished nor ended by an error when step 1 began",
    use_two_gradients: "step 0 used more than one gradient",
    use_a_gradient_after_an_error: "step 0 was not open at its gradient",
    do_a_finished_step_again: "step 0 used more than one gradient",
    use_another_gradient: "step 1 used another gradient than the oracle's",
    use_a_micro_batch_twice: "step 0 used the micro-batches ['0', '1', '1'] instead of ['0', '1']",
    skip_a_step: "step 2 began when it was the turn of [1]",
    go_back: "step 0 began when it was the turn of [2]",
    stop_early: "step 1 and what follows is missing",
    do_nothing: "step 0 and what follows is missing",
    go_too_far: "step 3 is none of the oracle's",
    hear_of_a_step_that_is_over: "step 0 was not open at its micro_batch",
    be_a_stranger: "b: the oracle has no such client",
}


@pytest.mark.parametrize("behave", BROKEN, ids=lambda behave: behave.__name__)
def test_a_broken_promise_is_found_and_named(behave: Callable[[History], None]) -> None:
    history = History()
    behave(history)
    found = check(history, ORACLE)
    assert any(text.endswith(BROKEN[behave]) for text in found), found


def test_a_killed_client_may_leave_its_last_step_open_but_nothing_else() -> None:
    history = History()
    leave_open(history)
    assert check(history, ORACLE, killed=["a"]) == []
    history = History()
    stop_early(history)
    assert check(history, ORACLE, killed=["a"]) == []
    history = History()
    go_on_without_gradient(history)
    assert check(history, ORACLE, killed=["a"]) != []


@pytest.mark.parametrize("behave", [leave_open, use_two_gradients, skip_a_step, go_back])
def test_a_run_that_is_not_in_order_is_no_oracle(behave: Callable[[History], None]) -> None:
    oracle = History()
    behave(oracle)
    with pytest.raises(ValueError, match="oracle"):
        check(run(), oracle)


def test_a_digest_covers_every_byte_and_where_each_gradient_ends() -> None:
    same = [b"ab", bytearray(b"c"), memoryview(b"")]
    others = [[b"ab", b"d", b""], [b"a", b"bc", b""], [b"c", b"ab", b""], [b"ab", b"c"]]
    assert digest(same) == digest([b"ab", b"c", b""])
    assert len({digest(same), *map(digest, others)}) == 1 + len(others)


def test_events_of_many_threads_are_all_there(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")

    def work(client: str) -> None:
        for number in range(100):
            history.begin(client, number)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    history.close()
    assert [event.step for event in history.of("c")] == list(range(100))
    assert History.read(tmp_path / "history.jsonl").events == history.events


def test_a_file_of_a_killed_process_holds_what_was_told_before(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, signal, sys\n"
        "from support.history import History\n"
        "history = History(pathlib.Path(sys.argv[1]))\n"
        "history.begin('a', 0)\n"
        "history.error('a', 0, TimeoutError())\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    file = tmp_path / "history.jsonl"
    subprocess.run([sys.executable, "-c", script, str(file)], cwd=Path(__file__).parent, timeout=60, check=False)
    told = [Event("a", 0, "begin"), Event("a", 0, "error", "TimeoutError")]
    assert History.read(file).events == told
    with file.open("ab") as torn:
        torn.write(b'{"client": "a", "st')
    assert History.read(file).events == told


def test_a_line_that_is_torn_elsewhere_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    file.write_bytes(b'{"client": "a", "st\n{"client": "a", "step": 0, "kind": "begin", "what": ""}\n')
    with pytest.raises(ValueError, match="Unterminated"):
        History.read(file)
