"""Train several tenants in one event loop: each has its own head on a shared trunk.

bin/zsl-trunkd --port 5555                                           # in one terminal
.venv/bin/python examples/async_clients.py --server 127.0.0.1:5555   # in another
"""

import argparse
import asyncio

import torch
from torch import nn

import zsl

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--server", default="127.0.0.1:5555", metavar="HOST:PORT", help="address of the daemon")
parser.add_argument("--tenants", type=int, default=2, help="number of tenants")
parser.add_argument("--steps", type=int, default=10, help="optimizer steps of each tenant")
options = parser.parse_args()

TEXTS = ["A trunk serves many clients. ", "The client keeps its text. ", "Gradients cross the wire. "]


async def train(tenant: int, endpoint: str, steps: int) -> None:
    """Learn to predict the next byte of a text: embeddings before the trunk, a linear layer after it."""
    async with zsl.AsyncTrunkClient(endpoint) as trunk:  # opens this tenant's own session
        hidden = trunk.welcome.model.hidden_size
        generator = torch.Generator().manual_seed(tenant)
        bottom = nn.Embedding.from_pretrained(torch.randn(256, hidden, generator=generator) * 0.1, freeze=False)
        top = nn.Linear(hidden, 256)
        optimizer = torch.optim.AdamW([*bottom.parameters(), *top.parameters()], lr=1e-2)
        ids = torch.tensor([list(TEXTS[tenant % len(TEXTS)].encode())])  # [1, tokens]: stays in this process

        for step in range(1, steps + 1):
            activations = bottom(ids)  # [1, tokens, hidden]
            crossed = await trunk.forward(activations.detach(), keep=True)  # other tenants run meanwhile
            output = crossed.output.requires_grad_()
            loss = nn.functional.cross_entropy(top(output)[0, :-1], ids[0, 1:])
            loss.backward()
            assert output.grad is not None
            answer = await trunk.backward(crossed, output.grad)  # the trunk's vector-Jacobian product
            activations.backward(answer.tensor)
            optimizer.step()
            optimizer.zero_grad()
            print(f"tenant {tenant}, step {step}: loss {loss.item():.4f}, {answer.merged} in the pass")


async def main() -> None:
    await asyncio.gather(*(train(tenant, options.server, options.steps) for tenant in range(options.tenants)))


asyncio.run(main())
