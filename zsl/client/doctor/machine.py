"""Checks of this machine: torch's devices, libzmq's encryption, access to the hub, key files."""

from __future__ import annotations

import re
from pathlib import Path

from zsl.client.doctor.check import Check, State
from zsl.link.keys import read_client_keys

BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # names on Linux, for x86 and ARM


def check_torch() -> Check:
    """Report torch's devices and threads. Imports torch."""
    import torch

    flags = _cpu_flags()
    half = "" if not flags else f", bfloat16 {'in hardware' if flags & BFLOAT16_FLAGS else 'emulated'}"
    devices = [f"cpu ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads{half})"]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        half = "bfloat16" if facts.major >= 8 else "no bfloat16"  # since Ampere
        devices.append(f"cuda:{index} ({facts.name}, {facts.total_memory / 2**30:.0f} GiB, {half})")
    return Check("devices", State.OK, ", ".join(devices))


def check_zmq() -> Check:
    """Check that libzmq supports CURVE."""
    import zmq

    if not zmq.has("curve"):
        return Check(
            "libzmq",
            State.WARN,
            f"{zmq.zmq_version()} without CURVE: daemons with keys cannot be reached",
            "pip install --force-reinstall pyzmq, whose wheels have it",
        )
    return Check("libzmq", State.OK, f"{zmq.zmq_version()}, encrypts (CURVE)")


def check_hub() -> Check:
    """Report whether the hub can be reached. An unreachable hub is no failure."""
    from huggingface_hub import constants, is_offline_mode

    from zsl.models.hub import why_no_answer

    if is_offline_mode():
        return Check("hub", State.OK, f"not asked: HF_HUB_OFFLINE is set; {_without_hub()}")
    problem = why_no_answer()
    if problem:
        return Check("hub", State.OK, f"{problem}; {_without_hub()}")
    return Check("hub", State.OK, f"{constants.ENDPOINT} is reachable")


def check_keys(server_key: str | None, client_key: str | Path | None) -> Check:
    """Check the two keys of an encrypted connection. Raises `ConfigError` for invalid ones, and for a secret key that
    others can read."""
    keys = read_client_keys(server_key, client_key)
    if keys is None:
        return Check("keys", State.OK, "none given: for daemons without encryption")
    own = "" if client_key is None else Path(client_key).name
    return Check("keys", State.OK, f"{own} is a pair and its owner's alone; the daemon's key is {keys.server.decode()}")


def _cpu_flags() -> set[str]:
    """Return the processor's feature flags from Linux; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


def _without_hub() -> str:
    return "hub ids load only if they are in the cache"
