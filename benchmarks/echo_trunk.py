"""Run a zsl daemon without a model: the real `TrunkServer`, with a compute thread that echoes activations.

python benchmarks/echo_trunk.py          serves on a free port, and prints {"port": …} when ready
"""

from __future__ import annotations

import asyncio
import json

from zsl.trunk.costs import UNKNOWN_COSTS, BatchLimits
from zsl.trunk.daemon.server import TrunkServer
from zsl.trunk.settings import TrunkInfo, TrunkTraits
from zsl.trunk.work import Batch, Done, Outcome
from zsl.wire.messages import Cut, ModelIdentity

HIDDEN = 512
MAX_TOKENS = 4096
INFO = TrunkInfo(
    model=ModelIdentity(
        model_type="echo", layers=6, hidden_size=HIDDEN, config_digest="0" * 64, weights_digest="0" * 64
    ),
    cut=Cut(start=2, stop=4),
    dtype="f32",
    forward_only=True,
    max_row_tokens=MAX_TOKENS,
)


class EchoCompute:
    """Hands back the buffers that came, without a copy."""

    traits = TrunkTraits(
        parameters=0,
        merges=False,
        packs=True,
        deterministic=False,
        costs=UNKNOWN_COSTS,
        batch_limits=BatchLimits(),
    )

    def run(self, batch: Batch) -> list[Outcome]:
        return [Done(work.buffers) for work in batch.works]


async def serve() -> None:
    """Serve until the process is ended."""
    server = TrunkServer(INFO)
    endpoint = server.bind("127.0.0.1", 0)
    print(json.dumps({"port": int(endpoint.rpartition(":")[2])}), flush=True)
    await server.run(EchoCompute())


if __name__ == "__main__":
    asyncio.run(serve())
