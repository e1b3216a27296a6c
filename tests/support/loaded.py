"""The command `zsl` in a process of its own, and what that has loaded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence


def zsl_and_what_it_loads(arguments: Sequence[str], modules: set[str]) -> tuple[str, set[str]]:
    """Run `zsl`; return its output, and those of these modules that it loaded."""
    script = (
        "import sys\n"
        "from zsl.cli.zsl import zsl\n"
        f"try:\n    zsl({list(arguments)!r})\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        f"print(*({modules!r} & sys.modules.keys()))"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr
    printed, _, loaded = finished.stdout.removesuffix("\n").rpartition("\n")
    return printed, set(loaded.split())
