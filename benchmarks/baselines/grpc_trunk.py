"""Serve a trunk over gRPC in the simplest way: `grpc.aio`, unary calls of bytes, one request per pass.

Nothing is merged, nothing is replayed, and no mask crosses. A message is a msgpack map of `step`, `shape`, `dtype` and
`data` (the raw bytes of one tensor). The client numbers the steps. The gradient is exact: the server keeps the graph
of each forward until its backward.

    python benchmarks/baselines/grpc_trunk.py --model random:gpt2 --cut 2:10 --threads 2 --port 0
    python benchmarks/baselines/grpc_trunk.py --echo         no model: echoes each message

Prints {"port": …} when ready.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol, Self

import click
import grpc
import msgpack
import torch

SERVICE = "zsl.Trunk"
OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # a proxy in the environment is not for loopback
]

Gradient = Callable[[torch.Tensor], torch.Tensor]


def pack(step: bytes, tensor: torch.Tensor) -> bytes:
    """The message for one tensor."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    fields = {
        "step": step,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "data": flat.view(torch.uint8).numpy().tobytes(),
    }
    packed: bytes = msgpack.packb(fields)
    return packed


def unpack(message: bytes) -> tuple[bytes, torch.Tensor]:
    """The step and the tensor of a message."""
    fields: dict[str, Any] = msgpack.unpackb(message)
    raw = torch.frombuffer(bytearray(fields["data"]), dtype=torch.uint8)
    return fields["step"], raw.view(getattr(torch, fields["dtype"])).view(fields["shape"])


# --- the client ------------------------------------------------------------------------------------------------------


class GrpcTrunk:
    """Forward and backward of the trunk at `endpoint` (HOST:PORT), as blocking calls."""

    def __init__(self, endpoint: str) -> None:
        self._channel = grpc.insecure_channel(endpoint, options=OPTIONS)
        self._forward = self._channel.unary_unary(f"/{SERVICE}/Forward")
        self._backward = self._channel.unary_unary(f"/{SERVICE}/Backward")

    def forward(self, activations: torch.Tensor) -> tuple[bytes, torch.Tensor]:
        """A new step, and the trunk's output for activations `[rows, tokens, hidden]`."""
        return unpack(self._forward(pack(uuid.uuid4().bytes, activations)))

    def backward(self, step: bytes, gradients: torch.Tensor) -> torch.Tensor:
        """The gradient at the trunk's input, for the one at its output. A step has one backward."""
        return unpack(self._backward(pack(step, gradients)))[1]

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# --- the server ------------------------------------------------------------------------------------------------------


class Compute(Protocol):
    """Handlers of the server's messages."""

    async def forward(self, message: bytes) -> bytes: ...

    async def backward(self, message: bytes) -> bytes: ...


class EchoCompute:
    """Answers with the bytes that came, without a look at them."""

    async def forward(self, message: bytes) -> bytes:
        return message

    async def backward(self, message: bytes) -> bytes:
        return message


class TorchCompute:
    """The layers of a cut, in one thread beside the loop."""

    def __init__(self, model: str, cut: str) -> None:
        self._run = load(model, cut)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._gradients: dict[bytes, Gradient] = {}

    async def forward(self, message: bytes) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._do_forward, message)

    async def backward(self, message: bytes) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._do_backward, message)

    def _do_forward(self, message: bytes) -> bytes:
        step, activations = unpack(message)
        output, self._gradients[step] = self._run(activations)
        return pack(step, output)

    def _do_backward(self, message: bytes) -> bytes:
        step, gradients = unpack(message)
        return pack(step, self._gradients.pop(step)(gradients))


def load(model: str, cut: str) -> Callable[[torch.Tensor], tuple[torch.Tensor, Gradient]]:
    """The trunk as a function from activations to its output and the function that differentiates it there.

    All that this file takes from zsl: the same layers, called in the same way as its daemon does.
    """
    from zsl.models.loading import load_trunk_part
    from zsl.models.reference import resolve
    from zsl.split.cut import parse_cut
    from zsl.trunk.compute.passes import Rows
    from zsl.trunk.compute.trunk_model import TrunkModel

    parsed = parse_cut(cut)
    trunk = TrunkModel(load_trunk_part(resolve(model), parsed), parsed)

    def run(activations: torch.Tensor) -> tuple[torch.Tensor, Gradient]:
        graph = trunk.graph(Rows(activations))
        return graph.output, graph.gradients

    return run


async def serve(compute: Compute, port: int) -> None:
    """Serve until the process is ended."""
    server = grpc.aio.server(options=OPTIONS)
    methods = {"Forward": _method(compute.forward), "Backward": _method(compute.backward)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, methods)])
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print(json.dumps({"port": bound}), flush=True)
    await server.wait_for_termination()


def _method(compute: Callable[[bytes], Awaitable[bytes]]) -> grpc.RpcMethodHandler:
    """Bytes in, bytes out: without serializers gRPC passes them on as they are."""

    async def handle(message: bytes, context: object) -> bytes:
        return await compute(message)

    return grpc.unary_unary_rpc_method_handler(handle)


@click.command()
@click.option("--model", help="A model reference.")
@click.option("--cut", metavar="START:STOP", help="The layers to serve.")
@click.option("--threads", default=torch.get_num_threads(), show_default=True, help="CPU threads of torch.")
@click.option("--port", default=0, show_default=True, help="0 picks a free one.")
@click.option("--echo", is_flag=True, help="Serve no model.")
def main(model: str | None, cut: str | None, threads: int, port: int, echo: bool) -> None:
    """Serve a trunk, or an echo, over gRPC on 127.0.0.1."""
    if not echo and (model is None or cut is None):
        raise click.UsageError("give --model and --cut, or --echo")
    torch.set_num_threads(threads)
    compute: Compute = EchoCompute() if echo else TorchCompute(str(model), str(cut))
    asyncio.run(serve(compute, port))


if __name__ == "__main__":
    main()
