"""Default of `--stash-memory`: memory of pending backwards, by the machine's free memory and the trunk's weights."""

from __future__ import annotations

MOST_BYTES = 4 << 30
LEAST_BYTES = 64 << 20
AVAILABLE_SHARE = 1 / 2  # the weights come out of the other half
WEIGHTS_SHARE = 1 / 2
BYTES_PER_CLIENT = 32 << 20  # little beside what its own process takes


def default_stash_memory(available_bytes: int | None) -> int:
    """Return the bytes by which a daemon may grow. `available_bytes`: of its device before the weights are loaded; None
    if unknown."""
    if available_bytes is None:
        return MOST_BYTES
    return max(LEAST_BYTES, min(MOST_BYTES, int(available_bytes * AVAILABLE_SHARE)))


def default_graph_memory(weight_bytes: int, clients: int) -> int:
    """Return the bytes that graphs of pending backwards may take: half of the weights, or `BYTES_PER_CLIENT`.

    Clients share a trunk to save memory, and each pending graph takes some of it away. Without its graph a backward
    computes its forward again, which takes about as long as the backward. Small requests, which gain most from a shared
    pass, keep their graphs however many there are.
    """
    return max(LEAST_BYTES, int(weight_bytes * WEIGHTS_SHARE), BYTES_PER_CLIENT * clients)
