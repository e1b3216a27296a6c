"""Read the free memory of the machine or container from Linux's files."""

from __future__ import annotations

from pathlib import Path


def free_bytes(root: Path = Path("/")) -> int | None:
    """Return the bytes that new work can have without swapping, in the machine or its container; None if unknown."""
    free = []
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) << 10)
        group = root / "sys/fs/cgroup"
        most = (group / "memory.max").read_text().strip()
        if most != "max":
            free.append(int(most) - int((group / "memory.current").read_text()) + _cached_bytes(group))
    except (OSError, ValueError):
        pass  # no Linux, or no container
    return min(free, default=None)


def _cached_bytes(group: Path) -> int:
    """Return the bytes of a container's file cache that can be reclaimed."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
