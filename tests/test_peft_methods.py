"""Every method of PEFT that zsl-train takes, on bottom and top: the local model's numbers, and a file that fits it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import zsl
from support import batches
from support.compare import Numbers, differing, numbers_of, within
from support.embedded import served
from support.models import CUT, local_model
from zsl.adapters.attach import load_adapter, with_adapter
from zsl.adapters.save import ONLY_TO_USE, adapter_parameters
from zsl.client.model import put_trunk
from zsl.errors import ConfigError, ModelError
from zsl.models.identity import identify
from zsl.models.loading import load_client_part
from zsl.models.quantize import quantization_config
from zsl.models.reference import resolve
from zsl.split.cut import parse_cut
from zsl.split.sides import Sides
from zsl.split.stack import whole_class
from zsl.training.config.peft_table import SHOWN, peft_config
from zsl.training.report.overview import communication
from zsl.training.report.step_measure import StepMeasure
from zsl.trunk.daemon.load import plan_trunk

pytestmark = [
    # What PEFT remarks on these methods, with a whole local model too. Of missing keys it must not speak.
    pytest.mark.filterwarnings(f"ignore:.*{remark}")
    for remark in (
        "Unsupported layer type",
        "CUDA extension",
        "boft_n_butterfly_factor",
        "base layer has no bias",
        "Sparse invariant checks",
        "tie_word_embeddings=True",
        "fan_in_fan_out is set to True but",
    )
]

Keys = dict[str, Any]
LINEAR = {"gpt2": ["c_attn", "c_fc", "c_proj"], "llama": ["q_proj", "v_proj", "up_proj", "down_proj"]}
EMBEDDING = {"gpt2": "wte", "llama": "embed_tokens"}
NORMS = {"gpt2": ["ln_1", "ln_2", "ln_f"], "llama": ["input_layernorm", "post_attention_layernorm", "norm"]}
VIRTUAL = {"num_virtual_tokens": 5}
IDS = batches.tokens(2, 16)


def lora(**keys: Any) -> Callable[[str], Keys]:
    return lambda family: {"method": "lora", "target_modules": LINEAR[family], "r": 4, **keys}


def linear(method: str, **keys: Any) -> Callable[[str], Keys]:
    return lambda family: {"method": method, "target_modules": LINEAR[family], **keys}


def prompts(method: str, **keys: Any) -> Callable[[str], Keys]:
    return lambda family: {"method": method, **keys}


# On both families.
CASES: dict[str, Callable[[str], Keys]] = {
    "lora": lora(),
    "lora, dropout": lora(lora_dropout=0.3),
    "lora, all biases": lora(bias="all"),
    "lora, pissa": lora(init_lora_weights="pissa"),
    "lora, head": lambda family: lora()(family) | {"target_modules": [*LINEAR[family], "lm_head"]},
    "lora, embeddings": lambda family: lora()(family) | {"target_modules": [*LINEAR[family], EMBEDDING[family]]},
    "lora, head to save": lora(modules_to_save=["lm_head"]),
    "lora, embeddings to save": lambda family: lora()(family) | {"modules_to_save": [EMBEDDING[family]]},
    "lora, norms to save": lambda family: lora()(family) | {"modules_to_save": NORMS[family]},
    "lora, tokens": lora(trainable_token_indices=IDS[:, 0].tolist()),
    "lora, but not": lora(exclude_modules=["c_fc", "up_proj"]),
    "lora, some layers": lora(layers_to_transform=[1, 4], rank_pattern={".*(c_attn|q_proj)": 2}),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "ia3": lambda family: {**linear("ia3")(family), "feedforward_modules": LINEAR[family][-1:]},
    "prompt tuning": prompts("prompt_tuning", **VIRTUAL),
    "p tuning": prompts("p_tuning", encoder_hidden_size=16, **VIRTUAL),
    "cpt": prompts("cpt", cpt_token_ids=[3, 4, 5, 6], cpt_mask=[1] * 4, cpt_tokens_type_mask=[1, 2, 3, 4]),
    "adaption prompt": prompts("adaption_prompt", adapter_len=4, adapter_layers=2),
    "ln tuning": lambda family: {"method": "ln_tuning", "target_modules": NORMS[family]},
    "trainable tokens": prompts("trainable_tokens", token_indices=IDS[:, 0].tolist()),
    "deft": linear("deft", r=4),
    "fourierft": linear("fourierft", n_frequency=20),
    "frod": linear("frod", progressbar=False),
    "gralora": linear("gralora", r=4),
    "hira": linear("hira", r=4),
    "pvera": linear("pvera", r=4),
    "randlora": linear("randlora", r=4),
    "tinylora": linear("tinylora"),
    "unilora": linear("unilora", r=4, theta_d_length=32),
    "vblora": linear("vblora", r=4, vector_length=8, num_vectors=16, topk=2),
    "vera": linear("vera", r=4),
    "waveft": linear("waveft", n_frequency=20),
}
# Most of these PEFT has for `Linear` only, and not for the `Conv1D` of gpt2.
CASES_OF_LLAMA: dict[str, Callable[[str], Keys]] = {
    "lora, parameters": lora(target_modules=[], target_parameters=["up_proj.weight"]),
    "alora": lora(alora_invocation_tokens=IDS[0, 4:6].tolist()),
    "beft": lambda family: {"method": "beft", "target_modules": ["v_proj"]},
    "boft": linear("boft", boft_block_size=4),
    "c3a": linear("c3a", block_size=8),
    "delora": linear("delora", r=4),
    "glora": linear("glora", r=4),
    "hra": linear("hra", r=4),
    "lily": linear("lily", r=4),
    "loha": linear("loha", r=4),
    "lokr": linear("lokr", r=4),
    "miss": linear("miss", r=4),
    "oft": linear("oft", oft_block_size=8, r=0),
    "osf": linear("osf"),
    "peanut": linear("peanut", r=4),
    "psoft": linear("psoft", r=4),
    "road": linear("road", group_size=8),
    "shira": linear("shira", r=4),
    "supertuning": linear("supertuning", r=4),
}
ALL = [("gpt2", name) for name in CASES] + [("llama", name) for name in {**CASES, **CASES_OF_LLAMA}]


def table(family: str, case: str) -> Keys:
    return {**CASES, **CASES_OF_LLAMA}[case](family)


@dataclass(frozen=True)
class Models:
    """The two models of a family; copies of them, as loading takes longer."""

    _client: Any
    _whole: Any

    def client(self) -> Any:
        return copy.deepcopy(self._client)

    def whole(self) -> Any:
        return copy.deepcopy(self._whole)


@pytest.fixture(scope="module")
def models(checkpoints: Callable[..., Path]) -> Iterator[dict[str, Models]]:
    with ExitStack() as stack:
        made = {}
        for family in ("gpt2", "llama"):
            path = str(checkpoints(family))
            trunk = zsl.RemoteTrunk(stack.enter_context(served(path)))
            stack.callback(trunk.close)
            made[family] = Models(zsl.load_client(path, trunk, layers="client"), local_model(path))
        yield made


def disturb(model: nn.Module, seed: int = 1) -> None:
    """Give what is trainable values that no initialization gives."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)


def trained(model: nn.Module, batch: dict[str, Any] | None = None) -> Numbers:
    """The numbers of a training step; what it draws at random, it draws of the same seed."""
    torch.manual_seed(3)
    return numbers_of(model.train(), batch or batches.plain())


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits  # type: ignore[no-any-return]


def whole_with(adapter: Path, whole: Any, values: dict[str, torch.Tensor]) -> PeftModel:
    """The whole local model with an adapter as the file says it is, and with `values`."""
    config = PeftConfig.from_pretrained(str(adapter))
    config.inference_mode = False
    adapted = get_peft_model(whole, config)
    keys = adapted.load_state_dict(values, strict=False)
    assert not keys.unexpected_keys
    assert all(".2." in key or ".3." in key for key in keys.missing_keys), "a weight outside the trunk has no value"
    for name, parameter in adapted.named_parameters():
        if name in keys.missing_keys:
            parameter.requires_grad_(False)  # with `bias="all"`, those of the trunk's layers
    return adapted


@pytest.mark.parametrize(("family", "case"), ALL)
def test_the_numbers_are_the_local_models_and_the_file_loads_on_it(
    family: str, case: str, models: dict[str, Models], tmp_path: Path
) -> None:
    client, whole = models[family].client, models[family].whole
    config = peft_config("run.toml", table(family, case), checkpoints=False)
    split = with_adapter(client(), config)
    disturb(split)
    assert not torch.equal(logits(split)[0, -1], logits(whole())[0, -1])
    values = copy.deepcopy(split.state_dict())
    numbers = trained(split)
    assert numbers.loss.isfinite()
    assert all(gradient is not None and gradient.any() for gradient in numbers.gradients.values())
    zsl.save_adapter(split, tmp_path)
    assert differing(numbers, trained(whole_with(tmp_path, whole(), values))) == []

    loaded = PeftModel.from_pretrained(whole(), str(tmp_path))
    # CPT projects its prompts anew in each call, and in the file are those of an earlier one.
    same = within(1e-6) if case == "cpt" else torch.equal
    assert same(logits(loaded), logits(split))

    if config.peft_type in ONLY_TO_USE:
        with pytest.raises(ModelError, match=str(tmp_path)):
            load_adapter(client(), tmp_path, is_trainable=True)
    else:
        assert differing(numbers, trained(load_adapter(client(), tmp_path, is_trainable=True))) == []


def test_every_method_that_is_taken_is_held_to_it() -> None:
    assert {str(table(*case)["method"]).upper() for case in ALL} == SHOWN


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("ADALORA", {"target_modules": LINEAR["llama"], "init_r": 4, "target_r": 2, "total_step": 10}),
        ("POLY", {"target_modules": LINEAR["llama"], "r": 4, "n_tasks": 2}),
        ("MULTITASK_PROMPT_TUNING", {"num_tasks": 2, **VIRTUAL}),
    ],
)
def test_methods_that_need_more_of_the_loop_give_the_local_models_numbers_from_python(
    kind: str, keys: Keys, models: dict[str, Models], tmp_path: Path
) -> None:
    batch = batches.plain() | ({} if kind == "ADALORA" else {"task_ids": torch.tensor([0, 1])})
    split = with_adapter(models["llama"].client(), CONFIGS[kind](task_type="CAUSAL_LM", **keys))
    disturb(split)
    numbers = trained(split, batch)
    zsl.save_adapter(split, tmp_path)
    whole = whole_with(tmp_path, models["llama"].whole(), split.state_dict())
    assert differing(numbers, trained(whole, batch)) == []
    with pytest.raises(ConfigError, match=f"peft.method.*'{kind.lower()}'.*(loop|Python)"):
        peft_config("run.toml", {"method": kind.lower(), **keys})


@pytest.mark.parametrize("side", ["left", "right"])
def test_virtual_tokens_go_in_front_of_padded_rows(side: str, models: dict[str, Models], tmp_path: Path) -> None:
    split = with_adapter(models["llama"].client(), peft_config("run.toml", {"method": "prompt_tuning", **VIRTUAL}))
    zsl.save_adapter(split, tmp_path)
    whole = whole_with(tmp_path, models["llama"].whole(), split.state_dict())
    batch = batches.padded(side)
    of_real_tokens = torch.cat([torch.ones(3, 5, dtype=torch.bool), batch["attention_mask"].bool()], dim=1)
    with torch.no_grad():
        one, other = (model(**batch).logits[of_real_tokens] for model in (split, whole))
    assert within(1e-6)(one, other)


def test_the_file_of_lora_names_layers_as_servers_read_them(models: dict[str, Models], tmp_path: Path) -> None:
    split = with_adapter(models["llama"].client(), peft_config("run.toml", lora()("llama")))
    zsl.save_adapter(split, tmp_path, base_model="org/name")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["layers_to_transform"] == [0, 1, 4, 5]
    assert written["layers_pattern"] == "layers"
    assert set(written["target_modules"]) == set(LINEAR["llama"])
    assert written["base_model_name_or_path"] == "org/name"


@pytest.mark.parametrize(
    ("family", "keys", "sides"),
    [
        ("gpt2", lora()("gpt2") | {"modules_to_save": ["wte", "ln_f", "ln_1"]}, ["bottom", "top"]),
        ("gpt2", lora()("gpt2") | {"trainable_token_indices": [3]}, ["bottom", "top"]),
        ("llama", CASES["lora, all biases"]("llama") | {"exclude_modules": ["up_proj"]}, ["bottom", "top"]),
        ("llama", CASES["lora, head"]("llama"), ["bottom", "top"]),
        ("llama", CASES["ia3"]("llama"), ["bottom", "top"]),
        ("llama", CASES["prompt tuning"]("llama") | {"modules_to_save": ["embed_tokens"]}, ["bottom"]),
        ("llama", CASES["prompt tuning"]("llama"), ["bottom"]),
        ("llama", CASES["adaption prompt"]("llama"), ["top"]),
        ("llama", CASES["vera"]("llama"), []),
        ("llama", CASES["unilora"]("llama"), []),
    ],
)
def test_the_part_of_a_side_loads_alone(
    family: str, keys: Keys, sides: list[str], models: dict[str, Models], tmp_path: Path
) -> None:
    base = models[family].client()
    of = Sides(base, parse_cut(CUT))
    split = with_adapter(base, peft_config("run.toml", keys))
    zsl.save_adapter(split, tmp_path / "whole")
    parts: Keys = {}
    for side in ("bottom", "top"):
        if side not in sides:
            with pytest.raises(ModelError, match=rf"\b{side}\b"):
                zsl.save_adapter(split, tmp_path / side, sides=of, only=side)
            continue
        zsl.save_adapter(split, tmp_path / side, sides=of, only=side)
        parts[side] = load_file(tmp_path / side / "adapter_model.safetensors")
        loaded = PeftModel.from_pretrained(models[family].whole(), str(tmp_path / side))
        assert parts[side].keys() == get_peft_model_state_dict(loaded, save_embedding_layers=False).keys()
        assert sum(tensor.numel() for tensor in parts[side].values()) == adapter_parameters(split, of, side)
    if parts:
        together = [key for part in parts.values() for key in part]
        assert sorted(together) == sorted(load_file(tmp_path / "whole" / "adapter_model.safetensors"))


REFUSED = {
    "dora": ({"method": "dora"}, 'method = "lora".* use_dora = true'),
    "qlora": ({"method": "QLoRA"}, r'\[model\] quantize = "4bit"'),
    "misspelt": ({"method": "loraa"}, "'loraa'.*\\blora\\b"),
    "nothing like it": ({"method": "zzz"}, "'zzz'.* adaption_prompt, beft"),
    "misspelt key": ({"lora_aplha": 3}, "peft.lora_aplha.* peft.lora_alpha"),
    "another's key": ({"method": "ia3", "r": 3}, r"peft\.r \(--lora-rank\).* peft\.method = 'ia3'"),
    "not a user's": ({"inference_mode": True}, "peft.inference_mode"),
    "not the type": ({"r": "many"}, "peft.r = 'many'"),
    "not PEFT's": ({"method": "ia3", "target_modules": ["a"], "feedforward_modules": ["b"]}, "feedforward_modules"),
    "no virtual tokens": (
        {"method": "prompt_tuning"},
        r"peft\.num_virtual_tokens .*peft\.method = 'prompt_tuning'",
    ),
    "no length": ({"method": "adaption-prompt", "adapter_layers": 2}, r"peft\.adapter_len\b"),
    "no layers": ({"method": "adaption_prompt", "adapter_len": 4}, r"peft\.adapter_layers\b"),
    "prefix tuning": ({"method": "prefix-tuning"}, "keys and values into every layer"),
    "cartridge": ({"method": "cartridge"}, "keys and values into every layer"),
    "xlora": ({"method": "xlora"}, "hidden states of every layer"),
    "shadow": ({"method": "shadow"}, "second hidden state"),
    "adamss": ({"method": "adamss"}, "a call after each step"),
    "checkpoints": ({"method": "p_tuning", **VIRTUAL}, 'set train.save_strategy = "no"'),
    "top k only": ({"method": "vblora", "save_only_topk_weights": True}, 'set train.save_strategy = "no"'),
    "eva": ({"init_lora_weights": "eva"}, "computed from data"),
    "loftq": ({"init_lora_weights": "loftq"}, r"\[model\] quantize"),
    "fast pissa": ({"init_lora_weights": "pissa_niter_4"}, "write pissa"),
    "replicated": ({"layer_replication": [[0, 2]]}, "cannot be replicated from here"),
    "tied": ({"ensure_weight_tying": True}, "does not tie again"),
    "another task": ({"task_type": "SEQ_CLS"}, "causal language models"),
    "loss": ({"kasa_config": {"beta": 1e-4}}, "a term to the loss"),
}


@pytest.mark.parametrize(("keys", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_taken_is_refused_in_a_line(keys: Keys, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as refused:
        peft_config("run.toml", keys)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("run.toml: ")


def test_p_tuning_without_a_number_of_virtual_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^run\.toml: peft\.num_virtual_tokens\b"):
        peft_config("run.toml", {"method": "p_tuning"}, checkpoints=False)


def test_a_method_that_no_test_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsl.training.config.peft_table.SHOWN", SHOWN - {"LOHA"})
    with pytest.raises(ConfigError, match="loha"):
        peft_config("run.toml", linear("loha")("llama"))


NOT_HERE = {
    "trunk's layers": ({"target_modules": ["q_proj"], "layers_to_transform": [1, 2, 3]}, r"\[2, 3\].*trunk"),
    "a trunk's module": (
        {"target_modules": ["q_proj", "layers.3.mlp.up_proj"]},
        "'layers.3.mlp.up_proj'.*trunk",
    ),
    "to save in the trunk": ({"modules_to_save": ["layers.2.input_layernorm"]}, "'layers.2.input_layernorm'.*trunk"),
    "to save nowhere": ({"modules_to_save": ["classifier"]}, "'classifier'.* down_proj, embed_tokens"),
    "nothing": ({"target_modules": ["c_attn"]}, "c_attn.*trunk.* down_proj"),
    "no pattern": ({"target_modules": r".*\.layers\.2\..*"}, "target_modules.*trunk"),
    "a name as a pattern": (
        {"target_modules": "q_proj"},
        r'trunk.* \["q_proj"\]$',
    ),
    "not in PEFT": ({"method": "beft", "target_modules": ["norm"]}, "BEFT .*: Target module"),
    "no regular expression": (
        {"target_modules": "(["},
        r": '\(\[' .*regular expression: un",
    ),
    "nor in a key": (
        {"target_modules": ["q_proj"], "rank_pattern": {"([": 2}},
        r"LORA .*: '.*\(\[.*' .*regular expression: unterminated",
    ),
    "nor excluded": ({"target_modules": ["q_proj"], "exclude_modules": "(["}, "regular expression"),
    "no such token": ({"target_modules": ["q_proj"], "trainable_token_indices": [999999]}, "IndexError: .*99999"),
    "past the trunk": (CASES["adaption prompt"]("llama") | {"adapter_layers": 3}, "2 layers"),
}


@pytest.mark.parametrize(("keys", "reason"), NOT_HERE.values(), ids=NOT_HERE)
def test_what_is_not_in_this_process_is_refused(keys: Keys, reason: str, models: dict[str, Models]) -> None:
    with pytest.raises(ConfigError, match=reason):
        with_adapter(models["llama"].client(), peft_config("run.toml", keys))


@pytest.mark.parametrize("keys", [{"target_modules": "all-linear"}, {}, {"method": "ia3"}, {"method": "vera"}], ids=str)
def test_where_every_layer_is_in_the_cut_it_is_said_what_is_left_to_adapt(
    keys: Keys, checkpoints: Callable[..., Path]
) -> None:
    model = load_client_part(resolve(str(checkpoints("llama"))), parse_cut("0:6"))
    with pytest.raises(ConfigError, match=r"cut.* embed_tokens, lm_head, norm$"):
        with_adapter(model, peft_config("run.toml", keys))


def test_a_method_with_nothing_to_train_is_refused(models: dict[str, Models]) -> None:
    with pytest.raises(ConfigError, match="OSF"):  # in Conv1D
        with_adapter(models["gpt2"].client(), peft_config("run.toml", linear("osf")("gpt2")))


def test_an_adapter_with_weights_on_the_trunks_layers_is_not_loaded(models: dict[str, Models], tmp_path: Path) -> None:
    config = peft_config("run.toml", lora()("llama"))
    get_peft_model(models["llama"].whole(), config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"trunk.* base_model\S+layers\.2\..* 13 "):
        load_adapter(models["llama"].client(), tmp_path)
    with pytest.raises(ModelError, match=r"layers\.2\..*zsl merge"):
        PeftModel.from_pretrained(models["llama"].client(), tmp_path)


@pytest.mark.parametrize(
    ("key", "reason"), [("base_model.model.model.layers.0.other.weight", "layers.0.other.weight"), (None, "no weights")]
)
def test_an_adapter_that_does_not_fit_is_not_loaded(
    key: str | None, reason: str, models: dict[str, Models], tmp_path: Path
) -> None:
    zsl.save_adapter(with_adapter(models["llama"].client(), peft_config("run.toml", lora()("llama"))), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(next(iter(weights))) if key is None else weights.update({key: torch.zeros(1)})
    save_file(weights, file)
    with pytest.raises(ModelError, match=reason):
        load_adapter(models["llama"].client(), tmp_path)


def test_an_adapter_whose_configuration_is_damaged_is_not_loaded(models: dict[str, Models], tmp_path: Path) -> None:
    zsl.save_adapter(with_adapter(models["llama"].client(), peft_config("run.toml", lora()("llama"))), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rank_pattern": {"([": 2}}))
    with pytest.raises(ModelError, match="regular expression"):
        load_adapter(models["llama"].client(), tmp_path)


def test_no_adapter_is_not_loaded(models: dict[str, Models], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_adapter(models["llama"].client(), tmp_path)
    with pytest.raises(ModelError, match=r"some/where .*directory.*HF_HUB_OFFLINE"):
        load_adapter(models["llama"].client(), "some/where")
    monkeypatch.setattr("zsl.adapters.attach.PeftConfig", None)  # nothing is asked
    for name in ("nosuch", "./no/such", "a/b/c"):
        with pytest.raises(ModelError, match=rf"{re.escape(name)} .*directory$"):
            load_adapter(models["llama"].client(), name)


Quantized = Callable[[Any, Keys], tuple[PeftModel, PeftModel]]


@pytest.fixture
def quantized(checkpoints: Callable[..., Path]) -> Iterator[Quantized]:
    """A split model with its outer layers in fewer bits, and the whole one with just the same layers so."""
    pytest.importorskip("bitsandbytes")
    reference = resolve(str(checkpoints("llama")))
    with served(reference.text) as endpoint:
        trunk = zsl.RemoteTrunk(endpoint)

        def made(bits: Any, keys: Keys) -> tuple[PeftModel, PeftModel]:
            config = peft_config("run.toml", keys)
            welcome = trunk.connect(identify(reference))
            client = load_client_part(reference, welcome.cut, quantize=bits)
            put_trunk(client, trunk, welcome.cut)
            quantization = quantization_config(reference, bits, torch.float32)
            quantization.llm_int8_skip_modules = ["lm_head", "model.layers.2", "model.layers.3"]
            whole = whole_class(reference.config).from_pretrained(
                reference.location, dtype=torch.float32, quantization_config=quantization
            )
            split, local = with_adapter(client, config), get_peft_model(whole, config)
            disturb(split)
            local.load_state_dict({name: p for name, p in split.named_parameters() if p.requires_grad}, strict=False)
            return split, local

        yield made
        trunk.close()


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantized_outer_layers_give_the_numbers_of_a_local_model_with_just_those_quantized(
    bits: str, quantized: Quantized, models: dict[str, Models], tmp_path: Path
) -> None:
    split, local = quantized(bits, lora(layers_to_transform=[0, 1, 4, 5])("llama"))
    assert sum(not parameter.is_floating_point() for parameter in split.parameters()) == 4 * 7
    numbers = trained(split)
    assert differing(numbers, trained(local)) == []
    logits(split)
    assert differing(numbers, trained(split)) == [], "an evaluation has changed the weights"
    zsl.save_adapter(split, tmp_path)
    assert PeftModel.from_pretrained(models["llama"].whole(), str(tmp_path))


def test_the_whole_models_gradient_is_as_large_when_its_layers_are_quantized(
    quantized: Quantized, models: dict[str, Models], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[int] = []
    monkeypatch.setattr(
        "zsl.training.report.overview.communication_table", lambda **told: shown.append(told["gradient_bytes"])
    )
    keys = lora()("llama")
    whole = models["llama"].whole()
    of_trunk = sum(p.numel() for layer in whole.model.layers[2:4] for p in layer.parameters())
    trunk: Any = SimpleNamespace(client=SimpleNamespace(welcome=SimpleNamespace(trunk_parameters=of_trunk)))
    split = with_adapter(models["llama"].client(), peft_config("run.toml", keys))
    for model in (split, *(quantized(bits, keys)[0] for bits in ("4bit", "8bit"))):
        communication(StepMeasure(steps=1), model, trunk)
    assert shown == [4 * sum(p.numel() for p in whole.parameters())] * 3


def test_a_method_without_quantized_layers_is_refused_on_a_quantized_model(quantized: Quantized) -> None:
    with pytest.raises(ConfigError, match=r"LOHA.* quantized"):
        quantized("4bit", linear("loha")("llama"))


@pytest.mark.parametrize(
    ("text", "installed", "reason"),
    [("random:llama", True, "random weights"), ("", False, r"pip install bitsandbytes")],
)
def test_what_cannot_be_quantized_is_refused(
    text: str, installed: bool, reason: str, checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zsl.models.quantize.find_spec", lambda name: installed or None)
    with pytest.raises(ModelError, match=reason):
        load_client_part(resolve(text or str(checkpoints("llama"))), parse_cut(CUT), quantize="4bit")
    with pytest.raises(ModelError, match=reason):
        plan_trunk(text or str(checkpoints("llama")), None, torch.float32, "cpu", forward_only=False, quantize="4bit")
