"""The two keys that a client needs for a daemon that encrypts: the daemon's public one, and its own pair."""

from __future__ import annotations

from pathlib import Path

from zsl.errors import ConfigError
from zsl.transport.curve import ClientKeys, read_key_pair, read_public_key


def read_client_keys(server_key: str | None, client_key: str | Path | None) -> ClientKeys | None:
    """`server_key`: the daemon's `.key` file, or the key itself; `client_key`: one's own `.key_secret` file.

    None without keys. Raises `ConfigError` for one without the other, or a file that holds no key.
    """
    if server_key is None and client_key is None:
        return None
    if server_key is None or client_key is None:
        missing = "server_key" if server_key is None else "client_key"
        raise ConfigError(
            f"{missing} is missing: an encrypted connection takes server_key (the daemon's .key file) and client_key "
            "(your own .key_secret file, made by `zsl keygen NAME`)"
        )
    return ClientKeys(read_public_key(server_key), read_key_pair(Path(client_key)))
