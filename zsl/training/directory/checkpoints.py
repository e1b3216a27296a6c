"""Write checkpoint directories atomically, verify their checksums, list and remove them.

`checksums.json` in each `checkpoint-N` has a digest of every file; Trainer reads their content. Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from pathlib import Path

import xxhash

from zsl.files.durable import remove_tree, sync, sync_tree

CHECKSUMS = "checksums.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step of a checkpoint, from its name; -1 for another directory."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def checkpoints_in(directory: Path) -> list[Path]:
    """Return the checkpoints in a directory, damaged ones too, the newest first."""
    found = [path for path in directory.glob("checkpoint-*") if step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def own_checkpoints_in(directory: Path) -> list[Path]:
    """Return the checkpoints that zsl has made; others must not be removed."""
    return [checkpoint for checkpoint in checkpoints_in(directory) if (checkpoint / CHECKSUMS).exists()]


def put_in_place(written: Path, place: Path) -> None:
    """Add checksums to a checkpoint in a temporary directory, sync it to disk, and move it to `place`.

    Raises `OSError`.
    """
    files = sorted(path for path in written.rglob("*") if path.is_file())
    sums = {file.relative_to(written).as_posix(): checksum(file) for file in files}
    (written / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
    sync_tree(written)
    if place.exists():
        remove_tree(place)  # it was damaged, and the run has reached this step again
    os.rename(written, place)
    sync(place.parent)


def damage_of(checkpoint: Path) -> str | None:
    """Return the reason why a checkpoint is unusable; None if it is intact."""
    try:
        sums = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
        if not sums:
            return f"{CHECKSUMS} is empty"
        for name, expected in sums.items():
            if checksum(checkpoint / name) != expected:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or CHECKSUMS).name}: {error.strerror}"
    except (ValueError, AttributeError, TypeError):
        return f"{CHECKSUMS} is not as it was written"
    return None


def prune(directory: Path, newest: int, *, limit: int | None, keep: Collection[int] = ()) -> None:
    """Remove old checkpoints, now that the one of step `newest` is complete.

    Keeps the newest `limit`, and those of the steps in `keep`. Checkpoints of later steps are removed too: they are
    damaged, or another run's. Raises `OSError`.
    """
    found = own_checkpoints_in(directory)
    until_now = [path for path in found if step_of(path) <= newest]
    stay = until_now[:limit] if limit is not None and limit > 0 else until_now
    for path in found:
        if path not in stay and step_of(path) not in keep:
            remove_tree(path)


def checksum(file: Path) -> str:
    """Return a digest of a file's content. Raises `OSError`."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
