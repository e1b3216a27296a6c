"""Run the checks of `zsl doctor` in order, each with the findings of earlier ones.

A check's libraries are imported when it runs, so that a missing or broken library fails only that check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from zsl.client.doctor.check import Check, State, attempt
from zsl.client.doctor.machine import check_hub, check_keys, check_torch, check_zmq
from zsl.errors import ConfigError
from zsl.link.endpoints import parse_endpoints
from zsl.link.keys import read_client_keys
from zsl.link.status_client import StatusClient
from zsl.wire.messages import Cut, FloatDtypeName, ModelIdentity, Status

if TYPE_CHECKING:
    from zsl.client.trunk_client import TrunkClient
    from zsl.models.reference import ModelReference

REQUEST_TIMEOUT_SECONDS = 60.0
# Relative differences that count as rounding: several times those measured between float64 and each dtype, on a trunk
# of 22 layers. For a whole step; and for central differences, which are less exact.
LOCAL_TOLERANCES: dict[FloatDtypeName, float] = {"f32": 1e-4, "bf16": 0.2, "f16": 0.05}
DIFFERENCE_TOLERANCES: dict[FloatDtypeName, float] = {"f32": 1e-2, "bf16": 0.1, "f16": 0.05}
# A difference is a failure only if it exceeds the uncertainty of the central differences by this factor.
CLEARLY = 3.0


class Examination:
    """Checks of this machine, and of `model` and the daemon at `server` if given.

    `cut`: cut that the daemon must have. `local_trunk`: compare with the model's own trunk layers, if they can be
    loaded here. Raises `ConfigError` for an invalid endpoint, for several, or for keys without one.
    """

    def __init__(
        self,
        server: str | None = None,
        *,
        model: str | None = None,
        cut: Cut | None = None,
        server_key: str | None = None,
        client_key: str | Path | None = None,
        local_trunk: bool = True,
    ) -> None:
        endpoints = parse_endpoints(server) if server else ()
        if len(endpoints) > 1:
            raise ConfigError(f"--server {server!r}: name one daemon; for several, run it once for each")
        if not endpoints and (server_key or client_key):
            option = "--server-key" if server_key else "--client-key"
            raise ConfigError(f"{option} is for a daemon: name that with --server HOST:PORT")
        self._endpoint = endpoints[0] if endpoints else None
        self._model = model
        self._cut = cut
        self._server_key = server_key
        self._client_key = client_key
        self._local_trunk = local_trunk
        # Findings of earlier checks; None if they failed.
        self._reference: ModelReference | None = None
        self._identity: ModelIdentity | None = None
        self._status: Status | None = None

    def run(self) -> Iterator[Check]:
        """Run the checks one after the other, and yield each result at once."""
        yield attempt("devices", check_torch)
        yield attempt("libzmq", check_zmq)
        yield attempt("hub", check_hub)
        if self._model is not None:
            yield attempt("model", self._load_reference)
        if self._endpoint is None:
            yield Check("daemon", State.SKIP, "none is named", "name one with --server HOST:PORT")
            return
        keys = attempt("keys", lambda: check_keys(self._server_key, self._client_key))
        yield keys
        if keys.state is State.FAIL:
            yield Check("daemon", State.SKIP, "not asked, without the keys")
            return
        yield from self._daemon(self._endpoint)

    # --- the model ---------------------------------------------------------------------------------------------

    def _load_reference(self) -> Check:
        from transformers.utils.logging import disable_progress_bar

        from zsl.models.identity import identify
        from zsl.models.loading import check_part_loads
        from zsl.models.reference import resolve
        from zsl.split.cut import check_cut
        from zsl.split.stack import check_can_be_split, layer_count

        assert self._model is not None
        disable_progress_bar()
        reference = resolve(self._model)
        layers = layer_count(reference.config)
        check_can_be_split(reference.config)
        what = "can be split"
        if reference.part is not None:
            self._cut = reference.part.cut_for(reference.text, "client", self._cut)
            check_part_loads(reference)
            what = f"the client's part for the cut {self._cut}"
        elif self._cut is not None:
            check_cut(self._cut, layers)
        self._identity = identify(reference)
        self._reference = reference
        found = f"{self._model}: {reference.config.model_type}, {layers} layers, {what}"
        return Check("model", State.OK, found)

    # --- the daemon --------------------------------------------------------------------------------------------

    def _daemon(self, endpoint: str) -> Iterator[Check]:
        yield attempt("daemon", lambda: self._reach(endpoint))
        status = self._status
        if status is None:
            return
        from zsl.client.doctor import daemon

        yield attempt("versions", lambda: daemon.check_versions(status))
        yield attempt("dtype", lambda: daemon.check_dtype(status))
        yield attempt("round trip", lambda: self._with_status_client(endpoint, daemon.check_round_trip))
        yield attempt("throughput", lambda: self._with_client(endpoint, daemon.check_throughput))
        identity, reference = self._identity, self._reference
        if identity is None or reference is None:
            if self._model is None:
                yield Check("weights", State.SKIP, "not compared", "name your model with --model")
        else:
            yield attempt("configuration", lambda: daemon.check_configuration(identity, status, reference.text))
            yield attempt("weights", lambda: daemon.check_weights(identity, status, reference))
        if self._cut is not None:
            cut = self._cut
            yield attempt("cut", lambda: daemon.check_cut(cut, status))
        yield attempt("gradient", lambda: self._gradient(endpoint, status))

    def _reach(self, endpoint: str) -> Check:
        from zsl.client.doctor.daemon import check_daemon

        def look(client: StatusClient) -> Check:
            self._status = client.status()
            return check_daemon(self._status, endpoint)

        return self._with_status_client(endpoint, look)

    def _with_status_client(self, endpoint: str, check: Callable[[StatusClient], Check]) -> Check:
        with StatusClient(endpoint, read_client_keys(self._server_key, self._client_key)) as client:
            return check(client)

    def _with_client(self, endpoint: str, check: Callable[[TrunkClient], Check]) -> Check:
        from zsl.client.trunk_client import TrunkClient

        client = TrunkClient(
            endpoint,
            server_key=self._server_key,
            client_key=self._client_key,
            request_timeout_seconds=REQUEST_TIMEOUT_SECONDS,
        )
        with client:
            client.connect()
            return check(client)

    # --- the daemon's gradient ---------------------------------------------------------------------------------

    def _gradient(self, endpoint: str, status: Status) -> Check:
        if status.forward_only:
            to_do = "train with mode none: what is in front of the trunk learns nothing; or ask for a daemon without it"
            return Check("gradient", State.WARN, "the daemon serves forward only", to_do)
        why_not = self._why_no_local_trunk(status)
        if why_not is None:
            return self._against_local(endpoint, status.dtype)
        return self._with_client(endpoint, lambda client: self._against_differences(client, why_not))

    def _why_no_local_trunk(self, status: Status) -> str | None:
        """Return why the whole model cannot be run here, in words; None if it can."""
        from zsl.client.doctor.memory import does_not_fit
        from zsl.wire.tensors import TORCH_DTYPES

        if self._reference is None:
            return "no model is named" if self._model is None else "the model cannot be used"
        if self._identity != status.model:
            return "the model is another than the daemon's"
        if self._reference.part is not None:
            return "the client's part of the model has no trunk"
        if not self._local_trunk:
            return "no local trunk is wanted"
        if status.quantization is not None:
            return "the daemon's linear layers are quantized"
        return does_not_fit(self._reference, TORCH_DTYPES[status.dtype])

    def _against_local(self, endpoint: str, dtype: FloatDtypeName) -> Check:
        from zsl.client.doctor.gradient import compare_with_local
        from zsl.client.remote import RemoteTrunk

        assert self._reference is not None
        client_key = None if self._client_key is None else str(self._client_key)
        trunk = RemoteTrunk(
            endpoint,
            server_key=self._server_key,
            client_key=client_key,
            request_timeout_seconds=REQUEST_TIMEOUT_SECONDS,
        )
        with closing(trunk):
            found = compare_with_local(self._reference, trunk, dtype)
        tolerance = LOCAL_TOLERANCES[dtype]
        beside = f"one step beside the whole model here (loss {found.loss:.4f}, {found.gradients:,} gradients)"
        if found.largest == 0:
            return Check("gradient", State.OK, f"{beside}: equal bit for bit")
        apart = f"{beside}: {found.name} differ by {found.largest:.1e}"
        if found.largest <= tolerance:
            return Check(
                "gradient", State.OK, f"{apart}, which is rounding: another machine, device or number of threads"
            )
        return Check("gradient", State.FAIL, f"{apart}, {tolerance:g} is rounding", _DO_NOT_TRAIN)

    def _against_differences(self, client: TrunkClient, why: str) -> Check:
        from zsl.client.doctor.gradient import compare_with_differences

        tolerance = DIFFERENCE_TOLERANCES[client.welcome.dtype]
        found = compare_with_differences(client)
        apart = f"{found.difference:.1e} from central differences of the daemon's own forward ({why})"
        if found.difference <= tolerance:
            return Check("gradient", State.OK, f"{apart}, up to {tolerance:g} is rounding")
        if found.difference < CLEARLY * found.uncertainty:
            to_do = "to know, compare with the whole model, where it fits: --model, without --no-local-trunk"
            return Check(
                "gradient", State.WARN, f"{apart}, which are themselves uncertain by {found.uncertainty:.1e}", to_do
            )
        return Check("gradient", State.FAIL, f"{apart}, {tolerance:g} is rounding", _DO_NOT_TRAIN)


_DO_NOT_TRAIN = "do not train through this daemon: report it, with its version and device"
