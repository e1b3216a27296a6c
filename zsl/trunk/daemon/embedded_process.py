"""Main function of an embedded trunk's process: serve as its first line of input says, until its parent ends.

Writes JSON lines to standard output: the log, and one that says that it is ready, or why it is not.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from zsl.errors import EXIT_STARTUP_FAILED
from zsl.trunk.daemon.log import set_up_logging
from zsl.trunk.malloc import keep_freed_memory
from zsl.trunk.openmp import limit_spinning

PARENT_SECONDS = 1.0  # interval of looking for the parent


def main() -> None:
    """Serve until the parent process ends or kills this one."""
    keep_freed_memory()
    given = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with, args=(given["parent"], given["keys"]), name="zsl-parent", daemon=True).start()
    set_up_logging("json", debug=False)
    limit_spinning(os.environ)
    try:
        _serve(given)
    except Exception as error:
        print(json.dumps({"event": "failed", "error": type(error).__name__, "text": str(error)}), flush=True)
        sys.exit(EXIT_STARTUP_FAILED)


def _serve(given: dict[str, Any]) -> None:
    from zsl.split.cut import parse_cut

    cut = None if given["cut"] is None else parse_cut(given["cut"])  # a mistake is told before the slow imports

    import torch
    from transformers.utils.logging import disable_progress_bar

    from zsl.trunk.access.options import read_access
    from zsl.trunk.costs import BatchLimits
    from zsl.trunk.daemon.process import DaemonOptions, run_daemon
    from zsl.trunk.failpoints import Failpoint
    from zsl.trunk.settings import ServerSettings

    disable_progress_bar()
    keys = Path(given["keys"])
    # One client: there are no requests to merge, so the batch sizes need no measuring.
    limits = {} if given["deterministic"] else asdict(BatchLimits())
    run_daemon(
        DaemonOptions(
            model=given["model"],
            cut=cut,
            host="127.0.0.1",
            port=0,
            dtype=getattr(torch, given["dtype"]),
            quantize=None,
            device="cpu",
            threads=None,
            forward_only=False,
            reveals=(),
            settings=ServerSettings(),
            max_batch_tokens=limits.get("max_batch_tokens"),
            merge_below_tokens=limits.get("merge_below_tokens"),
            deterministic=given["deterministic"],
            access=read_access(keys, keys / "tenants.toml"),
            failpoint=Failpoint(),
            log_format="json",
        )
    )


def _end_with(parent: int, keys: str) -> NoReturn:
    """End this process when its parent has: at the end of the input, or if another process still holds that open.

    Removes the directory of the keys, which the parent could not.
    """
    while os.getppid() == parent:
        readable, _, _ = select.select([sys.stdin], [], [], PARENT_SECONDS)
        if readable and not os.read(sys.stdin.fileno(), 1):
            break
    shutil.rmtree(keys, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)  # with processes that this one has started, which convert a model's file
    os._exit(0)
