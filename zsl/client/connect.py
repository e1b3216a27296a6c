"""Connect a `RemoteTrunk`: at its first use, once in a process, and compare the daemon with the client's model."""

from __future__ import annotations

import os
import threading
import warnings
from typing import Any, Literal, NamedTuple, Self

import torch

from zsl.client.trunk_client import TrunkClient
from zsl.errors import WrongModelError
from zsl.link.connection import after_fork
from zsl.wire.messages import Cut, ModelIdentity, Quantization, Welcome
from zsl.wire.tensors import TORCH_DTYPES, float_wire_name

GradientMode = Literal["exact", "straight-through", "none"]


class Wanted(NamedTuple):
    """Model and cut to connect for (None: any), and dtype of its activations."""

    model: ModelIdentity | None = None
    cut: Cut | None = None
    dtype: torch.dtype = torch.float32


class LazyClient:
    """Client that connects when it is first used. `client` is None until then. Thread-safe.

    A deep copy shares the connection; an unpickled one connects again, as it belongs to its process.
    """

    def __init__(self, endpoint: str, **how: Any) -> None:
        self._endpoint = endpoint
        self._how = how
        self._connecting = threading.Lock()
        self._pid: int | None = None  # of the process that first connected, or began to
        self.wanted = Wanted()
        self.client: TrunkClient | None = None

    def connected(self, wire_dtype: torch.dtype | None) -> TrunkClient:
        """Return the client with an open session, connecting if needed. Raises `ClosedError` in a forked child."""
        this_process = os.getpid()
        if self._pid is None:
            self._pid = this_process
        elif self._pid != this_process and self.client is None:  # the lock may have been copied locked
            raise after_fork(self._endpoint, self._pid)
        with self._connecting:
            if self.client is None:
                model, cut, dtype = self.wanted
                wire_name = float_wire_name(wire_dtype or dtype)
                client = TrunkClient(self._endpoint, model=model, cut=cut, dtype=wire_name, **self._how)
                try:
                    client.connect()
                except BaseException:
                    client.close()
                    raise
                self.client = client
            return self.client

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self).__new__(type(self))
        copied.__setstate__({**self.__getstate__(), "client": self.client})
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "client": None, "_pid": None, "_connecting": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connecting = threading.Lock()


def compare(
    welcome: Welcome,
    endpoint: str,
    *,
    connected_for: Wanted,
    wanted: Wanted,
    mode: GradientMode,
    deterministic: Literal["packed"] | None,
    quantize: Quantization | None,
) -> None:
    """Compare a daemon with the model that it is wanted for, and warn the caller's caller of differences.

    Raises `WrongModelError` if the daemon is not deterministic, or the session is for another model or cut.
    """
    if deterministic and not welcome.deterministic:
        raise WrongModelError(
            f"the trunk at {endpoint} is not deterministic; start it with --deterministic {deterministic}, or leave "
            "out deterministic"
        )
    if connected_for != wanted:
        fits = wanted.model in (None, welcome.model) and wanted.cut in (None, welcome.cut)
        if not fits:
            raise WrongModelError(
                f"this RemoteTrunk is connected for another model or cut ({welcome.model.model_type}, "
                f"{welcome.cut}); make a RemoteTrunk of its own for each"
            )
    warned = []
    if welcome.forward_only and mode == "exact":
        warned.append(
            f"the trunk at {endpoint} serves forward only: mode 'none' is in force, and everything in front of the "
            "trunk learns nothing"
        )
    elif mode == "none":
        warned.append("mode is 'none': no gradient passes the trunk, and everything in front of it learns nothing")
    if TORCH_DTYPES[welcome.dtype] != wanted.dtype:
        warned.append(
            f"the trunk at {endpoint} computes in {TORCH_DTYPES[welcome.dtype]}, this model in {wanted.dtype}: "
            "losses will differ from the local model's"
        )
    if welcome.quantization not in (None, quantize):
        warned.append(
            f"the linear layers of the trunk at {endpoint} are in {welcome.quantization}, those of this model "
            f"{'are not quantized' if quantize is None else f'in {quantize}'}: losses will differ from the local "
            "model's"
        )
    for text in warned:
        warnings.warn(text, stacklevel=3)
