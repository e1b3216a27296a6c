"""Status report of a daemon for `zsl info`, as text rows and as JSON. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from pydantic import ByteSize

from zsl.errors import ZslError
from zsl.link.status_client import StatusClient
from zsl.text.plural import counted
from zsl.transport.curve_keys import ClientKeys
from zsl.wire.messages import AdapterLimits, FloatDtypeName, Status, Welcome

ROUND_TRIPS = 5
_OF_SESSION = ("packs", "deterministic", "adapters", "reveals", "limits")  # what only a WELCOME says
DIGEST_CHARACTERS = 12  # of a digest that people compare
DTYPE_WORDS: dict[FloatDtypeName, str] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Serving:
    """Answers of one daemon. Without a `welcome`, `refusal` is why it accepts no new session."""

    endpoint: str
    status: Status
    round_trip_seconds: float
    welcome: Welcome | None
    refusal: ZslError | None

    def rows(self) -> list[tuple[str, str]]:
        """Return names and values, with units."""
        status, model = self.status, self.status.model
        rows = [
            ("endpoint", self.endpoint),
            ("state", "takes sessions" if self.refusal is None else f"takes no new session: {self.refusal}"),
            ("model", f"{model.model_type}, {counted(model.layers, 'layer')}, hidden size {model.hidden_size:,}"),
            ("weights", model.weights_digest[:DIGEST_CHARACTERS]),
            ("configuration", model.config_digest[:DIGEST_CHARACTERS]),
            ("cut", f"{status.cut} ({status.cut.stop - status.cut.start} of {counted(model.layers, 'layer')})"),
            ("trunk", f"{counted(status.trunk_parameters, 'parameter')} in {trunk_dtype(status)}"),
            ("gradient", "none: it serves forward only" if status.forward_only else "exact: forward and backward"),
        ]
        if self.welcome is not None:
            limits = self.welcome.limits
            requests = counted(limits.max_inflight_requests, "request")
            tokens = counted(limits.max_request_tokens, "token")
            rows += [
                ("deterministic", "yes" if self.welcome.deterministic else "no"),
                ("packs", "yes" if self.welcome.packs else "no"),
                ("adapters", _adapters(self.welcome.adapters)),
                ("reveals", ", ".join(self.welcome.reveals).replace("_", " ") or "nothing inside the trunk"),
                ("row", f"up to {counted(limits.max_row_tokens, 'token')}"),
                ("request", f"up to {tokens}, {in_units(limits.max_message_bytes)} a tensor"),
                ("in flight", f"up to {requests}, {in_units(limits.max_inflight_bytes)} a session"),
                ("lease", f"{limits.lease_ms / 1000:g} s"),
            ]
        return [
            *rows,
            ("sessions", f"{status.sessions:,}"),
            ("queued", counted(status.queued_requests, "request")),
            (
                "held",
                (
                    f"{in_units(status.held_bytes)} for pending backwards, {in_units(status.adapter_bytes)} for "
                    f"adapters, {in_units(status.cache_bytes)} for generations"
                ),
            ),
            ("round trip", f"{self.round_trip_seconds * 1000:.2f} ms"),
            ("software", f"zsl {status.software}"),
            ("lifetime", status.epoch.hex()),
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the same for programs: whole digests and ids in hex, numbers in the units of their names."""
        session = {} if self.welcome is None else self.welcome.model_dump(include=set(_OF_SESSION))
        return {
            "endpoint": self.endpoint,
            "takes_sessions": self.refusal is None,
            **({} if self.refusal is None else {"refusal": str(self.refusal)}),
            **self.status.model_dump(exclude={"request", "epoch"}),
            **session,
            "epoch": self.status.epoch.hex(),
            "round_trip_seconds": self.round_trip_seconds,
        }


def trunk_dtype(status: Status) -> str:
    """Return the dtype of the trunk's computation, and the bits of its linear layers if they are quantized."""
    dtype = DTYPE_WORDS[status.dtype]
    return dtype if status.quantization is None else f"{dtype}, linear layers in {status.quantization}"


def _adapters(limits: AdapterLimits | None) -> str:
    if limits is None:
        return "none in the trunk's layers"
    return f"in the trunk's layers, up to rank {limits.max_rank} and {in_units(limits.max_bytes)}"


def ask(endpoint: str, keys: ClientKeys | None) -> Serving:
    """Ask the daemon at `endpoint`, even if it accepts no session. Raises `ZslError` if it does not answer."""
    with StatusClient(endpoint, keys) as client:
        status = client.status()  # before this client opens a session of its own
        seconds = median(client.round_trip_seconds(ROUND_TRIPS))
        try:
            return Serving(endpoint, status, seconds, client.welcome(), None)
        except ZslError as refusal:
            return Serving(endpoint, status, seconds, None, refusal)


def in_units(nbytes: int) -> str:
    """Return a number of bytes with a unit."""
    return ByteSize(nbytes).human_readable(separator=" ")
