"""`zsl split`: two parts of a checkpoint, which stand for the whole one in everything."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import zsl
from support import batches
from support.compare import differing, numbers_of
from support.daemon import Daemon
from support.embedded import served
from support.full_disk import files_of_at_most
from support.loaded import zsl_and_what_it_loads
from support.models import CONFIGS, CUT, local_model, tiny_model, with_lora
from zsl.cli.zsl import zsl as command
from zsl.errors import EXIT_RUN_FAILED, EXIT_STARTUP_FAILED, EXIT_USAGE, ModelError, WrongModelError
from zsl.models.divide import divide
from zsl.models.identity import identify, part_digest
from zsl.models.loading import load_client_part, load_trunk_part, load_whole
from zsl.models.reference import ModelReference, resolve
from zsl.models.tensor_files import TensorFiles
from zsl.split.cut import parse_cut
from zsl.split.parts import RECORD, Part
from zsl.training.config.config import read_config
from zsl.training.run.run import train_from_config
from zsl.trunk.daemon.load import plan_trunk
from zsl.wire.messages import Cut

HOLE = parse_cut(CUT)
MIDDLE = re.compile(r"\.(layers|h)\.[23]\.")  # an expert has a number too


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def parts(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`parts("llama")` is the directory with the two parts of that family's checkpoint."""
    directory = tmp_path_factory.mktemp("parts")

    def split(family: str) -> Path:
        if not (directory / family).exists():
            finished = run("split", checkpoints(family), CUT, "--out", directory / family)
            assert finished.exit_code == 0, finished.output
        return directory / family

    return split


@pytest.fixture
def copied(parts: Callable[[str], Path], tmp_path: Path) -> Path:
    """Parts to be damaged."""
    return Path(shutil.copytree(parts("llama"), tmp_path / "parts"))


def names_in(directory: Path) -> set[str]:
    return {name for file in directory.glob("*.safetensors") for name in safe_open(file, framework="pt").keys()}  # noqa: SIM118


def numbers_through(model: str, endpoint: str) -> object:
    trunk = zsl.RemoteTrunk(endpoint)
    try:
        return numbers_of(with_lora(zsl.load_client(model, trunk)), batches.plain())
    finally:
        trunk.close()


def test_two_parts_and_a_daemon_give_the_whole_models_numbers(
    parts: Callable[[str], Path], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    whole = numbers_of(with_lora(local_model(str(checkpoints("llama")))), batches.plain())
    with Daemon("--model", str(parts("llama") / "trunk"), "--threads", "2", log=tmp_path / "log") as daemon:
        assert daemon.ready["cut"] == CUT
        assert differing(numbers_through(str(parts("llama") / "client"), daemon.endpoint), whole) == []


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_part_works_with_the_whole_model_on_the_other_side(
    parts: Callable[[str], Path], checkpoints: Callable[..., Path], family: str
) -> None:
    path = str(checkpoints(family))
    whole = numbers_of(with_lora(local_model(path)), batches.plain())
    with served(str(parts(family) / "trunk")) as endpoint:
        assert differing(numbers_through(path, endpoint), whole) == []
    with served(path) as endpoint:
        assert differing(numbers_through(str(parts(family) / "client"), endpoint), whole) == []


@pytest.mark.parametrize("family", CONFIGS)
def test_the_parts_of_every_family_have_its_identity_and_all_its_tensors_once(
    family: str, checkpoints: Callable[..., Path], parts: Callable[[str], Path]
) -> None:
    client, trunk = parts(family) / "client", parts(family) / "trunk"
    expected = identify(resolve(str(checkpoints(family))))
    assert identify(resolve(str(client))) == identify(resolve(str(trunk))) == expected
    assert names_in(client) | names_in(trunk) == names_in(checkpoints(family))
    assert names_in(client) & names_in(trunk) == set()
    assert all(MIDDLE.search(name) for name in names_in(trunk))
    assert not any(MIDDLE.search(name) for name in names_in(client))


def test_each_part_loads_what_the_whole_checkpoint_gives_its_side(
    checkpoints: Callable[..., Path], parts: Callable[[str], Path]
) -> None:
    for family in ("gpt2", "gemma2"):
        whole = resolve(str(checkpoints(family)))
        for part, load in (("client", load_client_part), ("trunk", load_trunk_part)):
            here, there = load(resolve(str(parts(family) / part)), HOLE).state_dict(), load(whole, HOLE).state_dict()
            assert here.keys() == there.keys()
            assert all(torch.equal(here[name], there[name]) for name in here)


def test_a_part_does_not_load_as_a_whole_checkpoint(parts: Callable[[str], Path]) -> None:
    """As TRL makes a reference model by the name that the model was loaded from."""
    for part in ("client", "trunk"):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            AutoModelForCausalLM.from_pretrained(parts("llama") / part)


def test_a_part_whose_files_have_the_names_of_a_whole_checkpoints_is_read_too(copied: Path) -> None:
    directory = copied / "client"
    expected = load_client_part(resolve(str(directory)), HOLE).state_dict()
    (directory / "model.part.safetensors").rename(directory / "model.safetensors")
    part = Part.model_validate_json((directory / RECORD).read_bytes()).model_copy(update={"format": 1})
    digest = part_digest(part, (directory / "config.json").read_bytes(), TensorFiles(str(directory)).digest())
    (directory / RECORD).write_text(part.model_copy(update={"digest": digest}).model_dump_json())
    assert identify(resolve(str(directory))) == part.model
    loaded = load_client_part(resolve(str(directory)), HOLE).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_classifier_is_not_taken_for_a_language_model(tmp_path: Path) -> None:
    path = tmp_path / "reward"
    AutoModelForSequenceClassification.from_config(tiny_model("gpt2").config).save_pretrained(path)
    for load in (
        lambda: load_client_part(resolve(str(path)), HOLE),
        lambda: load_whole(resolve(str(path))),
    ):
        with pytest.raises(ModelError, match="GPT2ForSequenceClassification"):
            load()
    assert run("split", path, CUT, "--out", tmp_path / "parts").exit_code == EXIT_STARTUP_FAILED


def test_the_command_shows_what_it_wrote_and_what_to_type_next(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    finished = run("split", checkpoints("llama"), CUT, "--out", tmp_path / "two")
    identity = identify(resolve(str(checkpoints("llama"))))
    for words in (
        identity.weights_digest[:12],
        f"zsl-trunkd --model {tmp_path}/two/trunk",
        f"zsl-train --model {tmp_path}/two/client --server HOST:PORT",
        "embeddings, layers 0-1, layers 4-5, head",
        "layers 2-3",
    ):
        assert words in finished.output
    assert {file.name for file in (tmp_path / "two" / "trunk").iterdir()} == {
        "config.json",
        "model.part.safetensors",
        "zsl.json",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


def test_large_parts_are_written_as_several_files(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    reference = resolve(str(checkpoints("llama")))
    divide(reference, HOLE, tmp_path / "two", max_shard_size="40KB")
    for part in ("client", "trunk"):
        directory = tmp_path / "two" / part
        assert len(list(directory.glob("*.safetensors"))) > 1
        index = json.loads((directory / "model.safetensors.index.part.json").read_text())
        assert index["weight_map"].keys() == names_in(directory)
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            AutoModelForCausalLM.from_pretrained(directory)
        assert identify(resolve(str(directory))) == identify(reference)
    # And what was split can itself be in several files.
    tiny_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert divide(resolve(str(tmp_path / "sharded")), HOLE, tmp_path / "again").model == identify(reference)


def test_another_dtype_is_another_model(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoints("llama")
    assert run("split", path, CUT, "--out", tmp_path / "two", "--dtype", "bfloat16").exit_code == 0
    client, trunk = tmp_path / "two" / "client", tmp_path / "two" / "trunk"
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    assert identify(resolve(str(client))) == identify(resolve(str(tmp_path / "bfloat16")))
    assert resolve(str(client)).config.dtype == torch.bfloat16
    with served(str(trunk)) as endpoint:
        numbers_through(str(client), endpoint)
        with pytest.raises(WrongModelError, match="weights"):
            numbers_through(str(path), endpoint)
    assert run("split", path, CUT, "--out", tmp_path / "same", "--dtype", "float32").exit_code == 0
    assert identify(resolve(str(tmp_path / "same" / "trunk"))) == identify(resolve(str(path)))


def test_random_weights_become_files_of_the_same_identity(tmp_path: Path) -> None:
    reference = ModelReference("random:tiny", tiny_model("gpt2").config, None)
    divide(reference, HOLE, tmp_path / "two")
    client, trunk = (resolve(str(tmp_path / "two" / part)) for part in ("client", "trunk"))
    assert identify(client) == identify(trunk) == identify(reference)
    for part, load in ((client, load_client_part), (trunk, load_trunk_part)):
        here, there = load(part, HOLE).state_dict(), load(reference, HOLE).state_dict()
        assert all(torch.equal(here[name], there[name]) for name in there)


def test_the_client_gets_tokenizer_and_generation_config(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(checkpoints("llama"), tmp_path / "whole"))
    words = Tokenizer(models.WordLevel({"<unk>": 0, "split": 1, "learning": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", chat_template="{{ messages[0]['content'] }}"
    ).save_pretrained(path)
    assert "head, tokenizer" in run("split", path, CUT, "--out", tmp_path / "two").output
    client = tmp_path / "two" / "client"
    there, here = (AutoTokenizer.from_pretrained(each) for each in (path, client))
    assert here("split learning it").input_ids == there("split learning it").input_ids == [1, 2, 0]
    assert here.chat_template == there.chat_template and here.pad_token == there.pad_token
    assert (client / "generation_config.json").read_bytes() == (path / "generation_config.json").read_bytes()
    with pytest.raises(ModelError, match="trunk's"):
        resolve(str(tmp_path / "two" / "trunk")).tokenizer()


def test_a_part_in_the_wrong_place_is_refused_in_a_line(parts: Callable[[str], Path], tmp_path: Path) -> None:
    client, trunk = str(parts("llama") / "client"), str(parts("llama") / "trunk")

    def plan(model: str, cut: Cut | None = None) -> None:
        plan_trunk(model, cut, torch.float32, "cpu", forward_only=False)

    remote = zsl.RemoteTrunk("127.0.0.1:9")
    with pytest.raises(ModelError, match=r"client's .*llama .*2:4.*--server"):
        plan(client)
    with pytest.raises(ModelError, match=r"trunk's .*llama .*2:4.*client"):
        zsl.load_client(trunk, remote)
    with pytest.raises(ModelError, match="2:4, not 1:4"):
        plan(trunk, Cut(start=1, stop=4))
    with pytest.raises(ModelError, match="2:4, not 1:4"):
        zsl.load_client(client, remote, cut=Cut(start=1, stop=4))
    for part in (client, trunk):
        with pytest.raises(ModelError, match="whole"):
            load_whole(resolve(part))
        finished = run("split", part, CUT, "--out", tmp_path / "again")
        assert finished.exit_code == EXIT_STARTUP_FAILED and "whole" in finished.output


def test_a_training_without_a_daemon_says_that_a_part_needs_one(parts: Callable[[str], Path], tmp_path: Path) -> None:
    settings = [f"model.name={parts('llama') / 'client'}", f"train.output_dir={tmp_path / 'run'}", "data.max_length=16"]
    with pytest.raises(ModelError, match="--server"):
        train_from_config(read_config(None, settings=settings, overrides={}), "here")


def flip_a_bit(part: Path) -> None:
    file = part / "model.part.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def cut_short(part: Path) -> None:
    file = part / "model.part.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def edit(file: str, old: str, new: str) -> Callable[[Path], None]:
    def change(part: Path) -> None:
        text = (part / file).read_text()
        assert old in text
        (part / file).write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_bit, "damaged"),
        (cut_short, "cannot be read"),
        (edit("zsl.json", '"start": 2', '"start": 1'), "damaged"),
        (edit("zsl.json", '"weights_digest": "', '"weights_digest": "0'), "zsl split"),
        (edit("zsl.json", '"format": 2', '"format": 3'), "zsl split"),
        (edit("zsl.json", '"format"', '"from": 1, "format"'), "zsl split"),
        (edit("zsl.json", "{", ""), "zsl split"),
        (edit("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'), "damaged"),
    ],
)
def test_a_part_that_was_changed_is_refused_in_a_line(copied: Path, damage: Callable[[Path], None], words: str) -> None:
    for part in ("client", "trunk"):
        identify(resolve(str(copied / part)))
        damage(copied / part)
        with pytest.raises(ModelError, match=words) as refused:
            identify(resolve(str(copied / part)))
        assert len(str(refused.value).splitlines()) == 1


def test_what_cannot_be_written_leaves_nothing(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    with files_of_at_most(100_000):  # the client's part has more, config.json less
        finished = run("split", checkpoints("llama"), CUT, "--out", tmp_path / "two")
    assert finished.exit_code == EXIT_RUN_FAILED, finished.output
    assert finished.output.count("\n") == 1 and f"{tmp_path}" in finished.output
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_put_in_the_place_of_anything(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    finished = run("split", checkpoints("llama"), CUT, "--out", tmp_path)
    assert finished.exit_code == EXIT_USAGE
    assert finished.output == f"zsl split: {tmp_path} is there already: name another --out, or remove it\n"
    (tmp_path / "empty").mkdir()
    assert run("split", checkpoints("llama"), CUT, "--out", tmp_path / "empty").exit_code == 0


@pytest.mark.parametrize(
    ("model", "cut", "code", "words"),
    [
        ("llama", "4:2", EXIT_USAGE, "START < STOP"),
        ("llama", "2:9", EXIT_STARTUP_FAILED, "0 to 5"),
        ("nothing", CUT, EXIT_STARTUP_FAILED, "nothing"),
    ],
)
def test_a_wrong_argument_is_one_line(
    checkpoints: Callable[..., Path], tmp_path: Path, model: str, cut: str, code: int, words: str
) -> None:
    where = checkpoints("llama") if model == "llama" else tmp_path / model
    finished = run("split", where, cut, "--out", tmp_path / "two")
    assert finished.exit_code == code
    assert finished.output.startswith("zsl split: ") and finished.output.count("\n") == 1 and words in finished.output


@pytest.mark.parametrize("name", ["split", "export", "merge"])
def test_help_has_an_example_and_loads_no_torch(name: str) -> None:
    printed, loaded = zsl_and_what_it_loads([name, "--help"], {"torch", "transformers", "zmq", "pydantic"})
    assert f"  zsl {name} " in printed.partition("Options")[0]
    assert loaded == set()
