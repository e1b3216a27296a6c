"""A trunk in 4 or 8 bits: the numbers of a local model quantized the same way."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel

import zsl
from support.adapters import local_step
from support.batches import tokens
from support.compare import differing, numbers_of
from support.daemon import Daemon
from support.embedded import served
from support.models import CONFIGS, CUT
from test_adapted_passes import check_all_routes, lora
from zsl.cli.zsl import zsl as command
from zsl.models.identity import identify
from zsl.models.loading import load_client_part, load_trunk_part
from zsl.models.quantize import bits_of
from zsl.models.reference import resolve
from zsl.split.cut import parse_cut
from zsl.split.stack import find_stack
from zsl.trunk.daemon.load import plan_trunk
from zsl.wire.messages import Quantization

pytest.importorskip("bitsandbytes")

LAYERS = range(2, 4)


def whole(
    path: Path, bits: Quantization, dtype: torch.dtype = torch.float32, auto_class: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """The local model, with all its layers in fewer bits."""
    config = BitsAndBytesConfig(load_in_8bit=True)
    if bits == "4bit":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model: PreTrainedModel = auto_class.from_pretrained(path, dtype=dtype, quantization_config=config)
    model.config.use_cache = False
    return model.train()


@pytest.mark.parametrize(
    ("family", "bits", "dtype"),
    [
        ("gpt2", "4bit", torch.float32),
        ("llama", "4bit", torch.bfloat16),
        ("llama", "8bit", torch.float32),
    ],
)
def test_all_numbers_are_those_of_a_local_model_with_the_same_bits(
    family: str,
    bits: Quantization,
    dtype: torch.dtype,
    checkpoints: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = checkpoints(family)
    plan = plan_trunk(str(path), parse_cut(CUT), dtype, "cpu", forward_only=False, quantize=bits)
    compute = plan.load(max_batch_tokens=512, merge_below_tokens=64)
    model = whole(path, bits, dtype)
    traits = compute.traits
    assert traits.packs and traits.merges_adapters
    trunk = load_trunk_part(resolve(str(path)), plan.cut)
    assert traits.parameters == sum(parameter.numel() for parameter in trunk.parameters())
    quantized = sum(p.nbytes for p in compute.trunk.model.parameters() if not p.is_floating_point())
    linear = sum(inputs * outputs for inputs, outputs in traits.adaptable.values())
    assert quantized == (linear // 2 if bits == "4bit" else linear)
    step = local_step(model, tokens(2, 9, 3), LAYERS, lora(fan_in_fan_out=family == "gpt2"))
    compute.trunk.own_attention = False  # its attention on a CPU rounds less than the local model's
    check_all_routes(compute, step, monkeypatch)


def qlora(model: Any, **keys: Any) -> PeftModel:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT sets fan_in_fan_out itself
        return get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": "all-linear", **keys}))


def check_training(endpoint: str, path: Path, bits: Quantization, **keys: Any) -> None:
    """QLoRA on all layers, those of the trunk too: three steps."""
    with zsl.RemoteTrunk(endpoint) as trunk:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            split = zsl.load_client(str(path), trunk, quantize=bits)
        assert trunk.client.welcome.quantization == bits
        models = [qlora(model, **keys) for model in (split.train(), whole(path, bits))]
        remote, local = ([(name, p) for name, p in m.named_parameters() if p.requires_grad] for m in models)
        assert [name for name, _ in remote] == [name for name, _ in local]
        assert all(torch.equal(one, other) for (_, one), (_, other) in zip(remote, local, strict=True))
        optimizers = [torch.optim.AdamW((p for _, p in of_one), lr=0.01) for of_one in (remote, local)]
        for seed in range(3):
            ids = tokens(2, 9, seed)
            assert differing(*(numbers_of(model, {"input_ids": ids, "labels": ids}) for model in models)) == []
            for optimizer in optimizers:
                optimizer.step()
        assert all(torch.equal(one, other) for (_, one), (_, other) in zip(remote, local, strict=True))
        with pytest.warns(UserWarning, match=bits):
            trunk.connect()


def test_four_bits_are_trained_through_a_daemon_as_locally(
    serve: Callable[..., Daemon], checkpoints: Callable[..., Path]
) -> None:
    path, daemon = checkpoints("llama"), serve("llama", "--quantize", "4bit")
    assert daemon.ready["quantization"] == "4bit"
    check_training(daemon.endpoint, path, "4bit")
    check_training(daemon.endpoint, path, "4bit", use_dora=True, target_modules=["down_proj"])
    (facts,) = json.loads(CliRunner().invoke(command, ["info", daemon.endpoint, "--json"]).output)
    assert facts["quantization"] == "4bit"
    assert facts["model"] == identify(resolve(str(path))).model_dump()


def test_eight_bits_are_trained_as_locally(checkpoints: Callable[..., Path]) -> None:
    path = checkpoints("gpt2")
    with served(str(path), quantize="8bit") as endpoint:
        check_training(endpoint, path, "8bit")


def quantized_modules(model: PreTrainedModel) -> set[str]:
    """The paths of the quantized modules, within the decoder layers or the model."""
    prefix = f"{find_stack(model).name}."
    return {name.removeprefix(prefix) for name, module in model.named_modules() if bits_of(module)}


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_both_parts_quantize_what_transformers_quantizes_in_the_whole_model(
    auto_class: Any, checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers keeps the module of the last parameter. In a trunk of OLMo that is a linear layer."""
    monkeypatch.setitem(CONFIGS, "olmo", CONFIGS["olmo2"])
    path = checkpoints("olmo", tie_word_embeddings=True)
    reference, cut = resolve(str(path)), parse_cut("3:6")
    trunk = quantized_modules(load_trunk_part(reference, cut, quantize="4bit"))
    client = quantized_modules(load_client_part(reference, cut, quantize="4bit", auto_class=auto_class))
    assert len(trunk) == len(client) == 3 * 7
    assert trunk | client == quantized_modules(whole(path, "4bit", auto_class=auto_class))
