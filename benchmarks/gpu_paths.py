"""Compare every path of the trunk's computation with the same layers in double precision: outputs and gradients.

A request runs alone or shares a pass. Its backward uses the graph of its forward or the outputs of its linear layers,
computes the forward again, or does that layer by layer. All have to agree, within the rounding of the dtype.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from servers import trunk_daemon
from transformers import LlamaConfig, LlamaForCausalLM

import zsl
from zsl.models.loading import load_trunk_part, load_whole
from zsl.models.reference import resolve
from zsl.split.cut import parse_cut
from zsl.trunk.adapter import AdapterUse, AdapterVersion
from zsl.trunk.compute import attention
from zsl.trunk.compute.adapters import SeparateAdapters, Span, request_adapter
from zsl.trunk.compute.engine import TorchCompute
from zsl.trunk.compute.passes import Rows
from zsl.trunk.compute.trunk_model import TrunkModel
from zsl.trunk.daemon.load import plan_trunk
from zsl.trunk.requests.validate import check_forward
from zsl.trunk.settings import ServerSettings
from zsl.trunk.work import Alone, Batch, Buffers, Done, Keep, Kind, Packed, Sharing, Stacked, Work
from zsl.wire.adapter_layout import AdapterLayout, LoraModule, version_of
from zsl.wire.messages import Limits
from zsl.wire.tensors import decode_tensor, encode_tensor

# Of the largest magnitude of the exact numbers.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
CUT = "1:5"
# Rows and tokens of the requests. Two have rows of one length, so that they can be stacked.
SHAPES = ((1, 40), (2, 17), (1, 3), (3, 40), (1, 129))
STACKED_TOKENS = 40
ADAPTER_RANK = 4


@dataclass(frozen=True)
class ComputePath:
    """One way to compute forward and backward. `complete`: the backward brings the inputs, and no stash is used."""

    name: str
    shares: type[Alone] | type[Packed] | type[Stacked] = Alone
    keep: Keep = Keep.INPUT
    by_layers: bool = False
    complete: bool = False
    masked: bool = False
    adapted: bool = False


PATHS = (
    ComputePath("alone, graph", keep=Keep.GRAPH),
    ComputePath("alone, forward again"),
    ComputePath("alone, no stash", complete=True),
    ComputePath("alone, layer by layer", by_layers=True),
    ComputePath("alone, padded", keep=Keep.GRAPH, masked=True),
    ComputePath("alone, adapters", keep=Keep.GRAPH, adapted=True),
    ComputePath("packed, graph", Packed, Keep.GRAPH_AND_LINEAR_OUTPUTS),
    ComputePath("packed, linear outputs", Packed, Keep.LINEAR_OUTPUTS),
    ComputePath("packed, forward again", Packed),
    ComputePath("packed, layer by layer", Packed, by_layers=True),
    ComputePath("packed, padded", Packed, Keep.LINEAR_OUTPUTS, masked=True),
    ComputePath("packed, adapters", Packed, Keep.LINEAR_OUTPUTS, adapted=True),
    ComputePath("stacked, linear outputs", Stacked, Keep.LINEAR_OUTPUTS),
    ComputePath("stacked, padded", Stacked, Keep.LINEAR_OUTPUTS, masked=True),
)


@dataclass(frozen=True)
class Request:
    """Forward and backward of one client. `real` `[rows, tokens]`: True for tokens that are no padding."""

    activations: torch.Tensor  # [rows, tokens, hidden]
    gradients: torch.Tensor
    real: torch.Tensor
    version: AdapterVersion | None

    @property
    def tokens(self) -> int:
        return self.activations.shape[1]


@dataclass(frozen=True)
class Numbers:
    """Output and gradient at the input `[rows, tokens, hidden]`, and flat gradient of the adapter."""

    output: torch.Tensor
    at_input: torch.Tensor
    of_adapter: torch.Tensor | None


def write_small_model(directory: Path) -> str:
    """Write a checkpoint with random weights; return its reference."""
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).save_pretrained(directory)
    return str(directory)


def path_rows(model: str, dtype: torch.dtype, device: str) -> Iterator[dict[str, Any]]:
    """Yield a row of the table for each path."""
    cut, name = parse_cut(CUT), str(dtype).removeprefix("torch.")
    plan = plan_trunk(model, cut, dtype, device, forward_only=False)
    sizes: dict[str, Any] = {"max_batch_tokens": 4096, "merge_below_tokens": 4096}
    computes = {
        by_layers: plan.load(**sizes, pass_memory_bytes=1 if by_layers else None) for by_layers in (False, True)
    }
    exact = TrunkModel(load_trunk_part(resolve(model), cut, dtype).to(torch.float64).to(device), cut)  # type: ignore[arg-type]
    for path in PATHS:
        requests = random_requests(path, dtype, computes[False])
        with no_failed_passes(), varlen_calls() as calls:
            found = computed(computes[path.by_layers], path, requests, ServerSettings().limits(plan.info))
        expected = [exact_numbers(exact, request) for request in requests]
        errors = [errors_of(*of_one) for of_one in zip(found, expected, requests, strict=True)]
        output, at_input, of_adapter = (max(values) for values in zip(*errors, strict=True))
        yield {
            "path": path.name,
            "dtype": name,
            "output_ppm": output * 1e6,
            "gradient_ppm": max(at_input, of_adapter) * 1e6,
            "tolerance_ppm": TOLERANCES[dtype] * 1e6,
            "within": "yes" if max(output, at_input, of_adapter) <= TOLERANCES[dtype] else "NO",
            "varlen_kernels": len(calls),
        }


def random_requests(path: ComputePath, dtype: torch.dtype, compute: TorchCompute) -> list[Request]:
    """Make the requests of a path, the same each time."""
    random = torch.Generator().manual_seed(0)
    requests = []
    for index, (rows, tokens) in enumerate(SHAPES):
        activations, gradients = torch.randn(2, rows, tokens, CONFIG.hidden_size, generator=random)
        real = torch.ones(rows, tokens, dtype=torch.bool)
        if path.masked:
            real[0, : tokens // 3] = False  # on the left
            gradients = gradients * real.unsqueeze(-1)
        version = random_adapter(compute, index) if path.adapted else None
        requests.append(Request(activations.to(dtype), gradients.to(dtype), real, version))
    return [one for one in requests if path.shares is not Stacked or one.tokens == STACKED_TOKENS]


def random_adapter(compute: TorchCompute, seed: int) -> AdapterVersion:
    """Make LoRA on all linear layers of the trunk, in single precision, as PEFT has it."""
    sizes = {"rank": ADAPTER_RANK + seed, "scaling": 2.0, "dropout": 0.0, "has_bias": False, "has_magnitude": False}
    modules = [
        LoraModule.model_validate({"path": path, "inputs": inputs, "outputs": outputs, **sizes})
        for path, (inputs, outputs) in compute.traits.adaptable.items()
    ]
    layout = AdapterLayout(dtype="f32", modules=tuple(modules))
    weights = torch.randn(layout.elements, generator=torch.Generator().manual_seed(seed)) * 0.05
    buffer = bytearray(encode_tensor("weights", weights)[1])
    return AdapterVersion(version_of(layout.encoded(), "f32", memoryview(buffer)), layout, "f32", buffer)


def computed(compute: TorchCompute, path: ComputePath, requests: Sequence[Request], limits: Limits) -> list[Numbers]:
    """Return the numbers of the daemon's computation. Raises `RuntimeError` for a request that it refuses."""
    works = [forward_work(path, request, limits) for request in requests]
    forwards = run(compute, works, together=path.shares is not Alone)
    backs = [backward_work(path, *of_one) for of_one in zip(works, forwards, requests, strict=True)]
    backwards = run(compute, backs, together=path.shares is not Alone)
    return [
        Numbers(
            decode_tensor(*forward.buffers["activations"]),
            decode_tensor(*backward.buffers["gradients"]),
            decode_tensor(*backward.buffers["adapter_gradients"]) if request.version else None,
        )
        for forward, backward, request in zip(forwards, backwards, requests, strict=True)
    ]


def forward_work(path: ComputePath, request: Request, limits: Limits) -> Work:
    """Make a forward as the daemon makes it of a message."""
    buffers: Buffers = {"activations": encode_tensor("activations", request.activations)}
    if path.masked:
        buffers["attention_mask"] = encode_tensor("attention_mask", request.real)
    shape = check_forward(buffers, CONFIG.hidden_size, limits)
    sharing: Sharing = Alone()
    if path.shares is Packed:
        sharing = Packed()
    elif path.shares is Stacked:
        sharing = Stacked(request.tokens, path.masked, False)
    adapter = None if request.version is None else AdapterUse(request.version, gradients=True)
    return Work(Kind.FORWARD, buffers, shape, sharing, path.keep, adapter=adapter)


def backward_work(path: ComputePath, work: Work, done: Done, request: Request) -> Work:
    """Make the backward of a forward."""
    buffers: Buffers = {"gradients": encode_tensor("gradients", request.gradients)}
    if path.complete:
        buffers = {**work.buffers, **buffers}
    stash = None if path.complete else done.stash
    return Work(Kind.BACKWARD, buffers, work.shape, work.sharing, stash=stash, adapter=work.adapter)


def run(compute: TorchCompute, works: Sequence[Work], *, together: bool) -> list[Done]:
    """Run works in one pass, or one by one."""
    batches = [Batch(tuple(works))] if together else [Batch((work,)) for work in works]
    done = []
    for outcome in (outcome for batch in batches for outcome in compute.run(batch)):
        if not isinstance(outcome, Done):
            raise RuntimeError(f"the trunk refused a request: {outcome}")
        done.append(outcome)
    return done


def exact_numbers(trunk: TrunkModel, request: Request) -> Numbers:
    """Return the numbers of a request alone, in double precision."""
    device, rows = trunk.device, request.activations.shape[0]
    mask = None if request.real.all() else request.real.to(device)
    adapters, members = None, []
    if request.version is not None:
        adapter = request_adapter(AdapterUse(request.version), trunk.linear_layers, device, trains=True)
        adapters, members = SeparateAdapters([Span(rows * request.tokens, 0, adapter)]), [0]
    with trunk.adapted(adapters):
        graph = trunk.graph(Rows(request.activations.double().to(device), mask))
        at_input, of_adapters = graph.all_gradients(request.gradients.double().to(device), members, {})
    of_adapter = of_adapters[0].cpu() if members else None
    return Numbers(graph.output.detach().cpu(), at_input.cpu(), of_adapter)


def errors_of(found: Numbers, expected: Numbers, request: Request) -> tuple[float, float, float]:
    """Return the errors of output, gradient at the input, and gradient of the adapter, without those of padding."""
    real = request.real
    of_adapter = 0.0
    if found.of_adapter is not None and expected.of_adapter is not None:
        of_adapter = error(found.of_adapter, expected.of_adapter)
    return (
        error(found.output[real], expected.output[real]),
        error(found.at_input[real], expected.at_input[real]),
        of_adapter,
    )


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest difference, over the largest magnitude of the exact values."""
    return float((ours.double() - exact.double()).abs().max() / exact.double().abs().max())


def split_row(model: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Compare a step of a split model with that of the whole one, both in this dtype on this device."""
    reference, ids = resolve(model), torch.arange(60, device=device).view(2, 30) % CONFIG.vocab_size
    dtype_name = str(dtype).removeprefix("torch.")
    batches = ("--max-batch-tokens", "512", "--merge-below-tokens", "64")  # one client: not measured
    serving = ("--model", model, "--cut", CUT, "--dtype", dtype_name, "--device", device, *batches)
    with trunk_daemon(*serving) as daemon, zsl.RemoteTrunk(daemon["endpoint"]) as trunk:
        models = (zsl.load_client(reference, trunk, dtype=dtype, layers="client"), load_whole(reference, dtype))
        pairs = []
        for one in models:
            one.to(torch.device(device))  # type: ignore[arg-type]
            output = one(input_ids=ids, labels=ids, use_cache=False)
            output.loss.backward()
            embeddings: Any = one.get_input_embeddings()
            pairs.append((output.logits.detach(), embeddings.weight.grad))
    (logits, at_weights), (local_logits, at_local_weights) = pairs
    errors = error(logits, local_logits), error(at_weights, at_local_weights)
    return {
        "path": "split over local",
        "dtype": dtype_name,
        "output_ppm": errors[0] * 1e6,
        "gradient_ppm": errors[1] * 1e6,
        "tolerance_ppm": TOLERANCES[dtype] * 1e6,
        "within": "yes" if max(errors) <= TOLERANCES[dtype] else "NO",
    }


@contextmanager
def varlen_calls() -> Iterator[list[None]]:
    """Count the calls of the variable-length flash kernel."""
    calls: list[None] = []
    kernel = attention.varlen_attn  # type: ignore[attr-defined]

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        return kernel(*arguments, **options)

    attention.varlen_attn = counted  # type: ignore[attr-defined]
    try:
        yield calls
    finally:
        attention.varlen_attn = kernel  # type: ignore[attr-defined]


@contextmanager
def no_failed_passes() -> Iterator[None]:
    """Raise `RuntimeError` if the daemon's computation logs a failed pass: it runs the requests one by one then."""
    failed: list[str] = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            failed.append(record.getMessage())

    handler, logger = Note(logging.ERROR), logging.getLogger("zsl.trunk.compute.engine")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    if failed:
        raise RuntimeError(failed[0])
