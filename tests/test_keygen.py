"""`zsl keygen` as the person who types it sees it."""

from __future__ import annotations

import re
import shlex
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from support.loaded import zsl_and_what_it_loads
from zsl.cli.train import train
from zsl.cli.trunkd import trunkd
from zsl.cli.zsl import zsl
from zsl.errors import EXIT_USAGE
from zsl.transport.curve_keys import read_key_pair
from zsl.trunk.access.tenants import read_tenants


def run(*arguments: str) -> Result:
    return CliRunner().invoke(zsl, arguments)


def test_a_clients_lines_are_those_of_tenants_toml(tmp_path: Path) -> None:
    finished = run("keygen", "alice", "--out", str(tmp_path))
    assert finished.exit_code == 0, finished.output
    pair = read_key_pair(tmp_path / "alice.key_secret")
    for name in ("alice.key", "alice.key_secret"):
        assert str(tmp_path / name) in finished.output
    assert pair.secret.decode() not in finished.output
    lines = re.search(r"\[tenants\.alice\]\npublic_key = .*\n", finished.output)
    assert lines is not None, finished.output
    tenants = tmp_path / "tenants.toml"
    tenants.write_text(lines[0])
    alice = read_tenants(tenants).get(pair.public.decode())
    assert alice is not None and alice.name == "alice"


def test_a_servers_pair_comes_with_the_command_that_takes_it(tmp_path: Path) -> None:
    finished = run("keygen", "server", "--out", str(tmp_path))
    assert finished.exit_code == 0, finished.output
    assert f"--keys {tmp_path} --tenants tenants.toml" in finished.output
    assert "[tenants." not in finished.output
    assert read_key_pair(tmp_path / "server.key_secret").public.decode() in finished.output


@pytest.mark.parametrize("name", ["server", "alice"])
def test_the_printed_commands_name_a_model_or_a_configuration_and_the_files_where_they_are(
    name: str, tmp_path: Path
) -> None:
    place = tmp_path / "my keys"
    shown = run("keygen", name, "--out", str(place)).output
    lines = shown.replace("\\\n", "").splitlines()
    commands = [shlex.split(line) for line in lines if re.match(r"  zsl-(train|trunkd) ", line)]
    assert len(commands) == 1
    (command,) = commands
    if name == "server":
        given = trunkd.make_context("zsl-trunkd", command[1:]).params
        assert (given["keys"], given["model"]) == (place, "MODEL")
    else:
        given = train.make_context("zsl-train", command[1:]).params
        assert given["config"] == Path("CONFIG.toml")
        keys = (given["server_key"], given["client_key"])
        assert keys == (f"{place}/server.key", f"{place}/alice.key_secret")
        assert f'server_key="{place}/server.key", client_key="{place}/alice.key_secret"' in shown


def test_without_out_the_files_go_to_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("keygen", "alice").exit_code == 0
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    assert read_key_pair(tmp_path / "keys" / "alice.key_secret")


def test_a_second_pair_of_a_name_is_refused_in_one_line(tmp_path: Path) -> None:
    assert run("keygen", "alice", "--out", str(tmp_path)).exit_code == 0
    before = (tmp_path / "alice.key_secret").read_bytes()
    finished = run("keygen", "alice", "--out", str(tmp_path))
    assert finished.exit_code == EXIT_USAGE
    to_do = "take another name or --out, or move the pair away first"
    assert finished.output == f"zsl keygen: {tmp_path / 'alice.key'} is there already; {to_do}\n"
    assert (tmp_path / "alice.key_secret").read_bytes() == before


def test_a_name_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    finished = run("keygen", "../alice", "--out", str(tmp_path))
    assert finished.exit_code == EXIT_USAGE
    assert finished.output.startswith("zsl keygen: '../alice' cannot name a key pair")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["keygen", "--help"]])
def test_help_and_version_load_neither_torch_nor_zmq(arguments: list[str]) -> None:
    assert zsl_and_what_it_loads(arguments, {"torch", "transformers", "zmq", "pydantic"})[1] == set()
