"""A trunk without torch whose gradient depends on its input: it squares, so a wrong stash gives a wrong gradient.

`SquareTrunk` computes; `SquareClient` is the client's side on the real connection; `python -m support.square` serves it
in a process of its own (`SquareDaemon`).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

import zsl.trunk.daemon.server
from zsl.link.connection import Connection
from zsl.link.keys import read_client_keys
from zsl.link.open_session import Open
from zsl.link.unanswered_requests import Pending
from zsl.trunk.access.options import Access, read_access
from zsl.trunk.daemon.log import set_up_logging
from zsl.trunk.daemon.server import TrunkServer
from zsl.trunk.failpoints import failpoint_from
from zsl.trunk.settings import ServerSettings, TrunkInfo, TrunkTraits
from zsl.trunk.work import Batch, Done, Keep, Kind, Outcome, Work
from zsl.wire.frames import Frame, Message
from zsl.wire.messages import Backward, Forward, Header, Result, TensorDescriptor, Welcome

from .daemon import Daemon
from .echo import CUT, HIDDEN, IDENTITY, NO_ADAPTER, ROW_TOKENS, TRAITS, EchoServer

Array = np.ndarray[Any, np.dtype[np.float32]]

COMMAND = [sys.executable, "-m", "support.square"]
TESTS = Path(__file__).parent.parent


def squared(x: Array) -> Array:
    return x * x


def gradient(x: Array, gradients: Array) -> Array:
    return 2 * x * gradients


@dataclass(frozen=True, slots=True)
class SquareStash:
    x: Array
    keep: Keep = Keep.INPUT

    @property
    def nbytes(self) -> int:
        return self.x.nbytes

    def demoted(self) -> None:
        return None

    def drop(self) -> None:
        pass


class SquareTrunk:
    """Squares activations."""

    traits: TrunkTraits = replace(TRAITS, deterministic=True)

    def run(self, batch: Batch) -> list[Outcome]:
        return [self._one(work) for work in batch.works]

    def _one(self, work: Work) -> Outcome:
        role = "activations" if work.kind is Kind.FORWARD else "gradients"
        if work.stash is not None:
            assert isinstance(work.stash, SquareStash)
            x = work.stash.x
        else:
            x = np.frombuffer(work.buffers["activations"][1], dtype=np.float32).copy()
        if work.kind is Kind.FORWARD:
            answer = squared(x)
        else:
            answer = gradient(x, np.frombuffer(work.buffers["gradients"][1], dtype=np.float32))
        stash = None if work.keep is Keep.NOTHING else SquareStash(x)
        return Done({role: (work.buffers[role][0], answer.data.cast("B"))}, stash)  # type: ignore[index, dict-item]


class SquareClient:
    """Forward and backward of a `SquareTrunk`, by hand; `step` is both."""

    def __init__(
        self,
        endpoint: str,
        *,
        server_key: str | None = None,
        client_key: str | Path | None = None,
        connect_timeout_seconds: float = 20,
        request_timeout_seconds: float = 20,
    ) -> None:
        self.connection = Connection(
            endpoint,
            keys=read_client_keys(server_key, client_key),
            connect_timeout_seconds=connect_timeout_seconds,
            request_timeout_seconds=request_timeout_seconds,
        )

    def connect(self) -> Welcome:
        return self.connection.open(IDENTITY, CUT, "f32")

    def forward(self, x: Array) -> tuple[Array, int]:
        """The square of `x` `[tokens, HIDDEN]`, and the step that its backward names."""
        request = self.connection.new_request_id()

        def build(welcome: Welcome, pending: Pending) -> tuple[Header, Sequence[Frame]]:
            fields = self.fields(welcome, pending)
            fields |= {"adapter": None, "keep": True, "reveal": [], "cache": None}
            return Forward(**fields, tensors=[_descriptor("activations", x)]), [_bytes(x)]

        return _array(self.connection.call(request, build, nbytes=x.nbytes)), request

    def backward(self, step: int, x: Array, gradients: Array) -> Array:
        """The gradient at `x`."""
        request = self.connection.new_request_id()

        def build(welcome: Welcome, pending: Pending) -> tuple[Header, Sequence[Frame]]:
            named = {"activations": x, "gradients": gradients} if pending.complete else {"gradients": gradients}
            tensors = [_descriptor(role, array) for role, array in named.items()]
            header = Backward(**self.fields(welcome, pending), **NO_ADAPTER, step=step, tensors=tensors)
            return header, [_bytes(array) for array in named.values()]

        return _array(self.connection.call(request, build, nbytes=gradients.nbytes))

    def step(self, x: Array, gradients: Array) -> tuple[Array, Array]:
        output, step = self.forward(x)
        return output, self.backward(step, x, gradients)

    def is_right(self, x: Array, gradients: Array) -> bool:
        """Return whether a step gives the exact output and gradient."""
        output, at_input = self.step(x, gradients)
        return np.array_equal(output, squared(x)) and np.array_equal(at_input, gradient(x, gradients))

    def wait_for_answers(self, seconds: float) -> None:
        """From now on, so long at the most."""
        self.connection.request_timeout_seconds = seconds

    @property
    def is_open(self) -> bool:
        """True while a session is open."""
        link = self.connection.link
        return link is not None and isinstance(link.state, Open)

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.connection.close()

    def fields(self, welcome: Welcome, pending: Pending) -> dict[str, Any]:
        return {
            "session": welcome.session,
            "epoch": welcome.epoch,
            "request": pending.request,
            "attempt": pending.attempt,
            "budget_ms": pending.budget_ms(),
        }


def some(seed: int, tokens: int = 2) -> Array:
    """Random values `[tokens, HIDDEN]`."""
    return np.random.default_rng(seed).standard_normal((tokens, HIDDEN)).astype(np.float32)


def _descriptor(role: str, array: Array) -> TensorDescriptor:
    return TensorDescriptor(role=role, dtype="f32", shape=(1, *array.shape), nbytes=array.nbytes)  # type: ignore[arg-type]


def _bytes(array: Array) -> memoryview:
    return array.data.cast("B")


def _array(message: Message) -> Array:
    assert isinstance(message.header, Result)
    return np.frombuffer(message.buffers[0], dtype=np.float32).reshape(-1, HIDDEN)


class SquareServer(EchoServer):
    """A `SquareTrunk`, served from a thread of this process."""

    def __init__(self, **how: Any) -> None:
        super().__init__(compute=SquareTrunk(), deterministic=True, **how)


class SquareDaemon(Daemon):
    """A `SquareTrunk` in a process of its own, with the settings given, as `Daemon` starts and ends it."""

    def __init__(
        self,
        *,
        log: Path,
        port: int = 0,
        environment: dict[str, str] | None = None,
        keys: Path | None = None,
        tenants: Path | None = None,
        **settings: float,
    ) -> None:
        access = [str(path) for path in (keys, tenants) if path is not None]
        paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        super().__init__(
            log=log,
            environment={"PYTHONPATH": paths, **(environment or {})},
            command=[*COMMAND, str(port), json.dumps(settings), *access],
        )


async def _serve(port: int, settings: dict[str, Any], access: Access | None) -> None:
    if "ZSL_TEST_LAST_PASS_SECONDS" in os.environ:
        zsl.trunk.daemon.server.LAST_PASS_SECONDS = float(os.environ["ZSL_TEST_LAST_PASS_SECONDS"])
    server = TrunkServer(
        TrunkInfo(IDENTITY, CUT, "f32", False, ROW_TOKENS),
        ServerSettings(**settings),
        access=access,
        failpoint=failpoint_from(os.environ),
    )
    endpoint = server.bind("127.0.0.1", port)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.drain)
    print(json.dumps({"event": "ready", "endpoint": endpoint}), flush=True)
    await server.run(SquareTrunk())


if __name__ == "__main__":
    set_up_logging("json", debug=False)
    keys, tenants = (Path(path) for path in sys.argv[3:]) if sys.argv[3:] else (None, None)
    asyncio.run(_serve(int(sys.argv[1]), json.loads(sys.argv[2]), read_access(keys, tenants)))
