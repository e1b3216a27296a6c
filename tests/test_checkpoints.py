"""A checkpoint is at its place whole or not at all, damage is seen, and a run goes on from its own newest whole one."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from zsl.errors import ConfigError, StartupError
from zsl.files.durable import aside, remove_leftovers, write_file
from zsl.training.config.config import TrainConfig
from zsl.training.directory.checkpoints import CHECKSUMS, checkpoints_in, damage_of, prune, put_in_place
from zsl.training.directory.record import RunRecord, configuration_of, read_record
from zsl.training.directory.resume import RunDirectory, held, refuse_another_run

MINE = RunRecord(configuration={"train.learning_rate": 0.01}, facts={"the rows of the data": "abc"})


def save(directory: Path, step: int, *, record: RunRecord = MINE, limit: int | None = 2) -> Path:
    """A checkpoint as the trainer makes it, without its tensors."""
    place = directory / f"checkpoint-{step}"
    with aside(directory) as beside:
        written = beside / place.name
        (written / "part").mkdir(parents=True)
        (written / "part" / "weights").write_bytes(bytes(range(step, step + 20)))
        (written / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 9}))
        RunDirectory(directory, record).add_to(written, metrics=f'{{"step": {step}}}\n', seconds=step / 2)
        put_in_place(written, place)
    prune(directory, step, limit=limit)
    return place


def begun(directory: Path, *steps: int, record: RunRecord = MINE) -> RunDirectory:
    """A directory in which the run of `record` was begun, made checkpoints, and was killed."""
    run = RunDirectory(directory, record)
    run.begin()
    for step in steps:
        save(directory, step, record=record, limit=None)
    return RunDirectory(directory, record)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


def test_the_best_is_the_one_that_was_written_not_one_between_two_checkpoints(tmp_path: Path) -> None:
    best = {"best_global_step": 3, "best_model_checkpoint": "elsewhere/checkpoint-2", "max_steps": 9, "global_step": 4}
    foreign = tmp_path / "other" / "checkpoint-4"
    foreign.mkdir(parents=True)
    (foreign / "trainer_state.json").write_text(json.dumps(best))
    start = RunDirectory(tmp_path, MINE).start(str(foreign))
    assert start is not None and start.best == tmp_path / "other" / "checkpoint-2"


def test_a_flipped_bit_anywhere_a_cut_and_a_missing_file_are_seen(tmp_path: Path) -> None:
    whole = save(tmp_path, 1)
    assert damage_of(whole) is None
    files = [file for file in whole.rglob("*") if file.is_file()]
    assert len(files) == 5
    for file in files:
        original = file.read_bytes()
        for offset in range(len(original)):
            flip(file, offset)
            assert damage_of(whole), f"{file}, byte {offset}"
            file.write_bytes(original)
        for length in range(len(original)):
            file.write_bytes(original[:length])
            # A list of checksums without its last line break is still whole.
            assert damage_of(whole) or (file.name, length) == (CHECKSUMS, len(original) - 1)
        file.unlink()
        assert damage_of(whole) == f"{file.name} is missing"
        file.write_bytes(original)
    assert damage_of(whole) is None


class Killed(BaseException):
    pass


@contextmanager
def killed_at(operation: int) -> Iterator[Callable[[], bool]]:
    """From the `operation`-th call on, nothing reaches the disk: as if the process had been killed there.

    A tree that is being removed then has lost a file. Yields whether it came to that.
    """
    count = 0

    def step() -> bool:
        nonlocal count
        count += 1
        return count >= operation

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if step():
                if function is shutil.rmtree and count == operation:
                    next(path for path in Path(arguments[0]).rglob("*") if path.is_file()).unlink()
                raise Killed
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in [
            (os, "rename"),
            (os, "replace"),
            (os, "fsync"),
            (os, "mkdir"),
            (shutil, "rmtree"),
            (Path, "write_bytes"),
            (Path, "write_text"),
        ]:
            patch.setattr(module, name, dying(getattr(module, name)))
        yield lambda: count >= operation


def test_wherever_it_is_killed_the_newest_whole_checkpoint_never_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a kill loses nothing that was written, and this is slow
    operation = 0
    alive = False
    while not alive:
        operation += 1
        directory = tmp_path / str(operation)
        begun(directory, 1, 2)
        newest = 2
        with killed_at(operation) as died:
            try:
                for step in (3, 4):
                    save(directory, step)
                    newest = step
            except Killed:
                pass
            alive = not died()
        start = RunDirectory(directory, MINE).start(None)
        assert start is not None
        assert start.step in (newest, newest + 1)  # it may be in place, and the call not have returned
        remove_leftovers(directory)
        assert names(directory) <= {"run.json", *(f"checkpoint-{step}" for step in range(1, 5))}
        # And the next one finds its place.
        save(directory, 5)
        assert [path.name for path in checkpoints_in(directory)] == ["checkpoint-5", f"checkpoint-{start.step}"]
    assert operation > 20


def test_nothing_gets_its_name_before_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()  # inodes
    renamed: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noting_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def checking_rename(old: Path, new: Path) -> None:
        assert {path.stat().st_ino for path in [old, *Path(old).rglob("*")]} <= synced
        rename(old, new)
        renamed.append(Path(new).name)
        synced.discard(Path(new).parent.stat().st_ino)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", checking_rename)
    monkeypatch.setattr(os, "replace", checking_rename)
    save(tmp_path, 1)
    assert tmp_path.stat().st_ino in synced  # the new name too
    RunDirectory(tmp_path, MINE).finish(1.5)
    assert tmp_path.stat().st_ino in synced
    assert renamed == ["checkpoint-1", "run.json"]


def test_wherever_it_is_killed_a_run_that_begins_over_an_ended_one_takes_none_of_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    other = RunRecord(configuration={"train.learning_rate": 0.02})
    operation = 0
    alive = False
    while not alive:
        operation += 1
        directory = tmp_path / str(operation)
        begun(directory, 1, 2).finish(1.5)
        with killed_at(operation) as died:
            try:
                RunDirectory(directory, other).begin()
            except Killed:
                pass
            alive = not died()
        for record in (MINE, other):
            assert RunDirectory(directory, record).start(None) is None
    assert operation > 5


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    contents = set()
    operation = 0
    alive = False
    while not alive:
        operation += 1
        file.write_bytes(b"old")
        with killed_at(operation) as died:
            try:
                write_file(file, b"new")
            except Killed:
                pass
            alive = not died()
        contents.add(file.read_bytes())
    assert contents == {b"old", b"new"}


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path, 1, 2)
    before = names(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="Errno 28"):
        save(tmp_path, 3)
    with pytest.raises(OSError, match="Errno 28"):
        RunDirectory(tmp_path, MINE).finish(1.5)
    assert names(tmp_path) == before
    assert damage_of(tmp_path / "checkpoint-2") is None
    record = read_record(tmp_path)
    assert record is not None and not record.finished


@pytest.mark.parametrize(
    ("limit", "keep", "expected"),
    [(1, [], {30}), (2, [], {20, 30}), (None, [], {9, 10, 20, 30}), (0, [], {9, 10, 20, 30}), (1, [9], {9, 30})],
)
def test_the_newest_and_the_best_are_kept_by_number_and_what_claims_to_be_newer_goes(
    tmp_path: Path, limit: int | None, keep: list[int], expected: set[int]
) -> None:
    for step in (9, 10, 20, 30, 40):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / CHECKSUMS).touch()
    others = {"checkpoint-15", "checkpoint-50", "checkpoint-last"}  # another Trainer's
    for name in others:
        (tmp_path / name).mkdir()
    prune(tmp_path, 30, limit=limit, keep=keep)
    assert names(tmp_path) == others | {f"checkpoint-{step}" for step in expected}


def test_a_run_that_was_killed_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    start = begun(tmp_path, 2, 10).start(None)
    assert start is not None
    assert (start.checkpoint, start.step, start.of_steps) == (tmp_path / "checkpoint-10", 10, 9)
    assert (start.metrics, start.seconds) == ('{"step": 10}\n', 5.0)


@pytest.mark.parametrize("steps", [(), (2, 4)])
def test_a_run_that_has_ended_or_has_no_checkpoint_starts_at_its_beginning(
    tmp_path: Path, steps: tuple[int, ...]
) -> None:
    run = begun(tmp_path, *steps)
    if steps:
        run.finish(1.5)
    assert run.start(None) is None
    assert names(tmp_path) == {"run.json", *(f"checkpoint-{step}" for step in steps)}  # until it takes a step
    run.begin()
    assert names(tmp_path) == {"run.json"}


def test_damaged_checkpoints_are_named_and_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = begun(tmp_path, 2, 4, 6)
    flip(tmp_path / "checkpoint-6" / "part" / "weights", 3)
    (tmp_path / "checkpoint-4" / "run.json").unlink()
    start = run.start(None)
    assert start is not None
    assert start.step == 2
    assert [re.findall(r"\S*checkpoint-\d+|part/weights|run\.json", text) for text in caplog.messages] == [
        [f"{tmp_path}/checkpoint-6", "part/weights"],
        [f"{tmp_path}/checkpoint-4", "run.json"],
    ]
    flip(tmp_path / "checkpoint-2" / "trainer_state.json", 3)
    with pytest.raises(StartupError, match=r"checkpoint-6.*checkpoint-2.*--save-dir"):
        run.start(None)


@pytest.mark.parametrize("content", [None, b"", b'{"configuration": {"tr', b'{"configuration": 3}', b"\xff"])
def test_a_torn_or_missing_record_is_read_from_the_checkpoints(tmp_path: Path, content: bytes | None) -> None:
    run = begun(tmp_path, 2, 4)
    (tmp_path / "run.json").unlink()
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    start = run.start(None)
    assert start is not None and start.step == 4
    other = RunRecord(configuration={"train.learning_rate": 0.02})
    with pytest.raises(ConfigError, match=r"train.learning_rate"):
        RunDirectory(tmp_path, other).start(None)


def test_another_configuration_is_refused_with_the_keys_that_differ_and_what_to_do(tmp_path: Path) -> None:
    begun(tmp_path, 2)
    other = RunRecord(configuration={"train.learning_rate": 0.02, "lora.r": 4})
    with pytest.raises(ConfigError) as refused:
        refuse_another_run(tmp_path, other)
    assert str(refused.value) == (
        f"{tmp_path} holds a run that has not come to its end, with another configuration: lora.r (not set there, "
        "4 here), train.learning_rate (0.01 there, 0.02 here); start it as it was to go on with it, name another "
        f"--save-dir to keep it, or begin anew over it with --restart"
    )
    changed = MINE.model_copy(update={"facts": {"the rows of the data": "abd"}})
    with pytest.raises(ConfigError, match=r"the rows of the data .*abc.*abd"):
        RunDirectory(tmp_path, changed).start(None)
    assert names(tmp_path) == {"run.json", "checkpoint-2"}


def test_another_configuration_is_welcome_where_there_is_nothing_to_lose(tmp_path: Path) -> None:
    other = RunRecord(configuration={"train.learning_rate": 0.02})
    begun(tmp_path)
    assert RunDirectory(tmp_path, other).start(None) is None
    begun(tmp_path, 2).finish(1.5)
    assert RunDirectory(tmp_path, other).start(None) is None


def test_checkpoints_of_an_earlier_run_in_the_directory_are_not_taken(tmp_path: Path) -> None:
    begun(tmp_path, 2)
    save(tmp_path, 4, record=RunRecord(configuration={"train.learning_rate": 0.02}))
    start = RunDirectory(tmp_path, MINE).start(None)
    assert start is not None and start.step == 2


def test_checkpoints_of_others_are_neither_taken_nor_removed(tmp_path: Path) -> None:
    foreign = tmp_path / "checkpoint-7"
    foreign.mkdir()
    (foreign / "trainer_state.json").write_text('{"global_step": 7, "max_steps": 9}')
    with pytest.raises(StartupError, match=r"checkpoint-7\b.*\bchecksums\.json\b"):
        RunDirectory(tmp_path, MINE).start(None)
    start = RunDirectory(tmp_path, MINE).start(str(foreign))  # unless they are asked for
    assert start is not None
    assert (start.checkpoint, start.step, start.of_steps, start.metrics) == (foreign, 7, None, "")
    run = RunDirectory(tmp_path, MINE)
    assert run.start(False) is None  # or to begin anew
    run.begin()
    assert names(tmp_path) == {"run.json", "checkpoint-7"}


def test_what_the_user_asks_for_is_respected(tmp_path: Path) -> None:
    begun(tmp_path / "earlier", 2, 4).finish(1.5)
    asked = tmp_path / "earlier" / "checkpoint-2"
    mine = RunRecord(configuration={"train.learning_rate": 0.02})
    run = RunDirectory(tmp_path / "here", mine)
    start = run.start(str(asked))
    assert start is not None
    assert (start.checkpoint, start.of_steps) == (asked, None)
    run.begin()
    save(tmp_path / "here", 3, record=mine)
    start = RunDirectory(tmp_path / "here", mine).start(str(asked))  # the same command again: it goes on
    assert start is not None and start.step == 3
    start = RunDirectory(tmp_path / "earlier", mine).start(True)
    assert start is not None and start.step == 4
    assert RunDirectory(tmp_path / "here", mine).start(False) is None
    flip(asked / "part" / "weights", 0)
    with pytest.raises(StartupError, match=r"checkpoint-2\b.*\bpart/weights\b"):
        RunDirectory(tmp_path / "elsewhere", mine).start(str(asked))
    with pytest.raises(ConfigError, match="nowhere"):
        RunDirectory(tmp_path / "elsewhere", mine).start(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint.*--save-dir"):
        RunDirectory(tmp_path / "elsewhere", mine).start(True)


def test_a_directory_is_trained_into_by_one_process_at_a_time(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from zsl.training.directory.resume import held\n"
        "with held(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(StartupError, match=r"zsl-train .*--save-dir"), held(tmp_path / "out"):
            pass
        other.kill()
        other.wait(10)
    leftover = Path(tempfile.mkdtemp(prefix=".saving-", dir=tmp_path / "out"))
    (leftover / "half").touch()
    with held(tmp_path / "out"):  # its death gave it back, and what it was writing is gone
        assert not leftover.exists()


def test_a_directory_that_nothing_came_into_goes_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no trunk"), held(tmp_path / "runs" / "out"):
        raise ValueError("no trunk")
    assert not (tmp_path / "runs" / "out").exists()
    with held(tmp_path / "runs" / "out"):
        (tmp_path / "runs" / "out" / "run.json").touch()
    assert names(tmp_path / "runs" / "out") == {".lock", "run.json"}


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match=r"file/out .*Not a directory.*--save-dir"):
        with held(tmp_path / "file" / "out"):
            pass


def test_what_the_numbers_do_not_depend_on_may_change() -> None:
    tables: dict[str, dict[str, Any]] = {
        "trunk": {"endpoint": "a:1", "request_timeout_seconds": 1.0},
        "train": {"output_dir": "a", "logging_steps": 1, "save_steps": 5, "report_to": "none", "max_steps": 3},
    }
    one = RunRecord(configuration=configuration_of(TrainConfig.model_validate(tables)))
    assert "trunk.mode" in one.configuration
    assert {key for key in one.configuration if key.startswith("train")} == {"train.max_steps"}
    tables = {
        "train": {"output_dir": "b", "max_steps": 3.0, "resume_from_checkpoint": True, "logging_first_step": True}
    }
    another = RunRecord(configuration=configuration_of(TrainConfig.model_validate(tables)))
    assert one.differences(another) == []


def test_a_record_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    values = {"a": float("inf"), "b": 1e-4, "c": ["q", {"d": None}], "e": True, "f": "ü", "g": -float("inf")}
    record = RunRecord(configuration=values, facts={"x": "y"}, seconds=0.1)
    RunDirectory(tmp_path, record).begin()
    assert read_record(tmp_path) == record
