"""Read a client's CURVE keys: the daemon's public key, and the client's own pair."""

from __future__ import annotations

from pathlib import Path

from zsl.errors import ConfigError
from zsl.transport.curve_keys import ClientKeys, read_key_pair, read_public_key


def read_client_keys(server_key: str | None, client_key: str | Path | None) -> ClientKeys | None:
    """Read `server_key` (the daemon's `.key` file, or the key itself) and `client_key` (the own `.key_secret` file).

    Return None without keys. Raises `ConfigError` if one of the two is missing, or for a file without a valid key.
    """
    if server_key is None and client_key is None:
        return None
    if server_key is None or client_key is None:
        missing = "server_key" if server_key is None else "client_key"
        raise ConfigError(
            f"{missing} is missing: an encrypted connection needs server_key (the daemon's .key file) and client_key "
            "(your own .key_secret file, made by `zsl keygen NAME`)"
        )
    return ClientKeys(read_public_key(server_key), read_key_pair(Path(client_key)))
