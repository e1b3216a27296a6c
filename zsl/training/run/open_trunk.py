"""Open the trunk that `[trunk]` describes: a daemon's, or one embedded in this command."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from zsl.client.remote import RemoteTrunk
from zsl.errors import ConfigError
from zsl.training.config.config import TrunkTable
from zsl.training.run.embedded_trunk import embedded_trunk
from zsl.trunk.daemon.embedded import EmbeddedTrunk


def check_keys_are_for_a_daemon(table: TrunkTable) -> None:
    """Raise `ConfigError` for keys without the address of a daemon."""
    if table.endpoint is None and (table.server_key or table.client_key):
        raise ConfigError("trunk.server_key and trunk.client_key are for a daemon: name it with --server HOST:PORT")


def open_trunk(
    table: TrunkTable,
    model: str,
    dtype: str,
    stack: ExitStack,
    embedded: EmbeddedTrunk | None = None,
) -> tuple[RemoteTrunk, str]:
    """Return the trunk of the model, and its place in words. `stack` closes it, and an embedded one that it starts.

    `embedded`: one that was started already, for use without `endpoint`.
    """
    server_key, client_key = table.server_key, table.client_key
    if table.endpoint is not None:
        endpoint = place = table.endpoint
    else:
        if embedded is None:
            embedded = stack.enter_context(embedded_trunk(table, model, dtype))
        endpoint, place = embedded.endpoint, "embedded trunk"
        server_key, client_key = embedded.server_key, embedded.client_key
    trunk = RemoteTrunk(
        endpoint,
        server_key=server_key,
        client_key=client_key,
        mode=table.mode,
        wire_dtype=getattr(torch, table.wire_dtype) if table.wire_dtype else None,
        adapter_wire_dtype=getattr(torch, table.adapter_wire_dtype) if table.adapter_wire_dtype else None,
        deterministic=table.deterministic,
        padding=table.padding,
        connect_timeout_seconds=table.connect_timeout_seconds,
        request_timeout_seconds=table.request_timeout_seconds,
    )
    stack.callback(trunk.close)
    return trunk, place
