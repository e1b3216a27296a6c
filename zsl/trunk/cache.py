"""Keys and values that the daemon keeps for a session between the forwards of a generation. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CacheUse:
    """A cache as a request runs with it.

    `kept`: the keys and values before the request, in the computation's own form; None for a new cache. The request
    runs behind the first `length` tokens of the `rows` (None: of all, in order). `nbytes`: size of the cache after it.
    """

    name: int
    kept: object | None = field(repr=False)
    length: int
    rows: tuple[int, ...] | None
    nbytes: int
