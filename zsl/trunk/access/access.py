"""Who may reach the daemon: whom it listens to, its keys and its list of tenants. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from zsl.errors import ConfigError, StartupError
from zsl.transport.curve import KeyPair, read_key_pair
from zsl.trunk.access.tenants import Allowlist

SERVER_KEY_FILE = "server.key_secret"


@dataclass(frozen=True, slots=True)
class Access:
    """The daemon's own keys, and who gets in."""

    keys: KeyPair
    allowlist: Allowlist


def read_access(keys: Path | None, tenants: Path | None) -> Access | None:
    """What is in the directory of keys and the file of tenants; None without either.

    Raises `ConfigError`, also for one without the other.
    """
    if keys is None and tenants is None:
        return None
    if keys is None or tenants is None:
        given, missing = ("--keys", "--tenants") if tenants is None else ("--tenants", "--keys")
        raise ConfigError(
            f"{given} without {missing}: --keys DIR holds the daemon's own key pair, --tenants FILE says who gets in"
        )
    return Access(read_key_pair(keys / SERVER_KEY_FILE), Allowlist(tenants))


def check_address(host: str, *, encrypted: bool, insecure: bool) -> None:
    """Raises `StartupError` for an address that others can reach, unless nobody unknown can do harm there."""
    if encrypted or insecure or _is_loopback(host):
        return
    raise StartupError(
        f"--host {host}: anyone who reaches this address could use the trunk and read what clients send; "
        "make keys with `zsl keygen server` and give --keys and --tenants, listen on 127.0.0.1, or add --insecure "
        "if the network is yours alone"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
