"""RemoteTrunk as autograd, PEFT and Python see it."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.autograd import forward_ad

import zsl
from support import batches
from support.compare import differing, numbers_of
from support.embedded import served
from support.models import LAYERS, local_model, with_lora
from zsl.errors import BadShapeError, ClosedError, ConfigError, ModelError, WrongModelError
from zsl.split.stack import find_stack
from zsl.wire.messages import Cut


@pytest.fixture(scope="module")
def path(checkpoints: Callable[..., Path]) -> str:
    return str(checkpoints("llama"))


@pytest.fixture(scope="module")
def endpoint(path: str) -> Iterator[str]:
    with served(path) as running:
        yield running


@pytest.fixture
def trunk(endpoint: str) -> Iterator[zsl.RemoteTrunk]:
    made = zsl.RemoteTrunk(endpoint)
    yield made
    made.close()


def side_gradients(model: PeftModel) -> dict[str, list[torch.Tensor | None]]:
    """The gradients of the LoRA parameters in front of the trunk and behind it."""
    sides: dict[str, list[torch.Tensor | None]] = {"bottom": [], "top": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sides["bottom" if ".layers.0." in name or ".layers.1." in name else "top"].append(parameter.grad)
    assert sides["bottom"] and sides["top"]
    return sides


def test_the_model_is_the_real_class_with_its_true_layers(path: str, trunk: zsl.RemoteTrunk) -> None:
    model, whole = zsl.load_client(path, trunk), local_model(path)
    assert isinstance(model, type(whole))
    assert model.config.num_hidden_layers == LAYERS == len(find_stack(model).layers)
    ours, theirs = model.state_dict(), whole.state_dict()
    assert {name for name in theirs if name not in ours} == {
        n for n in theirs if ".layers.2." in n or ".layers.3." in n
    }
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_it_has_no_weights_and_no_buffers_and_says_where_it_leads(path: str, trunk: zsl.RemoteTrunk) -> None:
    assert "not connected" in repr(trunk)
    zsl.load_client(path, trunk)
    assert list(trunk.state_dict()) == list(trunk.buffers()) == []
    assert f"{trunk.endpoint}, mode=exact, cut=2:4, session=" in repr(trunk)


def test_straight_through_gives_every_lora_parameter_a_gradient(path: str, endpoint: str) -> None:
    trunk = zsl.RemoteTrunk(endpoint, mode="straight-through")
    split, whole = with_lora(zsl.load_client(path, trunk)), with_lora(local_model(path))
    ours, exact = numbers_of(split, batches.plain()), numbers_of(whole, batches.plain())
    assert torch.equal(ours.loss, exact.loss)
    sides = side_gradients(split)
    assert all(gradient is not None and gradient.abs().sum() > 0 for side in sides.values() for gradient in side)
    assert any("layers.0." in name for name in differing(ours, exact)), "the bottom's gradient is an approximation"
    assert not any("layers.5." in name for name in differing(ours, exact)), "the top's gradient is exact"
    assert trunk.client.status().held_bytes == 0
    trunk.close()


def test_none_leaves_the_bottom_without_gradients_and_warns(path: str, endpoint: str) -> None:
    trunk = zsl.RemoteTrunk(endpoint, mode="none")
    with pytest.warns(UserWarning, match="mode is 'none': no gradient"):
        split = with_lora(zsl.load_client(path, trunk))
    ours, exact = numbers_of(split, batches.plain()), numbers_of(with_lora(local_model(path)), batches.plain())
    sides = side_gradients(split)
    assert all(gradient is None for gradient in sides["bottom"])
    assert all(gradient is not None for gradient in sides["top"])
    assert torch.equal(ours.loss, exact.loss)
    trunk.close()


def test_a_forward_only_daemon_turns_exact_into_none_with_a_warning(path: str) -> None:
    with served(path, forward_only=True) as endpoint:
        trunk = zsl.RemoteTrunk(endpoint)
        with pytest.warns(UserWarning, match="forward only.*'none'"):
            split = with_lora(zsl.load_client(path, trunk))
        assert (trunk.mode, trunk.effective_mode) == ("exact", "none")
        numbers_of(split, batches.plain())
        assert all(gradient is None for gradient in side_gradients(split)["bottom"])
        trunk.close()


def test_an_unknown_mode_is_refused_with_the_known_ones(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="exact, straight-through, none"):
        zsl.RemoteTrunk(endpoint, mode="approximate")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="drop, send"):
        zsl.RemoteTrunk(endpoint, padding="keep")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")  # Dynamo's own, of what it looks at
def test_a_compiled_model_computes_what_the_model_does(
    path: str, trunk: zsl.RemoteTrunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    complaints: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    split, batch = zsl.load_client(path, trunk), batches.padded("left")
    eager = numbers_of(split, batch)
    split.compile(backend="eager")
    assert differing(numbers_of(split, batch), eager) == []
    torch.compiler.reset()
    assert complaints == []


def test_a_second_backward_on_a_retained_graph_gives_the_same_gradient(path: str, trunk: zsl.RemoteTrunk) -> None:
    split = with_lora(zsl.load_client(path, trunk))
    loss = split(**batches.plain()).loss
    gradients = []
    for retain in (True, False):
        split.zero_grad(set_to_none=True)
        loss.backward(retain_graph=retain)
        gradients.append([p.grad for p in split.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_graph_that_is_dropped_is_released_at_the_daemon(path: str, trunk: zsl.RemoteTrunk) -> None:
    split = with_lora(zsl.load_client(path, trunk))
    loss = split(**batches.plain()).loss
    assert trunk.client.status().held_bytes > 0
    del loss
    gc.collect()
    assert trunk.client.status().held_bytes == 0


def test_a_forward_that_needs_no_gradient_holds_nothing(path: str, trunk: zsl.RemoteTrunk) -> None:
    split = with_lora(zsl.load_client(path, trunk), layers=(4, 5))  # adapters behind the trunk only
    output = split(**batches.plain())
    assert trunk.client.status().held_bytes == 0
    output.loss.backward()


def test_gradient_checkpointing_on_the_clients_layers_changes_no_number(path: str, trunk: zsl.RemoteTrunk) -> None:
    split, whole = with_lora(zsl.load_client(path, trunk)), with_lora(local_model(path))
    split.get_base_model().activation_checkpointing_enable()
    split.train()
    assert differing(numbers_of(split, batches.plain()), numbers_of(whole, batches.plain())) == []


def test_a_copy_shares_the_connection_and_a_pickle_connects_again(path: str, trunk: zsl.RemoteTrunk) -> None:
    model = zsl.load_client(path, trunk)
    ids = batches.tokens(1, 8)
    expected = model(input_ids=ids).logits
    copied = copy.deepcopy(trunk)
    assert copied.client is trunk.client
    pickled = pickle.loads(pickle.dumps(trunk))
    assert "not connected" in repr(pickled)
    hidden = torch.randn(1, 8, 32)
    one, two = copy.deepcopy(trunk), pickled
    one.in_model = two.in_model = False
    assert torch.equal(one(hidden), two(hidden))
    assert pickled.client is not trunk.client
    assert torch.equal(model(input_ids=ids).logits, expected)
    pickled.close()


def test_a_copy_of_a_split_model_works_beside_it(path: str, trunk: zsl.RemoteTrunk) -> None:
    model = with_lora(zsl.load_client(path, trunk))
    copied = copy.deepcopy(model)
    batch = batches.padded("left")
    assert differing(numbers_of(copied, batch), numbers_of(model, batch)) == []


def test_a_trunk_that_is_used_for_another_model_refuses_it(
    path: str, trunk: zsl.RemoteTrunk, checkpoints: Callable[..., Path]
) -> None:
    zsl.load_client(path, trunk)
    zsl.load_client(path, trunk)
    with pytest.raises(WrongModelError, match=r"RemoteTrunk.*llama.*2:4"):
        zsl.load_client(str(checkpoints("llama", seed=7)), trunk)
    with pytest.raises(WrongModelError, match=r"RemoteTrunk.*llama.*2:4"):
        zsl.load_client(path, trunk, cut=Cut(start=1, stop=4))


def test_tensors_that_stay_inside_the_trunk_are_refused_by_name(path: str, trunk: zsl.RemoteTrunk) -> None:
    model = zsl.load_client(path, trunk)
    with pytest.raises(ModelError, match="output_hidden_states"):
        model(input_ids=batches.tokens(1, 4), output_hidden_states=True)
    with pytest.raises(ModelError, match="output_router_logits"):
        model(input_ids=batches.tokens(1, 4), output_router_logits=True)
    model.config.output_hidden_states = True
    with pytest.raises(ModelError, match="output_hidden_states"):
        model(input_ids=batches.tokens(1, 4))


def test_continuous_batching_is_refused_by_name(path: str, trunk: zsl.RemoteTrunk) -> None:
    model = with_lora(zsl.load_client(path, trunk))
    with pytest.raises(ModelError, match="generate_batch"):
        model.generate_batch([[3, 4, 5]])


def test_inference_mode_gives_the_local_numbers_and_training_goes_on_after_it(
    path: str, trunk: zsl.RemoteTrunk
) -> None:
    split, whole = with_lora(zsl.load_client(path, trunk)), with_lora(local_model(path))
    with torch.inference_mode():
        assert torch.equal(split(**batches.plain()).logits, whole(**batches.plain()).logits)
    assert differing(numbers_of(split, batches.plain()), numbers_of(whole, batches.plain())) == []


def test_what_is_kept_of_an_inference_tensor_is_not_changed_by_writes(trunk: zsl.RemoteTrunk) -> None:
    with torch.inference_mode():
        activations = torch.randn(1, 8, 32)
        gradients = torch.ones_like(activations)
        step = trunk.client.forward(activations, keep=True)
        sent = step.inputs()["activations"]
        assert sent is not None
        before = sent.clone()
        activations.zero_()
        assert torch.equal(sent, before)
        assert trunk.client.backward(step, gradients).tensor.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, when it is first used
def test_forward_mode_differentiation_is_refused_not_taken_for_zero(trunk: zsl.RemoteTrunk) -> None:
    hidden = torch.zeros(1, 2, 32)
    with forward_ad.dual_level(), pytest.raises(ModelError, match="forward-mode"):
        trunk(forward_ad.make_dual(hidden, torch.ones_like(hidden)))


def test_leaving_its_context_closes_it(endpoint: str) -> None:
    with zsl.RemoteTrunk(endpoint) as trunk:
        trunk(torch.zeros(1, 2, 32))
    with pytest.raises(ClosedError):
        trunk(torch.zeros(1, 2, 32))


def test_autocast_is_warned_of_once(path: str, trunk: zsl.RemoteTrunk) -> None:
    model = zsl.load_client(path, trunk)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match=r"torch\.bfloat16.*torch\.float32.*bf16=False"):
            model(input_ids=batches.tokens(1, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(input_ids=batches.tokens(1, 4))


def test_a_4_d_mask_is_refused_by_shape(path: str, trunk: zsl.RemoteTrunk) -> None:
    model = zsl.load_client(path, trunk)
    with pytest.raises(ModelError, match=r"mask .*\(1, 1, 4, 4\)"):
        model(input_ids=batches.tokens(1, 4), attention_mask=torch.zeros(1, 1, 4, 4))


def test_a_mask_never_outlives_its_call(path: str, trunk: zsl.RemoteTrunk) -> None:
    model = zsl.load_client(path, trunk)
    ids = batches.tokens(3, 16)
    expected = model(input_ids=ids).logits
    model(input_ids=ids, attention_mask=batches.padded("left")["attention_mask"])
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_other_weights_another_cut_and_another_model_are_refused(
    endpoint: str, checkpoints: Callable[..., Path], path: str
) -> None:
    for reference, cut, word in (
        (str(checkpoints("llama", seed=7)), None, "weights"),
        (str(checkpoints("qwen2")), None, "type llama.* type qwen2"),
        (str(checkpoints("llama", hidden_size=64)), None, "hidden size 32.* 64"),
        (path, Cut(start=1, stop=4), "cut 2:4"),
    ):
        trunk = zsl.RemoteTrunk(endpoint)
        with pytest.raises(WrongModelError, match=word):
            zsl.load_client(reference, trunk, cut=cut)


def test_a_wrong_hidden_size_at_the_module_is_one_clear_error(endpoint: str) -> None:
    trunk = zsl.RemoteTrunk(endpoint)
    with pytest.raises(BadShapeError, match=r"hidden size 33.* 32"):
        trunk(torch.zeros(1, 2, 33))
    trunk.close()


def test_a_hidden_state_of_bfloat16_comes_back_as_bfloat16(endpoint: str) -> None:
    trunk = zsl.RemoteTrunk(endpoint)
    assert trunk(torch.zeros(1, 2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    trunk.close()


def test_a_trunk_of_another_dtype_is_warned_of(endpoint: str, path: str) -> None:
    trunk = zsl.RemoteTrunk(endpoint)
    with pytest.warns(UserWarning, match="torch.float32.*torch.bfloat16"):
        zsl.load_client(path, trunk, dtype=torch.bfloat16)
    trunk.close()


def test_a_plain_use_warns_of_nothing(endpoint: str, path: str) -> None:
    trunk = zsl.RemoteTrunk(endpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model: nn.Module = zsl.load_client(path, trunk)
        model(**batches.plain()).loss.backward()
    trunk.close()
