"""Access options of the daemon: read its keys and tenants, check its listening address. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zsl.errors import ConfigError, StartupError
from zsl.transport.curve_keys import KeyPair, read_key_pair
from zsl.transport.listening import is_loopback
from zsl.trunk.access.tenants import Allowlist

SERVER_KEY_FILE = "server.key_secret"


@dataclass(frozen=True, slots=True)
class Access:
    """The daemon's own key pair, and the list of tenants that may connect."""

    keys: KeyPair
    allowlist: Allowlist


def read_access(keys: Path | None, tenants: Path | None) -> Access | None:
    """Read the directory of keys and the file of tenants; None if neither is given.

    Raises `ConfigError` for an invalid file, or for one option without the other.
    """
    if keys is None and tenants is None:
        return None
    if keys is None or tenants is None:
        given, missing = ("--keys", "--tenants") if tenants is None else ("--tenants", "--keys")
        raise ConfigError(
            f"{given} without {missing}: --keys DIR holds the daemon's own key pair, --tenants FILE the clients"
        )
    return Access(read_key_pair(keys / SERVER_KEY_FILE), Allowlist(tenants))


def check_address(host: str, *, encrypted: bool, insecure: bool) -> None:
    """Raise `StartupError` for an address that others can reach, unless encrypted or `--insecure`."""
    if encrypted or insecure or is_loopback(host):
        return
    raise StartupError(
        f"--host {host}: anyone who reaches this address could use the trunk and read what clients send; "
        "make keys with `zsl keygen server` and give --keys and --tenants, listen on 127.0.0.1, or add --insecure "
        "if the network is private"
    )
