"""Lock a run's directory, and find the checkpoint to resume an interrupted run from.

Imports no torch.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from zsl.errors import ConfigError, StartupError
from zsl.files.durable import remove_leftovers, remove_tree, write_file
from zsl.training.directory.checkpoints import CHECKSUMS, checkpoints_in, damage_of, own_checkpoints_in
from zsl.training.directory.record import RECORD, RunRecord, as_bytes, read_record

METRICS_FILE = "metrics.jsonl"
LOCK = ".lock"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """The checkpoint that a training resumes from, and the run's state at that step."""

    checkpoint: Path
    step: int
    of_steps: int | None  # None for a checkpoint of another run
    metrics: str  # lines of `metrics.jsonl`
    seconds: float
    best: Path | None  # the checkpoint with the lowest validation loss, if the run keeps the best
    stopped: bool  # the training stopped at this step
    validations_without_gain: int  # early stopping's counter
    differences: Sequence[str]  # between its configuration and the resuming run's, in words

    @property
    def is_the_end(self) -> bool:
        """True if all steps are done, and only the adapters remain to be saved."""
        return self.of_steps is not None and (self.stopped or self.step == self.of_steps)


class RunDirectory:
    """The directory `path` of the run of `record`, with `run.json`, `metrics.jsonl` and checkpoints.

    `last_checkpoint` is the one from which the same command would resume. `record` has the `run` id of the checkpoint
    that a run resumes from.
    """

    def __init__(self, path: Path, record: RunRecord) -> None:
        self.path = path
        self.last_checkpoint: Path | None = None
        self.record = record
        self._begun = False
        self._goes_on = True

    @property
    def holds_a_finished_run(self) -> bool:
        """True if the record in the directory is of a finished run."""
        there = read_record(self.path)
        return there is not None and there.finished

    def start(self, asked: str | bool | None) -> Start | None:
        """Find the checkpoint to resume from; None for step 0. `asked` is `train.resume_from_checkpoint`.

        Warns of damaged checkpoints. Raises `ConfigError` if the directory holds another, unfinished run,
        `StartupError` if all its checkpoints are damaged.
        """
        if asked is False:
            self._goes_on = False
            return None
        if asked is True:
            checkpoint = self._newest_whole()
            if checkpoint is None:
                raise ConfigError(
                    f"train.resume_from_checkpoint = true (--resume), but {self.path} holds no checkpoint: "
                    "leave that out to begin at step 0, or name the run's directory with --save-dir"
                )
        else:
            checkpoint = self._newest_of_this_run(or_fail=asked is None)
            if checkpoint is None and asked is not None:
                checkpoint = _checked(Path(asked))
        self.last_checkpoint = checkpoint
        return self._start_at(checkpoint) if checkpoint is not None else None

    def begin(self) -> None:
        """Claim the directory for this run at its first step. Idempotent. Raises `OSError`."""
        if self._begun:
            return
        if self.last_checkpoint is None:
            for checkpoint in own_checkpoints_in(self.path):
                remove_tree(checkpoint)
        write_file(self.path / RECORD, as_bytes(self.record))
        self._begun = True

    def finish(self, seconds: float) -> None:
        """Mark the run as finished, so that the same command begins a new one. Raises `OSError`."""
        ended = self.record.model_copy(update={"finished": True, "seconds": seconds})
        write_file(self.path / RECORD, as_bytes(ended))

    def add_to(self, checkpoint: Path, *, metrics: str, seconds: float) -> None:
        """Add the metrics and the record to a checkpoint, for a later `Start`. Raises `OSError`."""
        (checkpoint / METRICS_FILE).write_text(metrics, encoding="utf-8")
        (checkpoint / RECORD).write_bytes(as_bytes(self.record.model_copy(update={"seconds": seconds})))

    def made(self, checkpoint: Path) -> None:
        """Note that a checkpoint is complete."""
        if self._goes_on:
            self.last_checkpoint = checkpoint

    def _newest_of_this_run(self, *, or_fail: bool) -> Path | None:
        """Return the newest intact checkpoint of this run, if the directory holds no finished run."""
        if self.holds_a_finished_run:
            return None
        if or_fail:
            refuse_another_run(self.path, self.record)
        return self._newest_whole(of_this_run=True, or_fail=or_fail)

    def _newest_whole(self, *, of_this_run: bool = False, or_fail: bool = True) -> Path | None:
        damages = []
        for checkpoint in checkpoints_in(self.path):
            damage = damage_of(checkpoint)
            if damage is not None:
                damages.append(f"{checkpoint.name}: {damage}")
                logger.warning("%s is left out, it is damaged: %s", checkpoint, damage)
            elif not of_this_run or self._is_of_this_run(read_record(checkpoint)):
                return checkpoint
        if damages and or_fail:
            raise StartupError(
                f"{self.path} holds no whole checkpoint to go on from ({'; '.join(damages)}); "
                "delete them to begin anew, or name another --save-dir"
            )
        return None

    def _start_at(self, checkpoint: Path) -> Start:
        try:
            state = json.loads((checkpoint / "trainer_state.json").read_bytes())
            step, of_steps = int(state["global_step"]), int(state["max_steps"])
            best = state.get("best_model_checkpoint")
            callbacks = state.get("stateful_callbacks", {})
            stopped = bool(callbacks["TrainerControl"]["args"]["should_training_stop"]) if callbacks else False
            early = callbacks.get("EarlyStoppingCallback")
            without_gain = int(early["attributes"]["early_stopping_patience_counter"]) if early else 0
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "its trainer_state.json names no step"
            raise ConfigError(f"{checkpoint} cannot be resumed from: {reason}") from error
        metrics, record = checkpoint / METRICS_FILE, read_record(checkpoint)
        goes_on = self._is_of_this_run(record)
        if record is not None:
            if of_another_model := record.model_differences(self.record):
                raise ConfigError(f"{checkpoint} holds adapters of another model: {', '.join(of_another_model)}")
            if goes_on:
                self.record = self.record.model_copy(update={"run": record.run})
        return Start(
            checkpoint,
            step,
            of_steps if goes_on else None,
            metrics.read_text(encoding="utf-8") if metrics.is_file() else "",
            record.seconds if record else 0.0,
            checkpoint.with_name(Path(best).name) if best else None,
            stopped,
            without_gain if goes_on else 0,
            record.differences(self.record) if record else (),
        )

    def _is_of_this_run(self, record: RunRecord | None) -> bool:
        return record is not None and not record.differences(self.record)


def refuse_another_run(directory: Path, here: RunRecord) -> None:
    """Raise `ConfigError` if the directory holds checkpoints of an unfinished run other than that of `here`."""
    records = [read_record(directory), *(read_record(checkpoint) for checkpoint in checkpoints_in(directory))]
    there = next((record for record in records if record is not None), None)
    if len(records) == 1 or there is None or there.finished:
        return  # no checkpoint that a new run would remove, or no record to compare
    if differences := there.differences(here):
        raise ConfigError(
            f"{directory} holds a run that has not come to its end, with another configuration: "
            f"{', '.join(differences)}; start it as it was to go on with it, "
            "name another --save-dir to keep it, or begin anew over it with --restart"
        )


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Make a directory and lock it against other training processes. Raises `StartupError`."""
    new = [path for path in (directory, *directory.parents) if not os.path.lexists(path)]
    with ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((directory / LOCK).open("wb"))
        except OSError as error:
            raise StartupError(f"{directory} cannot be written: {error.strerror}; name another --save-dir") from error
        try:
            # The kernel releases it when the process ends. `filelock` uses flock, which the workers of a DataLoader
            # inherit: one that outlives a killed training would keep the lock.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise StartupError(
                    f"another zsl-train trains into {directory} now; wait for it, or name another --save-dir"
                ) from None
            logger.warning("%s: no lock can be had there (%s): let only one zsl-train write there", directory, error)
        remove_leftovers(directory)
        try:
            yield
        finally:
            if new and [path.name for path in directory.glob("*")] == [LOCK]:
                shutil.rmtree(directory, ignore_errors=True)  # the run wrote no file
                with suppress(OSError):  # a parent may hold another run by now
                    for parent in new[1:]:
                        parent.rmdir()


def _checked(asked: Path) -> Path:
    """Return the requested checkpoint. Raises `StartupError` if it is damaged; other programs' have no checksums."""
    damage = damage_of(asked) if (asked / CHECKSUMS).exists() else None
    if damage is not None:
        raise StartupError(f"train.resume_from_checkpoint = {str(asked)!r} is damaged: {damage}")
    return asked
