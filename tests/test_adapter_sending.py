"""Adapters on the trunk's layers at the client: which are found, what is sent, how often, and what comes back."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

import zsl
from support.echo import HIDDEN
from support.models import CUT
from support.rogue import EPOCH, SESSION, Answer, Rogue
from zsl.client.gradient_sum import StepSums, micro_batch
from zsl.client.overlap import run_overlapped
from zsl.client.replayable_step import CallAdapter
from zsl.client.trunk_adapters import TrunkAdapters
from zsl.errors import AdapterError, ModelError, UnknownAdapterError, UnknownSessionError, UnknownSumError
from zsl.link.adapter_versions import EncodedAdapter
from zsl.models.loading import load_client_part
from zsl.models.reference import resolve
from zsl.split.cut import parse_cut
from zsl.split.no_weights import NoWeights, make_ghosts
from zsl.split.stack import find_stack
from zsl.wire.adapter_layout import decode_layout, version_of
from zsl.wire.messages import (
    Adapter,
    AdapterLimits,
    Backward,
    Error,
    Forward,
    Header,
    Hello,
    Result,
    TensorDescriptor,
    Welcome,
    WorkHeader,
)

LIMITS = AdapterLimits(max_rank=64, max_bytes=1 << 20)
PIECE_BYTES = 400


class ScalingDaemon:
    """Trunk that multiplies activations by the sum of the adapter's weights, and refuses versions that it lacks.

    `lost`: number of requests that are refused, together, although their version has come.
    `lost_sums`: number of the backwards after which it has lost the sum of their adapter gradients.
    `sessions`: ids of its sessions, in turn.
    """

    def __init__(
        self,
        limits: AdapterLimits | None = LIMITS,
        *,
        lost: int = 0,
        lost_sums: Collection[int] = (),
        sessions: Sequence[bytes] = (SESSION,),
    ) -> None:
        self._sums: dict[int, list[float]] = {}
        self._lost_sums, self._summands = lost_sums, 0
        self._limits, self._lost, self._sessions = limits, lost, list(sessions)
        self._received: dict[bytes, bytes] = {}
        self._activations: dict[int, np.ndarray[Any, Any]] = {}
        self._refused: list[Answer] = []
        self.layouts: list[Any] = []
        self.rogue = Rogue(self._answer, hello=self._welcome)

    @property
    def pieces(self) -> list[Adapter]:
        return [header for header in self.rogue.heard if isinstance(header, Adapter)]

    @property
    def requests(self) -> list[Any]:
        return [header for header in self.rogue.heard if isinstance(header, WorkHeader)]

    def _welcome(self, hello: Hello, welcome: Welcome) -> list[Header]:
        session = self._sessions.pop(0) if len(self._sessions) > 1 else self._sessions[0]
        limits = welcome.limits.model_copy(update={"max_message_bytes": PIECE_BYTES})
        return [welcome.model_copy(update={"adapters": self._limits, "limits": limits, "session": session})]

    def _answer(self, header: Any) -> list[Answer]:
        message = self.rogue.last
        buffers = {one.role: bytes(buffer) for one, buffer in zip(header.tensors, message.buffers, strict=True)}
        if isinstance(header, Adapter):
            so_far = b"" if header.offset == 0 else self._received[header.version]
            assert len(so_far) == header.offset
            self._received[header.version] = so_far + buffers["weights"]
            if header.offset == 0:
                self.layouts.append(decode_layout(buffers["layout"]))
            if header.offset + len(buffers["weights"]) == header.nbytes:
                layout = self.layouts[-1].encoded()
                assert version_of(layout, header.dtype, self._received[header.version]) == header.version
            return []
        weights = np.ones(1, np.float32)
        if header.adapter is not None:
            if self._lost:
                self._refused.append((refusal(header, UnknownAdapterError), ()))
                if len(self._refused) < self._lost:
                    return []
                self._lost = 0
                return self._refused
            weights = np.frombuffer(self._received[header.adapter.version], np.float32)
        factor = weights.sum(dtype=np.float32)
        if "activations" in buffers:
            self._activations[header.request] = np.frombuffer(buffers["activations"], np.float32)
        if isinstance(header, Forward):
            return [result(header, {"activations": self._activations[header.request] * factor})]
        gradients = np.frombuffer(buffers["gradients"], np.float32)
        activations = self._activations.get(header.request, self._activations.get(header.step))
        assert activations is not None
        answers = {"gradients": gradients * factor}
        total = (gradients * activations).sum()
        if header.adapter_sum is not None:
            summed = self._sums.setdefault(header.adapter_sum.name, [])
            if len(summed) != header.adapter_sum.position:
                return [(refusal(header, UnknownSumError), ())]
            summed.append(total)
            total = sum(summed)
            self._summands += 1
            if self._summands in self._lost_sums:
                self._sums.clear()
        if header.adapter_gradients:
            answers["adapter_gradients"] = np.full_like(weights, total)
        return [result(header, answers)]

    @contextmanager
    def running(self) -> Iterator[ScalingDaemon]:
        with self.rogue:
            yield self


def refusal(header: WorkHeader, kind: Any) -> Error:
    return Error(
        request=header.request,
        session=header.session,
        epoch=EPOCH,
        code=kind.code,
        retry=kind.retry,
        retry_after_ms=0,
        text="on purpose",
    )


def result(header: WorkHeader, tensors: dict[str, np.ndarray[Any, Any]]) -> Answer:
    described = []
    for role, one in tensors.items():
        shape = (one.size,) if role == "adapter_gradients" else (1, one.size // HIDDEN, HIDDEN)
        fields = {"role": role, "dtype": "f32", "shape": shape, "nbytes": one.nbytes}
        described.append(TensorDescriptor.model_validate(fields))
    named = {"session": header.session, "epoch": EPOCH, "request": header.request}
    answer = Result.model_validate({**named, "merged": 1, "queue_us": 0, "compute_us": 0, "tensors": described})
    return answer, [one.astype(np.float32).tobytes() for one in tensors.values()]


def slots(rank: int = 2, **keys: Any) -> dict[int, Any]:
    """A trunk's only layer, number 2, with LoRA on its linear module."""
    layer = nn.ModuleDict({"proj": nn.Linear(HIDDEN, HIDDEN, bias=False)})
    make_ghosts(layer, "2", torch.device("cpu"))
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=rank, target_modules=["proj"], **keys), layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.uniform_(0.5, 1.5)
    slot = NoWeights()
    slot.adopt(layer)
    return {2: slot}


def version(seed: int = 0) -> EncodedAdapter:
    found = TrunkAdapters().find(slots(rank=30))
    assert found is not None
    weights = np.arange(seed, seed + 240, dtype=np.float32).data.cast("B")  # 960 bytes: three pieces
    return EncodedAdapter(version_of(found.encoded_layout, "f32", weights), found.encoded_layout, "f32", weights)


def some(value: float = 1.0) -> torch.Tensor:
    return torch.full((1, 2, HIDDEN), value)


def test_a_version_is_sent_once_in_pieces_before_the_first_request_that_names_it() -> None:
    with ScalingDaemon().running() as daemon, zsl.TrunkClient(daemon.rogue.endpoint) as client:
        one, two = CallAdapter(version(0), dropout_seed=7), CallAdapter(version(1))
        client.forward(some())
        step = client.forward(some(), adapter=one, keep=True)
        client.forward(some(), adapter=two)
        client.forward(some(), adapter=one)
        answer = client.backward(step, some(), adapter_gradients=True)
        assert answer.adapter_gradients is not None and answer.adapter_gradients.shape == (240,)
        heard = [header for header in daemon.rogue.heard if isinstance(header, Adapter | WorkHeader)]
        kinds = [type(header).__name__[0] for header in heard]
        assert "".join(kinds) == "FAAAFAAAFFB"
        assert [(piece.offset, piece.nbytes) for piece in daemon.pieces] == [(0, 960), (400, 960), (800, 960)] * 2
        assert [piece.request for piece in daemon.pieces[:3]] == [heard[4].request] * 3
        used = [header.adapter for header in daemon.requests]
        assert used == [None, one.header, two.header, one.header, one.header]
        assert (client.replays, daemon.requests[-1].adapter_gradients) == (0, True)
        traffic = client.traffic
        assert 2 * 960 < traffic.adapter_bytes_up < 2 * 960 + 4000 < traffic.bytes_up + 4000
        assert traffic.adapter_bytes_down == 960


def test_a_version_that_the_daemon_lost_is_sent_once_more_for_all_that_were_refused() -> None:
    with ScalingDaemon(lost=5).running() as daemon, zsl.TrunkClient(daemon.rogue.endpoint) as client:
        adapter = CallAdapter(version())
        submitted = [client.submit_forward(some(), adapter=adapter) for _ in range(5)]
        for step, future in submitted:
            client.finish_forward(step, client.wait(future))
            assert torch.equal(step.output, some(float(sum(range(240)))))
        assert [piece.offset for piece in daemon.pieces] == [0, 400, 800] * 2
        assert client.replays == 5


def test_a_version_that_is_lost_again_and_again_is_a_typed_error() -> None:
    daemon = ScalingDaemon()
    daemon.rogue.answers = lambda header: [(refusal(header, UnknownAdapterError), ())] * isinstance(header, Forward)
    with daemon.running(), zsl.TrunkClient(daemon.rogue.endpoint) as client, pytest.raises(UnknownAdapterError):
        client.forward(some(), adapter=CallAdapter(version()))


@pytest.mark.parametrize(("second", "times"), [(SESSION, 1), (b"t" * 16, 2)], ids=["resumed", "another"])
def test_another_session_is_sent_the_version_again(second: bytes, times: int) -> None:
    daemon = ScalingDaemon(sessions=[SESSION, second])
    answer, refused = daemon.rogue.answers, []

    def once_not_known(header: Any) -> Sequence[Answer]:
        if isinstance(header, Backward) and not refused:
            refused.append(header)
            return [(refusal(header, UnknownSessionError), ())]
        return answer(header)

    daemon.rogue.answers = once_not_known
    with daemon.running(), zsl.TrunkClient(daemon.rogue.endpoint) as client:
        step = client.forward(some(), adapter=CallAdapter(version()), keep=True)
        answered = client.backward(step, some(), adapter_gradients=True)
        assert answered.adapter_gradients is not None
        assert [piece.offset for piece in daemon.pieces] == [0, 400, 800] * times
        assert {piece.session for piece in daemon.pieces} == {SESSION, second}


def test_the_asyncio_face_sends_adapters_too() -> None:
    async def run(endpoint: str) -> None:
        async with zsl.AsyncTrunkClient(endpoint) as client:
            step = await client.forward(some(), adapter=CallAdapter(version()), keep=True)
            answer = await client.backward(step, some(), adapter_gradients=True)
            assert answer.adapter_gradients is not None and answer.adapter_gradients.eq(8.0).all()

    with ScalingDaemon().running() as daemon:
        asyncio.run(run(daemon.rogue.endpoint))


@contextmanager
def remote(daemon: ScalingDaemon, **how: Any) -> Iterator[Callable[..., torch.Tensor]]:
    """A function that runs activations through the trunk with what is in the slots."""
    with daemon.running(), zsl.RemoteTrunk(daemon.rogue.endpoint, **how) as trunk:

        def run(activations: torch.Tensor, in_slots: dict[int, Any], *, training: bool = True) -> torch.Tensor:
            trunk.train(training)
            trunk.observe_inputs(None, None, (), in_slots)
            output: torch.Tensor = trunk(activations)
            return output

        yield run


@pytest.mark.parametrize(
    ("limits", "kind", "words"),
    [
        (None, ModelError, r"no adapters.*layers=\"client\".*--no-adapters"),
        (AdapterLimits(max_rank=1, max_bytes=1000), AdapterError, r"2\.proj .*rank 2\b.* 1: .*--max-adapter-rank"),
        (AdapterLimits(max_rank=64, max_bytes=60), AdapterError, r"\b64 bytes.* 60: .*adapter_wire_dtype"),
    ],
    ids=["none", "rank", "bytes"],
)
def test_what_the_daemon_does_not_accept_is_refused_before_anything_is_sent(
    limits: AdapterLimits | None, kind: type[Exception], words: str
) -> None:
    daemon = ScalingDaemon(limits)
    with remote(daemon) as run:
        with pytest.raises(kind, match=words):
            run(some(), slots())
        assert torch.equal(run(some(), {}), some())
        assert daemon.pieces == []


def lora_parameters(in_slots: dict[int, Any]) -> list[nn.Parameter]:
    return [parameter for parameter in in_slots[2].parameters() if parameter.requires_grad]


@pytest.mark.parametrize("bottom_learns", [True, False])
def test_gradients_reach_the_adapter_and_what_is_in_front_of_the_trunk(bottom_learns: bool) -> None:
    daemon, in_slots = ScalingDaemon(), slots()
    parameters = lora_parameters(in_slots)
    with remote(daemon) as run:
        activations = some(2.0).requires_grad_(bottom_learns)
        output = run(activations, in_slots)
        factor = float(torch.cat([parameter.detach().flatten() for parameter in parameters]).sum())
        assert torch.allclose(output, some(2.0) * factor)
        with torch.no_grad():
            parameters[0].data.mul_(3)  # after the forward: the backward is the forward's
        output.sum().backward(retain_graph=True)
        assert all(parameter.grad is not None and parameter.grad.eq(16.0).all() for parameter in parameters)
        output.sum().backward()
        assert all(parameter.grad is not None and parameter.grad.eq(32.0).all() for parameter in parameters)
        assert (activations.grad is not None) == bottom_learns
        if activations.grad is not None:
            assert torch.allclose(activations.grad, some(2 * factor))
        assert len(daemon.pieces) == 1
        with torch.no_grad():
            assert not torch.equal(run(some(), in_slots), output)
        assert len(daemon.pieces) == 2, "weights written through .data are another version"
        frozen = slots()
        for parameter in frozen[2].parameters():
            parameter.requires_grad_(False)
        run(some().requires_grad_(), frozen).sum().backward()
        assert [header.adapter_gradients for header in daemon.requests if isinstance(header, Backward)] == [
            True,
            True,
            False,
        ]


def micro_batches(run: Any, in_slots: dict[int, Any], in_flight: int) -> list[torch.Tensor]:
    """The adapter's gradients of three micro-batches, overlapped or one after the other."""
    activations = [some(float(value)) for value in range(1, 4)]
    steps = [lambda one=one: run(one, in_slots).sum().backward() for one in activations]
    if in_flight > 1:
        run_overlapped(steps, in_flight=in_flight)
    else:
        sums = StepSums()
        for number, step in enumerate(steps, 1):
            with micro_batch(sums, is_last=number == len(steps)):
                step()
        sums.close()
    return [parameter.grad for parameter in lora_parameters(in_slots) if parameter.grad is not None]


@pytest.mark.parametrize("lost_sums", [(), (1,), (2,), (1, 2, 4), (2, 5, 8, 9)])
@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_micro_batches_get_the_sum_of_their_gradients_though_daemons_lose_it(
    in_flight: int, lost_sums: tuple[int, ...]
) -> None:
    daemon, in_slots = ScalingDaemon(lost_sums=lost_sums), slots()
    with remote(daemon) as run:
        gradients = micro_batches(run, in_slots, in_flight)
        assert len(gradients) == 2 and all(gradient.eq(48.0).all() for gradient in gradients)
        assert len(daemon.pieces) == 1
        answered = [header for header in daemon.requests if isinstance(header, Backward) and header.adapter_gradients]
        assert len(answered) == 1 or lost_sums, "gradients of the adapter cross once"


def test_a_sum_that_is_always_lost_is_an_error() -> None:
    daemon, in_slots = ScalingDaemon(lost_sums=range(1, 100)), slots()
    with remote(daemon) as run, pytest.raises(UnknownSumError):
        micro_batches(run, in_slots, in_flight=1)


def test_a_sum_that_the_last_micro_batch_does_not_ask_for_is_fetched_at_the_end_of_the_step() -> None:
    daemon, in_slots = ScalingDaemon(), slots()
    with remote(daemon) as run:
        sums = StepSums()
        for value in (1.0, 2.0):
            with micro_batch(sums, is_last=False):
                run(some(value), in_slots).sum().backward()
        assert all(parameter.grad is None for parameter in lora_parameters(in_slots))
        sums.close()
        gradients = [parameter.grad for parameter in lora_parameters(in_slots)]
        assert all(gradient is not None and gradient.eq(24.0).all() for gradient in gradients)


def test_dropout_has_a_seed_of_torchs_generator_in_training_only() -> None:
    daemon, in_slots = ScalingDaemon(), slots(lora_dropout=0.25)
    with remote(daemon) as run:
        for _ in range(2):
            torch.manual_seed(5)
            run(some(), in_slots).sum().backward()
        expected = torch.manual_seed(5) and int(torch.randint(0, 2**53, ()))
        run(some(), in_slots)
        in_slots[2].eval()
        before = torch.get_rng_state()
        run(some(), in_slots, training=False)
        assert torch.equal(torch.get_rng_state(), before)
        seeds = [header.adapter.dropout_seed for header in daemon.requests]
        assert seeds[:4] == [expected] * 4
        assert seeds[4] not in (expected, None) and seeds[5] is None
        assert len(daemon.pieces) == 1, "training and evaluation have one layout"
        assert daemon.layouts[0].modules[0].dropout == 0.25


def test_a_narrower_wire_dtype_halves_the_bytes() -> None:
    daemon = ScalingDaemon()
    with remote(daemon, adapter_wire_dtype=torch.bfloat16) as run, torch.no_grad():
        run(some(), slots())
        (piece,) = daemon.pieces
        assert (piece.dtype, piece.nbytes) == ("bf16", 2 * 2 * 8)


@pytest.mark.parametrize("mode", ["none", "straight-through"])
def test_a_mode_in_which_adapters_learn_nothing_is_refused_in_training(mode: Any) -> None:
    daemon = ScalingDaemon()
    with remote(daemon, mode=mode) as run:
        with pytest.raises(ModelError, match=rf"learn nothing.*'{mode}'.*layers=\"client\""):
            run(some(), slots())
        run(some(), slots(), training=False)
        assert len(daemon.pieces) == 1


# --- what is found ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(checkpoints: Callable[..., Path]) -> Any:
    return load_client_part(resolve(str(checkpoints("llama"))), parse_cut(CUT), layers="all")


def in_the_trunk(model: Any) -> dict[int, Any]:
    layers = find_stack(getattr(model, "get_base_model", lambda: model)()).layers
    return {index: layers[index] for index in (2, 3)}


def test_the_layout_has_the_active_adapters_in_the_order_of_modules(base: Any) -> None:
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["up_proj", "q_proj"], lora_bias=False, lora_dropout=0.5)
    model = get_peft_model(copy.deepcopy(base), config)
    adapters, of = TrunkAdapters(), in_the_trunk(model)
    found = adapters.find(of)
    assert found is not None
    paths = ["2.self_attn.q_proj", "2.mlp.up_proj", "3.self_attn.q_proj", "3.mlp.up_proj"]
    assert [module.path for module in found.layout.modules] == paths
    assert {(module.rank, module.scaling, module.dropout) for module in found.layout.modules} == {(2, 4.0, 0.5)}
    named = {name: one for name, one in model.named_parameters() if ".lora_" in name and name.split(".")[4] in "23"}
    assert torch.equal(found.weights, torch.cat([parameter.flatten() for parameter in named.values()]))
    assert found.has_dropout and adapters.find(of).layout is found.layout  # type: ignore[union-attr]
    assert adapters.version(found, None) is adapters.version(found, None)

    of[3].mlp.eval()
    mixed = adapters.find(of)
    assert mixed is not None and [module.dropout for module in mixed.layout.modules] == [0.5, 0.5, 0.5, 0.0]

    model.add_adapter("more", LoraConfig(r=3, target_modules=["up_proj"], use_rslora=True))
    model.base_model.set_adapter(["default", "more"])
    both = adapters.find(of)
    assert both is not None and [module.rank for module in both.layout.modules] == [2, 2, 3, 2, 2, 3]
    model.set_adapter("more")
    assert [module.path for module in adapters.find(of).layout.modules] == paths[1::2]  # type: ignore[union-attr]
    with model.disable_adapter():
        assert adapters.find(of) is None


def test_adapters_outside_the_trunk_are_not_sent(base: Any) -> None:
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 1, 4, 5])
    assert TrunkAdapters().find(in_the_trunk(get_peft_model(copy.deepcopy(base), config))) is None
    assert TrunkAdapters().find(in_the_trunk(base)) is None


OTHERS: dict[str, Callable[[Any], Any]] = {
    "vera": lambda model: get_peft_model(model, CONFIGS["VERA"](target_modules=["q_proj"], r=4)),
    "adalora": lambda model: get_peft_model(model, CONFIGS["ADALORA"](target_modules=["q_proj"], total_step=9)),
    "alora": lambda model: get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM")
    ),
    "adaption prompt": lambda model: get_peft_model(
        model, CONFIGS["ADAPTION_PROMPT"](adapter_layers=3, adapter_len=4, task_type="CAUSAL_LM")
    ),
    "two dtypes": lambda model: (
        made := get_peft_model(model, LoraConfig(target_modules=["q_proj"])),
        made.get_base_model().model.layers[3].self_attn.q_proj.lora_A.to(torch.bfloat16),
    )[0],
    "float64": lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"])).to(torch.float64),
    "hooks": lambda model: (
        made := get_peft_model(model, LoraConfig(target_modules=["q_proj"])),
        made.get_base_model().model.layers[3].self_attn.q_proj.register_forward_pre_hook(lambda *_: None),
    )[0],
    "a dropout of 1": lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"], lora_dropout=1.0)),
    "a weight of the user": lambda model: (
        model.model.layers[2].mlp.register_parameter("more", nn.Parameter(torch.ones(2))),
        model,
    )[1],
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_not_plain_lora_is_refused_by_name(kind: str, base: Any) -> None:
    model = OTHERS[kind](copy.deepcopy(base))
    with pytest.raises(ModelError, match=r"layers=\"client\""):
        TrunkAdapters().find(in_the_trunk(model))


def test_hooks_of_a_call_are_refused_by_the_names_of_those_that_set_them(base: Any) -> None:
    for made, call in (
        (lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"])), {"adapter_names": ["default"]}),
        (OTHERS["alora"], {"alora_offsets": [1]}),
    ):
        model: Any = made(copy.deepcopy(base)).eval()
        with (
            model.base_model._enable_peft_forward_hooks(**call),
            pytest.raises(ModelError, match=r"aLoRA.*adapter_names"),
        ):
            TrunkAdapters().find(in_the_trunk(model))
