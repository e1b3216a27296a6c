"""The directories `checkpoint-N` of a run: there whole or not at all, and known to be whole when they are read.

`checksums.json` in each says what its files hold. What they mean is Trainer's business. Knows no torch.
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
    """The optimizer step after which a checkpoint was made; -1 for a directory that is none."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoints of a directory, whole or not, the newest first."""
    found = [path for path in directory.glob("checkpoint-*") if step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def own_checkpoints_in(directory: Path) -> list[Path]:
    """Those that zsl has made: what another Trainer left is not ours to remove."""
    return [checkpoint for checkpoint in checkpoints_in(directory) if (checkpoint / CHECKSUMS).exists()]


def put_in_place(written: Path, place: Path) -> None:
    """Give a checkpoint that was written aside its checksums, bring it to the disk and move it to its place.

    Raises `OSError`.
    """
    files = sorted(path for path in written.rglob("*") if path.is_file())
    sums = {file.relative_to(written).as_posix(): checksum(file) for file in files}
    (written / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
    sync_tree(written)
    if place.exists():
        remove_tree(place)  # a run that could not go on from it has come here again
    os.rename(written, place)
    sync(place.parent)


def damage_of(checkpoint: Path) -> str | None:
    """What makes a checkpoint unusable, in a few words; None if it is as it was written."""
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
    """Remove the checkpoints that the one of step `newest`, which is at its place now, makes superfluous.

    The newest `limit` stay, and those of the steps in `keep`. What claims to be newer was damaged, or is of another
    run. Raises `OSError`.
    """
    found = own_checkpoints_in(directory)
    until_now = [path for path in found if step_of(path) <= newest]
    stay = until_now[:limit] if limit is not None and limit > 0 else until_now
    for path in found:
        if path not in stay and step_of(path) not in keep:
            remove_tree(path)


def checksum(file: Path) -> str:
    """A digest of a file's content. Raises `OSError`."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
