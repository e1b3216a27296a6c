"""Processes that are there at once: forked from a server that has imported torch and what clients and trunks need."""

from __future__ import annotations

import multiprocessing
import os
import sys
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from unittest.mock import patch

IMPORTED = ("support.merged_client", "zsl.client.model", "zsl.trunk.daemon.embedded", "zsl.trunk.daemon.load")


@cache
def forks(*imported: str) -> ForkServerContext:
    """Start the server, which imports these modules too, at the first call of this process.

    It leaves out a module that it does not find, silently, and looks for them in its environment's PYTHONPATH alone.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED, *imported])
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    return context
