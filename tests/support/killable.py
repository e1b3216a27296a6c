"""A trunk server in a process that is there at once, as it is forked from one with torch, and can be killed."""

from __future__ import annotations

import signal
from multiprocessing.connection import Connection

import torch

from .embedded import served
from .forks import forks

START_SECONDS = 240.0  # the first waits for the imports


def _serve(path: str, telling: Connection) -> None:
    torch.set_num_threads(1)
    with served(path) as endpoint:
        telling.send(endpoint)
        signal.pause()


class Killable:
    """Serves the trunk of a checkpoint until `kill`."""

    def __init__(self, path: str) -> None:
        hearing, telling = forks().Pipe(duplex=False)
        self._process = forks().Process(target=_serve, args=(path, telling), daemon=True)
        self._process.start()
        with hearing:
            assert hearing.poll(START_SECONDS), "the server did not start"
            self.port = int(hearing.recv().rpartition(":")[2])

    def kill(self) -> None:
        self._process.kill()
        self._process.join(START_SECONDS)
