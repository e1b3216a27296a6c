"""`zsl info` as the person who types it sees it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import zsl
from support.echo import IDENTITY, EchoServer
from support.loaded import zsl_and_what_it_loads
from support.peer import Peer, forward
from support.square import SquareServer, some
from test_access import Keys, client
from zsl.cli.zsl import zsl as command
from zsl.client.info_lines import in_units
from zsl.errors import EXIT_STARTUP_FAILED, EXIT_USAGE, DrainingError
from zsl.text.printable import printable_lines
from zsl.wire.messages import Error, GoAway
from zsl.wire.messages import Result as Answer

UNUSED = "127.0.0.1:1"  # a port that no daemon takes by chance


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, ["info", *arguments])


def rows(block: str) -> dict[str, str]:
    """The names and values of one daemon."""
    return dict(re.split(r"  +", line, maxsplit=1) for line in block.splitlines())  # type: ignore[arg-type]


def test_what_a_daemon_serves_is_shown_in_aligned_lines_with_units() -> None:
    with EchoServer() as server:
        finished = run(server.endpoint)
        assert finished.exit_code == 0, finished.output
        with Peer(server.endpoint) as peer:
            give_up = 2000
            while server.sessions and give_up:  # the question's own: its BYE is on the way
                give_up -= peer.answers_until_quiet()
            assert server.sessions == 0
    shown = rows(finished.output)
    assert shown["endpoint"] == server.endpoint
    assert shown["state"] == "takes sessions"
    assert shown["model"] == "echo, 6 layers, hidden size 4"
    assert shown["weights"] == IDENTITY.weights_digest[:12]
    assert shown["cut"] == "2:4 (2 of 6 layers)"
    assert shown["trunk"] == "0 parameters in float32"
    assert (shown["packs"], shown["deterministic"], shown["row"]) == ("yes", "no", "up to 64 tokens")
    assert shown["sessions"] == "0"
    assert shown["held"] == "0 B for pending backwards, 0 B for adapters, 0 B for generations"
    assert shown["round trip"].endswith(" ms")
    assert shown["software"] == f"zsl {zsl.__version__}"
    assert len(bytes.fromhex(shown["lifetime"])) == 16
    assert len({line.find(shown[name]) for name, line in zip(shown, finished.output.splitlines(), strict=True)}) == 1


def test_json_has_whole_digests_and_numbers() -> None:
    with EchoServer(forward_only=True) as server:
        (facts,) = json.loads(run(server.endpoint, "--json").output)
    assert facts["model"] == IDENTITY.model_dump()
    assert facts["forward_only"] and facts["takes_sessions"] and facts["limits"]["max_row_tokens"] == 64
    assert facts["cut"] == {"start": 2, "stop": 4}


def test_what_is_held_for_others_is_seen() -> None:
    with EchoServer() as server, Peer(server.endpoint) as peer:
        assert isinstance(peer.ask(*forward(peer.hello(), 1, keep=True)), Answer)
        shown = rows(run(server.endpoint).output)
    assert shown["sessions"] == "1" and not shown["held"].startswith("0 B ")


def test_a_daemon_that_serves_forward_only_or_fewer_bits_says_so() -> None:
    with EchoServer(forward_only=True, quantization="8bit") as server:
        shown = rows(run(server.endpoint).output)
    assert shown["gradient"] == "none: it serves forward only"
    assert shown["trunk"] == "0 parameters in float32, linear layers in 8bit"


def test_nothing_there_is_exit_3_and_one_line() -> None:
    finished = run(UNUSED)
    assert finished.exit_code == EXIT_STARTUP_FAILED
    assert finished.output.count("\n") == 1
    assert finished.output.startswith("zsl info: no trunk daemon at tcp://127.0.0.1:1: nothing listens there")
    assert " 0 s" not in finished.output


def test_a_host_that_nobody_knows_is_told_at_once() -> None:
    finished = run("no.such.host.invalid:5555")
    assert finished.exit_code == EXIT_STARTUP_FAILED
    assert "no.such.host.invalid:5555" in finished.output and "0.1 s" in finished.output


def test_of_several_each_is_shown_and_one_that_answers_is_enough() -> None:
    with EchoServer() as server:
        finished = run(f"{UNUSED},{server.endpoint}")
    assert finished.exit_code == 0
    missing, there = map(rows, finished.output.split("\n\n"))
    assert missing["state"].startswith("does not answer: no trunk daemon") and there["state"] == "takes sessions"


def test_of_several_that_are_all_gone_it_is_exit_3() -> None:
    finished = run(f"{UNUSED},127.0.0.1:2", "--json")
    assert finished.exit_code == EXIT_STARTUP_FAILED
    assert finished.output.count('"error": "no trunk daemon') == 2


def test_an_endpoint_that_is_none_is_exit_2() -> None:
    finished = run("nowhere")
    assert finished.exit_code == EXIT_USAGE and "HOST:PORT" in finished.output


def test_a_daemon_that_is_shutting_down_still_says_what_it_serves() -> None:
    with EchoServer() as server, Peer(server.endpoint) as peer:
        welcome = peer.hello()
        assert isinstance(peer.ask(*forward(welcome, 1, keep=True)), Answer)  # an open step: it waits for that
        server.drain()
        assert isinstance(peer.hear(), GoAway)
        shown = rows(run(server.endpoint).output)
    assert shown["state"].startswith("takes no new session: The daemon is shutting down")
    assert shown["model"] == "echo, 6 layers, hidden size 4" and shown["sessions"] == "1"


def test_a_tenant_that_has_all_its_sessions_still_sees_what_is_served(tmp_path: Path) -> None:
    keys = Keys(tmp_path)
    keys.write_list("alice", more="max_sessions = 1\n")
    options = ["--server-key", keys.public("server"), "--client-key", str(keys.secret("alice"))]
    with SquareServer(access=keys.access) as server:
        assert rows(run(server.endpoint, *options).output)["state"] == "takes sessions"
        with client(server, keys, "alice") as training:
            assert training.is_right(some(1), some(2))
            shown = rows(run(server.endpoint, *options).output)
    assert shown["state"].startswith("takes no new session: tenant alice has 1")


def test_without_the_key_it_is_exit_3_with_the_reason(tmp_path: Path) -> None:
    keys = Keys(tmp_path)
    keys.write_list("alice")
    options = ["--server-key", keys.public("server"), "--client-key", str(keys.secret("mallory"))]
    with SquareServer(access=keys.access) as server:
        finished = run(server.endpoint, *options)
    assert finished.exit_code == EXIT_STARTUP_FAILED and "tenants.toml" in finished.output


@pytest.mark.parametrize("arguments", [["--help"], [None]])
def test_it_loads_no_torch(arguments: list[str | None]) -> None:
    with EchoServer() as server:
        asked = arguments[0] or server.endpoint
        assert zsl_and_what_it_loads(["info", asked], {"torch", "transformers"})[1] == set()


@pytest.mark.parametrize(("nbytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (72 << 20, "72.0 MiB")])
def test_bytes_are_written_in_units(nbytes: int, text: str) -> None:
    assert in_units(nbytes) == text


HOSTILE = "gone\x1b[2J\x07\r\nstate          takes sessions\u2028\x9b1m\u202e"


class HostileServer(EchoServer):
    """Refuses sessions with a text that steers a terminal, and has such a name where `as_name`."""

    def __init__(self, *, as_name: bool) -> None:
        super().__init__(model=IDENTITY.model_copy(update={"model_type": HOSTILE}) if as_name else IDENTITY)


def test_what_a_daemon_says_neither_steers_the_terminal_nor_poses_as_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        # As a daemon of somebody else would send it.
        monkeypatch.setattr("zsl.trunk.requests.answers.Error", Error.model_construct)
        raise DrainingError(HOSTILE)

    monkeypatch.setattr("zsl.trunk.requests.handlers.Handlers._opened", refuse)
    with HostileServer(as_name=False) as server:
        shown = run(server.endpoint).output
    state = rows(shown)["state"]
    assert "gone\\x1b[2J\\x07\\r\\nstate" in state and "\\u2028\\x9b1m\\u202e" in state
    assert printable_lines(shown) == shown and shown.count("takes sessions") == 1


def test_a_daemon_whose_names_steer_the_terminal_is_not_believed() -> None:
    with HostileServer(as_name=True) as server:
        shown = run(server.endpoint)
    assert shown.exit_code == EXIT_STARTUP_FAILED and shown.output.count("\n") == 1
    assert "model_type" in shown.output and printable_lines(shown.output) == shown.output
