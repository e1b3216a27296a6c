"""Checks of a daemon: versions, dtype, model, cut, round-trip time and throughput."""

from __future__ import annotations

import time

import torch

import zsl
from zsl.client.doctor.check import Check, State
from zsl.client.info_lines import DIGEST_CHARACTERS, DTYPE_WORDS, in_units, trunk_dtype
from zsl.client.trunk_client import TrunkClient
from zsl.link.status_client import StatusClient
from zsl.models.reference import ModelReference
from zsl.text.plural import counted
from zsl.wire.messages import Cut, ModelIdentity, Status

ROUND_TRIPS = 20
ROW_TOKENS = 128  # of the timed request: a row of a small batch


def check_daemon(status: Status, endpoint: str) -> Check:
    """Report the layers and the model that the daemon serves."""
    model = status.model
    found = (
        f"{endpoint} serves layers {status.cut} of {model.model_type} ({model.layers} layers, hidden size "
        f"{model.hidden_size:,}, weights {_short(model.weights_digest)}) to {counted(status.sessions, 'session')}"
    )
    return Check("daemon", State.OK, found)


def check_versions(status: Status) -> Check:
    """Check that client and daemon have the same version of zsl."""
    if status.software != zsl.__version__:
        found = f"zsl {zsl.__version__} here, {status.software} at the daemon"
        return Check("versions", State.WARN, found, "they speak the same protocol, but best take one version for both")
    return Check("versions", State.OK, f"zsl {zsl.__version__} at both ends")


def check_dtype(status: Status) -> Check:
    """Check that the trunk's dtype is float32, the default of a client's model, and that it is not quantized."""
    dtype = DTYPE_WORDS[status.dtype]
    if status.quantization is not None:
        to_do = "know that losses differ from those of a model that is not quantized"
        return Check("dtype", State.WARN, f"the trunk computes in {trunk_dtype(status)}", to_do)
    if status.dtype != "f32":
        to_do = f'set model.dtype = "{dtype}", or know that losses differ from those of a float32 model'
        return Check("dtype", State.WARN, f"the trunk computes in {dtype}, a model here by default in float32", to_do)
    return Check("dtype", State.OK, dtype)


def check_round_trip(client: StatusClient) -> Check:
    """Measure the round-trip time to the daemon. Raises `ZslError`."""
    took = [seconds * 1000 for seconds in client.round_trip_seconds(ROUND_TRIPS)]
    middle, late = took[len(took) // 2], took[len(took) * 95 // 100 - 1]
    return Check("round trip", State.OK, f"{middle:.2f} ms (median of {ROUND_TRIPS}), 95 % within {late:.2f} ms")


def check_configuration(mine: ModelIdentity, status: Status, name: str) -> Check:
    """Check that the daemon's model has the same type, size and configuration."""
    served = status.model
    for field in ("model_type", "layers", "hidden_size"):
        here, there = getattr(mine, field), getattr(served, field)
        if here != there:
            return Check(
                "configuration", State.FAIL, f"{field} is {here} in {name}, {there} at the daemon", _LOAD_THE_SAME
            )
    return _same("configuration", mine.config_digest, served.config_digest, name, _LOAD_THE_SAME)


def check_weights(mine: ModelIdentity, status: Status, reference: ModelReference) -> Check:
    """Check that the daemon's model has the same weights."""
    to_do = _LOAD_THE_SAME
    if reference.location is None and mine.config_digest == status.model.config_digest:
        to_do = "random weights are the same only with the same versions of torch and transformers at both ends"
    return _same("weights", mine.weights_digest, status.model.weights_digest, reference.text, to_do)


def check_cut(wanted: Cut, status: Status) -> Check:
    """Check that the daemon serves the requested cut."""
    if wanted != status.cut:
        to_do = f"take --cut {status.cut}, or another daemon"
        return Check("cut", State.FAIL, f"{wanted} is wanted, the daemon serves {status.cut}", to_do)
    return Check("cut", State.OK, f"{wanted} at both ends")


def check_throughput(client: TrunkClient) -> Check:
    """Measure the time of a forward of one row of activations. Raises `ZslError`."""
    welcome = client.welcome
    tokens = min(ROW_TOKENS, welcome.limits.max_row_tokens, welcome.limits.max_request_tokens)
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(1, tokens, welcome.model.hidden_size, generator=generator)  # [1, tokens, hidden]
    client.forward(activations)  # the first pass of a length is slower
    began = time.perf_counter()
    answer = client.forward(activations).answer
    seconds = time.perf_counter() - began
    assert answer is not None
    in_trunk = answer.queue_seconds + answer.compute_seconds
    found = (
        f"{tokens} tokens, {in_units(activations.nbytes)} each way, in {seconds * 1000:.1f} ms, "
        f"{in_trunk * 1000:.1f} of them in the trunk"
    )
    return Check("throughput", State.OK, found)


_LOAD_THE_SAME = "load the same checkpoint at both ends"


def _same(what: str, mine: str, served: str, name: str, to_do: str) -> Check:
    if mine != served:
        found = f"not the same: {_short(mine)} in {name}, {_short(served)} at the daemon"
        return Check(what, State.FAIL, found, to_do)
    return Check(what, State.OK, f"the same: {_short(mine)} in {name} and at the daemon")


def _short(digest: str) -> str:
    return digest[:DIGEST_CHARACTERS]
