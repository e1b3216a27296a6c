"""Hidden states and router logits from inside the trunk, with their gradients, where its owner reveals them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from peft import (
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    XLoraConfig,
    convert_to_lora,
    get_peft_model,
    set_peft_model_state_dict,
)
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

import zsl
from support import batches
from support.compare import differing, numbers_of, within
from support.data import synthetic_rows
from support.embedded import served
from support.models import VOCABULARY, local_model, with_lora
from support.tokenizer import tiny_tokenizer
from support.trainer_settings import silent_settings
from zsl.cli.trunkd import trunkd
from zsl.cli.zsl import zsl as command
from zsl.client.overlap import run_overlapped
from zsl.errors import BadDtypeError, BadShapeError, MalformedError, ModelError, NotRevealedError, StartupError
from zsl.split.cut import parse_cut
from zsl.trunk.daemon.load import plan_trunk

INSIDE = "1:5"  # its owner reveals the inputs of layers 2, 3 and 4
OUTSIDE = [0, 5]
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
MIXTURES: dict[str, Any] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    # Its layer 3 has no experts.
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, head_dim=8, moe_intermediate_size=32, num_experts=4, mlp_only_layers=[3])
    ),
}


@pytest.fixture(scope="module")
def revealing(
    checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], tuple[str, str]]]:
    """Checkpoint of a family, and the endpoint of its daemon, which reveals all that it has."""
    with ExitStack() as stack:
        running: dict[str, tuple[str, str]] = {}

        def started(family: str) -> tuple[str, str]:
            if family not in running and family in MIXTURES:
                path = tmp_path_factory.mktemp(family)
                torch.manual_seed(0)
                MIXTURES[family]().save_pretrained(path)
            elif family not in running:
                path = checkpoints(family)
            if family not in running:
                routers = ("router_logits",) if family in MIXTURES else ()
                daemon = served(str(path), cut=INSIDE, reveals=("hidden_states", *routers))
                running[family] = str(path), stack.enter_context(daemon)
            return running[family]

        yield started


def adapted(model: Any) -> Any:
    """With LoRA on all layers, also on those in the trunk."""
    return with_lora(model, layers=tuple(range(6)))


def probed(model: Any, batch: dict[str, Any], layer: int) -> tuple[Any, dict[str, torch.Tensor | None]]:
    """Output of a batch, and the gradients of its loss and of one on a hidden state."""
    model.zero_grad()
    output = model(**batch, output_hidden_states=True)
    (output.loss + output.hidden_states[layer].square().mean()).backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_hidden_states_and_the_gradients_through_them_are_local(
    family: str, revealing: Callable[[str], tuple[str, str]]
) -> None:
    path, endpoint = revealing(family)
    with zsl.RemoteTrunk(endpoint) as trunk:
        models = [adapted(model) for model in (zsl.load_client(path, trunk), local_model(path))]
        for layer in (3, 4, 0, 6, 1):
            # At the trunk's own input the client adds the two gradients, in another order: it rounds otherwise.
            same = within(1e-6) if layer == 1 else torch.equal
            (here, mine), (there, theirs) = (probed(model, batches.padded("right"), layer) for model in models)
            assert len(here.hidden_states) == len(there.hidden_states) == 7
            assert all(map(torch.equal, here.hidden_states, there.hidden_states))
            assert torch.equal(here.logits, there.logits)
            assert len(mine) > 40
            assert [n for n, g in mine.items() if g is None or not same(g, theirs[n])] == []  # type: ignore[arg-type]
        with torch.no_grad():
            here, there = (model(**batches.plain(), output_hidden_states=[-4, 3]) for model in models)
        assert [state is None for state in here.hidden_states] == [n != 3 for n in range(7)]
        assert torch.equal(here.hidden_states[3], there.hidden_states[3])


def test_a_call_that_fails_before_the_trunk_asks_nothing_for_the_next_one(
    revealing: Callable[[str], tuple[str, str]],
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    path, endpoint = revealing("llama")
    with zsl.RemoteTrunk(endpoint) as trunk, torch.no_grad():
        model: Any = zsl.load_client(path, trunk)
        expected = model(**batches.plain()).logits
        failing = model.model.layers[0].register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(**batches.plain(), output_hidden_states=True)
        failing.remove()
        assert torch.equal(model(**batches.plain()).logits, expected)


@pytest.mark.parametrize("cut", ["0:2", "5:6"])
def test_a_trunk_at_either_end_has_the_local_hidden_states(
    cut: str, revealing: Callable[[str], tuple[str, str]]
) -> None:
    path, _ = revealing("llama")
    # A single layer has nothing inside, so that nothing has to be revealed.
    with (
        served(path, cut=cut, reveals=("hidden_states",) if cut == "0:2" else ()) as endpoint,
        zsl.RemoteTrunk(endpoint) as trunk,
        torch.no_grad(),
    ):
        models = zsl.load_client(path, trunk), local_model(path)
        here, there = (model(**batches.plain(), output_hidden_states=True).hidden_states for model in models)
    assert len(here) == 7 and all(map(torch.equal, here, there))


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_has_the_local_auxiliary_loss_and_all_its_gradients(
    family: str, revealing: Callable[[str], tuple[str, str]]
) -> None:
    path, endpoint = revealing(family)
    with zsl.RemoteTrunk(endpoint) as trunk:
        models = []
        for model in (zsl.load_client(path, trunk), local_model(path)):
            torch.manual_seed(1)
            config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
            models.append(get_peft_model(model, config))
        for batch in (batches.plain(), batches.padded("right")):
            asked = {**batch, "output_router_logits": True}
            mine, theirs = (numbers_of(model, asked) for model in models)
            assert differing(mine, theirs) == []
            without = numbers_of(models[1], batch)
            assert "loss" in differing(theirs, without)
            assert any(".3." in name for name in differing(theirs, without))  # in the trunk too
        here, there = (model(**batches.plain(), output_router_logits=True).router_logits for model in models)
        assert len(here) == (6 if family == "mixtral" else 5) and all(map(torch.equal, here, there))


def test_what_the_owner_does_not_reveal_is_refused_by_name(checkpoints: Callable[..., Path]) -> None:
    path = str(checkpoints("mixtral"))
    with served(path) as endpoint, zsl.RemoteTrunk(endpoint) as trunk:
        model: Any = zsl.load_client(path, trunk)
        for argument, option in (("output_hidden_states", "hidden-states"), ("output_router_logits", "router-logits")):
            with pytest.raises(ModelError, match=rf"{argument}.*--reveal {option}"):
                model(**batches.plain(), **{argument: True})
        with pytest.raises(NotRevealedError, match="--reveal hidden-states"):
            trunk.client.forward(torch.zeros(1, 4, 32), reveal=["hidden_states"])
        step = trunk.client.forward(torch.zeros(1, 4, 32), keep=True)
        with pytest.raises(NotRevealedError, match="--reveal hidden-states"):
            trunk.client.backward(step, torch.zeros(1, 4, 32), at_revealed={"hidden_states": torch.zeros(1, 1, 4, 32)})


def test_gradients_of_revealed_tensors_are_checked(revealing: Callable[[str], tuple[str, str]]) -> None:
    _, endpoint = revealing("llama")
    with zsl.TrunkClient(endpoint) as client:
        x = torch.randn(2, 4, 32)
        right = torch.zeros(3, 2, 4, 32)
        asked = client.forward(x, keep=True, reveal=["hidden_states"])
        assert asked.answer is not None and asked.answer.revealed["hidden_states"].shape == right.shape
        for wrong, error in (
            (right[:2], BadShapeError),
            (right.flatten(1, 2), BadShapeError),
            (right.long(), BadDtypeError),
        ):
            with pytest.raises(error, match="hidden_states_gradients"):
                client.backward(asked, x, at_revealed={"hidden_states": wrong})
        not_asked = client.forward(x, keep=True)
        with pytest.raises(MalformedError, match="hidden_states"):
            client.backward(not_asked, x, at_revealed={"hidden_states": right})
        # Complete in itself, after its step is gone.
        expected = client.backward(asked, x, at_revealed={"hidden_states": right + 1}).tensor
        again = client.forward(x, reveal=["hidden_states"])
        assert torch.equal(client.backward(again, x, at_revealed={"hidden_states": right + 1}).tensor, expected)
        assert not torch.equal(client.backward(again, x).tensor, expected)


def test_a_trunk_without_routers_cannot_reveal_their_logits(checkpoints: Callable[..., Path]) -> None:
    plan = plan_trunk(
        str(checkpoints("llama")),
        parse_cut(INSIDE),
        torch.float32,
        "cpu",
        forward_only=False,
        reveals=("router_logits",),
    )
    with pytest.raises(StartupError, match="router-logits"):
        plan.load()


def test_the_commands_name_what_is_revealed(revealing: Callable[[str], tuple[str, str]]) -> None:
    _, endpoint = revealing("llama")
    shown = CliRunner().invoke(command, ["info", endpoint])
    assert "hidden states" in next(line for line in shown.output.splitlines() if "reveals" in line)
    wrong = CliRunner().invoke(trunkd, ["--reveal", "hidden-states,logits"])
    assert wrong.exit_code == 2 and "'logits'" in wrong.output and "router-logits" in wrong.output


def test_modes_without_their_gradients_are_refused(revealing: Callable[[str], tuple[str, str]]) -> None:
    path, endpoint = revealing("llama")
    with zsl.RemoteTrunk(endpoint, mode="straight-through") as trunk:
        model: Any = zsl.load_client(path, trunk)
        with pytest.raises(ModelError, match="straight-through"):
            model(**batches.plain(), output_hidden_states=True)
        with zsl.RemoteTrunk(endpoint) as exact:
            other: Any = zsl.load_client(path, exact)
            with pytest.raises(ModelError, match="overlap"):
                run_overlapped([lambda: other(**batches.plain(), output_hidden_states=True)], in_flight=1)


@pytest.mark.parametrize(
    ("family", "steps"), [("mixtral", 3), *(pytest.param(one, 50, marks=pytest.mark.long) for one in MIXTURES)]
)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # TRL says it by its older name
def test_sft_trainer_trains_a_mixture_with_the_local_losses(
    family: str, steps: int, revealing: Callable[[str], tuple[str, str]], tmp_path: Path
) -> None:
    path, endpoint = revealing(family)
    rows = Dataset.from_dict({"input_ids": synthetic_rows(2 * steps, 16, VOCABULARY, seed=0)})

    def trained(model: Any) -> list[tuple[float, ...]]:
        set_seed(0)
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**silent_settings(tmp_path, steps)),
            train_dataset=rows,
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "o_proj"]),
        )
        trainer.train()
        log = trainer.state.log_history
        return [tuple(entry[key] for key in ("loss", "aux_loss", "grad_norm")) for entry in log if "loss" in entry]

    with zsl.RemoteTrunk(endpoint) as trunk:
        split = trained(zsl.load_client(path, trunk))
        assert trunk.client.traffic.adapter_bytes_down > 0
    assert split == trained(local_model(path))
    assert len(set(split)) == steps and all(auxiliary > 0 for _, auxiliary, _ in split)


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter to LoRA that is already a LoRA adapter")
def test_peft_converts_an_adapter_to_lora_as_on_the_local_model(revealing: Callable[[str], tuple[str, str]]) -> None:
    path, endpoint = revealing("llama")
    adapters = (
        LoKrConfig(r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=OUTSIDE, init_weights=False),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    with zsl.RemoteTrunk(endpoint) as trunk, torch.no_grad():

        def run(model: Any) -> torch.Tensor:
            return torch.stack(model(**batches.plain(), output_hidden_states=True).hidden_states)

        def converted(load: Callable[[], Any], adapter: PeftConfig) -> tuple[dict[str, torch.Tensor], Any, Any]:
            torch.manual_seed(1)
            before = get_peft_model(load(), copy.deepcopy(adapter))
            config, weights = convert_to_lora(before, rank=32)
            after = get_peft_model(load(), config)
            set_peft_model_state_dict(after, weights)
            return weights, run(before), run(after)

        for adapter in adapters:
            mine = converted(lambda: zsl.load_client(path, trunk), adapter)
            theirs = converted(lambda: local_model(path), adapter)
            assert mine[0].keys() == theirs[0].keys()
            assert all(torch.equal(mine[0][name], theirs[0][name]) for name in mine[0])
            assert torch.equal(mine[1], theirs[1]) and torch.equal(mine[2], theirs[2])
            assert within(1e-5)(mine[2], mine[1])


def test_x_lora_has_the_local_numbers_where_its_experts_leave_the_trunk_out(
    revealing: Callable[[str], tuple[str, str]], tmp_path: Path
) -> None:
    path, endpoint = revealing("llama")

    def x_lora(model: Any, layers: list[int] | None) -> Any:
        experts = {}
        for name in ("0", "1"):
            directory = tmp_path / f"{name} {layers}"
            experts[name] = str(directory)
            if not directory.exists():
                keys = {"r": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": layers}
                torch.manual_seed(int(name))
                get_peft_model(local_model(path), LoraConfig(**keys, init_lora_weights=False)).save_pretrained(
                    experts[name]
                )
        torch.manual_seed(2)
        sizes = {
            "hidden_size": 32,
            "xlora_depth": 2,
            "xlora_size": 8,
            "layerwise_scalings": True,
            "xlora_dropout_p": 0.0,
        }
        return get_peft_model(model, XLoraConfig(task_type="CAUSAL_LM", adapters=experts, **sizes))

    with zsl.RemoteTrunk(endpoint) as trunk:
        split, whole = x_lora(zsl.load_client(path, trunk), OUTSIDE), x_lora(local_model(path), OUTSIDE)
        on_padding = batches.padded("right") | {"labels": batches.tokens(3, 16)}
        for batch in (batches.plain(), batches.padded("left"), on_padding):
            mine, theirs = numbers_of(split, batch), numbers_of(whole, batch)
            assert differing(mine, theirs) == []
        assert any(gradient is not None and gradient.any() for gradient in mine.gradients.values())
        everywhere = x_lora(zsl.load_client(path, trunk), None)
        with pytest.raises(ModelError, match=r"1\.self_attn\.q_proj.*X-LoRA.*layers_to_transform"):
            everywhere(**batches.plain())
        with everywhere.disable_adapter(), pytest.raises(ModelError, match=r"1\.self_attn\.q_proj.*X-LoRA"):
            everywhere(**batches.plain())
