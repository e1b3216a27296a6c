"""`zsl doctor`: that it finds what is wrong, and nothing where all is well."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from click.testing import CliRunner, Result

import support.square
from support.daemon import Daemon
from support.echo import EchoServer
from support.embedded import served
from support.loaded import zsl_and_what_it_loads
from support.models import CUT
from support.square import SquareServer
from test_access import Keys
from zsl.cli.zsl import zsl as command
from zsl.client.doctor import examination, machine, memory
from zsl.client.doctor.daemon import check_versions
from zsl.client.doctor.examination import Examination
from zsl.errors import EXIT_RUN_FAILED, EXIT_USAGE
from zsl.link.status_client import StatusClient
from zsl.models.divide import divide
from zsl.models.reference import resolve
from zsl.split.cut import parse_cut
from zsl.trunk.compute.engine import TorchCompute

LINE = re.compile(r"(ok|warn|FAIL|skip) +([a-z ]+?)  +(.*)")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets it, for the rest of its process."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")


class Findings:
    """Output of the command: `state` and `text` of a check by its name."""

    def __init__(self, finished: Result) -> None:
        assert "Traceback" not in finished.output
        matches = [match for match in map(LINE.fullmatch, finished.output.splitlines()) if match]
        self.state = {match[2]: match[1] for match in matches}
        self.text = {match[2]: match[3] for match in matches}
        self.failed = [name for name, state in self.state.items() if state == "FAIL"]
        assert finished.exit_code == (EXIT_RUN_FAILED if self.failed else 0), finished.output


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, ["doctor", *arguments])


def findings(*arguments: str) -> Findings:
    return Findings(run(*arguments))


# --- a daemon --------------------------------------------------------------------------------------------------


def test_where_all_is_well_nothing_fails_and_the_gradient_is_equal_bit_for_bit(
    serve: Callable[..., Daemon], checkpoints: Callable[..., Path]
) -> None:
    found = findings("--server", serve("llama").endpoint, "--model", str(checkpoints("llama")), "--cut", CUT)
    assert found.failed == []
    for name in ("python", "zsl", "torch", "transformers", "libzmq", "daemon", "versions", "dtype", "round trip"):
        assert found.state[name] == "ok"
    for name in ("configuration", "weights", "cut", "throughput"):
        assert found.state[name] == "ok"
    assert found.text["gradient"].endswith("equal bit for bit")


def test_without_the_trunks_weights_the_gradient_is_compared_with_central_differences(
    serve: Callable[..., Daemon], checkpoints: Callable[..., Path]
) -> None:
    found = findings("--server", serve("llama").endpoint, "--model", str(checkpoints("llama")), "--no-local-trunk")
    assert found.state["gradient"] == "ok" and "central differences" in found.text["gradient"]


def test_a_model_that_does_not_fit_is_not_loaded(
    serve: Callable[..., Daemon], checkpoints: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    monkeypatch.setattr("zsl.models.loading.load_whole", None)
    found = findings("--server", serve("llama").endpoint, "--model", str(checkpoints("llama")))
    assert found.state["gradient"] == "ok"
    assert "0.0 GiB" in found.text["gradient"]


def test_the_clients_part_of_a_model_is_enough_and_brings_its_cut(
    serve: Callable[..., Daemon], checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    for cut in (CUT, "1:4"):
        divide(resolve(str(checkpoints("llama"))), parse_cut(cut), tmp_path / cut)
    found = findings("--server", serve("llama").endpoint, "--model", str(tmp_path / CUT / "client"))
    assert found.failed == [] and found.state["weights"] == found.state["cut"] == "ok"
    assert "the client's part" in found.text["gradient"]
    found = findings("--server", serve("llama").endpoint, "--model", str(tmp_path / "1:4" / "client"))
    assert found.failed == ["cut"] and "1:4 is wanted" in found.text["cut"]
    found = findings("--model", str(tmp_path / CUT / "trunk"))
    assert found.failed == ["model"] and "the client's part" in found.text["model"]


@contextmanager
def wrong_by(factor: float) -> Iterator[None]:
    """Trunks in this process answer gradients times `factor`."""
    right = TorchCompute._replies

    def wrong(self: TorchCompute, role: Any, tensors: Any, dtypes: Any) -> Any:
        return right(self, role, [t * factor for t in tensors] if role == "gradients" else tensors, dtypes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchCompute, "_replies", wrong)
        yield


def test_a_gradient_that_is_wrong_by_a_thousandth_fails_beside_the_local_model(
    checkpoints: Callable[..., Path],
) -> None:
    path = str(checkpoints("llama"))
    with wrong_by(1.001), served(path) as endpoint:
        found = findings("--server", endpoint, "--model", path)
    assert found.failed == ["gradient"]
    assert "1.0e-03" in found.text["gradient"]
    assert "do not train" in found.text["gradient"]


def test_a_gradient_that_is_wrong_by_a_twentieth_fails_beside_central_differences(
    checkpoints: Callable[..., Path],
) -> None:
    with wrong_by(1.05), served(str(checkpoints("llama"))) as endpoint:
        found = findings("--server", endpoint)
    assert found.failed == ["gradient"]
    assert found.state["weights"] == "skip" and "--model" in found.text["weights"]


@pytest.mark.parametrize("factor", [1.5, 0.0, np.nan])
def test_any_wrong_gradient_fails(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support.square, "gradient", lambda x, gradients: 2 * x * gradients * np.float32(factor))
    with SquareServer() as server:
        assert findings("--server", server.endpoint).failed == ["gradient"]


def test_a_right_gradient_that_central_differences_cannot_follow_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support.square, "squared", lambda x: np.sin(3000 * x))
    monkeypatch.setattr(support.square, "gradient", lambda x, gradients: 3000 * np.cos(3000 * x) * gradients)
    with SquareServer() as server:
        found = findings("--server", server.endpoint)
    assert found.state["gradient"] == "warn" and "uncertain" in found.text["gradient"]


def test_other_weights_are_named_and_the_daemons_gradient_is_checked_all_the_same(
    serve: Callable[..., Daemon], checkpoints: Callable[..., Path]
) -> None:
    found = findings("--server", serve("llama").endpoint, "--model", str(checkpoints("llama", seed=1)))
    assert found.failed == ["weights"]
    assert "load the same checkpoint" in found.text["weights"]
    assert found.state["configuration"] == "ok" and found.state["gradient"] == "ok"


def test_another_kind_of_model_is_named_with_what_differs(
    serve: Callable[..., Daemon], checkpoints: Callable[..., Path]
) -> None:
    found = findings("--server", serve("llama").endpoint, "--model", str(checkpoints("gpt2")), "--cut", "1:5")
    assert found.failed == ["configuration", "weights", "cut"]
    assert "model_type is gpt2" in found.text["configuration"] and "llama at the daemon" in found.text["configuration"]
    assert "--cut 2:4" in found.text["cut"]


def test_random_weights_of_another_kind_are_not_laid_on_versions(serve: Callable[..., Daemon]) -> None:
    found = findings("--server", serve("llama").endpoint, "--model", "random:gpt2", "--no-local-trunk")
    assert found.failed == ["configuration", "weights"]
    assert "versions" not in found.text["weights"] and "load the same checkpoint" in found.text["weights"]


def test_forward_only_and_another_dtype_are_warnings() -> None:
    with EchoServer(forward_only=True, dtype="bf16") as server:
        found = findings("--server", server.endpoint)
    assert found.failed == []
    assert found.state["gradient"] == "warn" and "forward only" in found.text["gradient"]
    assert found.state["dtype"] == "warn" and 'model.dtype = "bfloat16"' in found.text["dtype"]


def test_fewer_bits_are_a_warning_and_no_reason_to_compare_with_the_local_model(
    checkpoints: Callable[..., Path],
) -> None:
    pytest.importorskip("bitsandbytes")
    model = str(checkpoints("llama"))
    with served(model, quantize="4bit") as endpoint:
        found = findings("--server", endpoint, "--model", model)
    assert found.failed == []
    assert found.state["dtype"] == "warn" and "4bit" in found.text["dtype"]
    assert found.state["gradient"] == "ok" and "quantized" in found.text["gradient"]


def test_another_version_at_the_daemon_is_a_warning() -> None:
    with EchoServer() as server, StatusClient(server.endpoint) as client:
        status = client.status()
    assert check_versions(status).state == "ok"
    other = check_versions(status.model_copy(update={"software": "0.0.9"}))
    assert other.state == "warn" and "0.0.9" in other.line


# --- no daemon -------------------------------------------------------------------------------------------------


def test_nothing_listens() -> None:
    found = findings("--server", "127.0.0.1:1")  # a port that no daemon takes by chance
    assert found.failed == ["daemon"]
    assert "nothing listens" in found.text["daemon"] and "zsl-trunkd" in found.text["daemon"]
    assert "gradient" not in found.state


@contextmanager
def web_server(answer: int = 200) -> Iterator[str]:
    """Another program: it speaks HTTP."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(answer)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join(10)


def test_another_program_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsl.link.status_client.CONNECT_TIMEOUT_SECONDS", 0.5)
    with web_server() as address:
        found = findings("--server", address)
    assert found.failed == ["daemon"]
    assert "something listens" in found.text["daemon"]


def test_another_program_that_speaks_zeromq_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsl.link.status_client.ANSWER_TIMEOUT_SECONDS", 0.5)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        found = findings("--server", f"127.0.0.1:{port}")
    assert found.failed == ["daemon"] and "has said nothing" in found.text["daemon"]


# --- keys ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    made = Keys(tmp_path_factory.mktemp("keys"))
    made.write_list("alice")
    return made


@pytest.fixture
def encrypted(keys: Keys) -> Iterator[SquareServer]:
    with SquareServer(access=keys.access) as running:
        yield running


def options(keys: Keys, server: str, client: str) -> list[str]:
    return ["--server-key", keys.public(server), "--client-key", str(keys.secret(client))]


def test_with_the_right_keys_all_is_well(encrypted: SquareServer, keys: Keys) -> None:
    found = findings("--server", encrypted.endpoint, *options(keys, "server", "alice"))
    assert found.failed == [] and found.state["gradient"] == "ok"
    assert keys.pair("server").public.decode() in found.text["keys"]
    assert keys.pair("alice").secret.decode() not in str(found.text)


@pytest.mark.parametrize(
    ("server", "client", "words"),
    [
        ("server", "mallory", "tenants.toml"),
        ("mallory", "alice", "server_key"),
        (None, None, "encrypt"),
    ],
    ids=["unknown client", "wrong server key", "no keys"],
)
def test_wrong_keys_are_told_from_each_other(
    encrypted: SquareServer, keys: Keys, server: str | None, client: str | None, words: str
) -> None:
    given = options(keys, server, client) if server and client else []
    found = findings("--server", encrypted.endpoint, *given)
    assert found.failed == ["daemon"] and words in found.text["daemon"]


def test_a_secret_that_others_can_read_fails_before_anything_is_sent(tmp_path: Path) -> None:
    own = Keys(tmp_path)
    own.secret("alice").chmod(0o644)
    found = findings("--server", "127.0.0.1:1", *options(own, "server", "alice"))
    assert found.failed == ["keys"] and "chmod 600" in found.text["keys"]
    assert found.state["daemon"] == "skip"


# --- this machine ----------------------------------------------------------------------------------------------


def test_without_a_daemon_this_installation_is_checked() -> None:
    found = findings()
    assert found.failed == []
    assert found.state["daemon"] == "skip" and "--server" in found.text["daemon"]
    assert found.text["hub"].startswith("not asked: HF_HUB_OFFLINE")


def test_packages_are_compared_with_what_zsl_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in ("trl", "datasets", "safetensors"):
            raise metadata.PackageNotFoundError(name)
        return {"peft": "0.1"}.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = findings()
    assert found.failed == ["peft", "safetensors"]
    assert re.fullmatch(r"0\.1, zsl needs >=[\d.]+; pip install 'peft>=[\d.]+'", found.text["peft"])
    assert found.text["safetensors"].startswith("not installed; pip install 'safetensors")
    assert found.state["datasets"] == "skip" and "needed for zsl-train" in found.text["datasets"]
    assert found.state["trl"] == "skip"
    assert found.text["trl"].startswith("not installed, needed for SFTTrainer; pip install 'trl>=")


def test_the_hub_is_a_fact_and_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with web_server() as address:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://{address}")
        there = machine.check_hub()
        assert there.state == "ok" and there.found == f"http://{address} is reachable"
    gone = machine.check_hub()
    assert gone.state == "ok" and gone.found.startswith(f"http://{address} cannot be reached: ")
    with web_server(answer=503) as address:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://{address}")
        unwell = machine.check_hub()
    assert unwell.state == "ok" and unwell.found.startswith(f"http://{address} answers 503; hub ids load only")


def test_the_hub_is_asked_where_neither_torch_nor_transformers_can_be_imported() -> None:
    script = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from zsl.client.doctor.check import attempt
from zsl.client.doctor.machine import check_hub
print(attempt("hub", check_hub).line)
"""
    finished = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:1"},
    )
    assert re.match(r"ok +hub +http://127\.0\.0\.1:1 cannot be reached: ", finished.stdout)


def test_a_model_that_cannot_be_loaded_fails_with_its_name() -> None:
    found = findings("--model", "random:nothing")
    assert found.failed == ["model"] and "nothing" in found.text["model"]


def test_a_check_that_breaks_is_that_checks_failure_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("the driver\nis gone")

    monkeypatch.setattr(examination, "check_torch", broken)
    found = findings()
    assert found.failed == ["devices"]
    assert found.text["devices"].startswith("RuntimeError: the driver is gone") and found.state["hub"] == "ok"
    assert "Traceback" in run("--debug").output


# --- the command -----------------------------------------------------------------------------------------------


def test_json_is_an_object_a_line() -> None:
    lines = [json.loads(line) for line in run("--json").output.splitlines()]
    assert {
        "check": "daemon",
        "state": "skip",
        "found": "none is named",
        "to_do": "name one with --server HOST:PORT",
    } in lines


@pytest.mark.parametrize("option", ["--server-key", "--client-key"])
def test_keys_without_a_daemon_are_refused_by_name(option: str) -> None:
    finished = run(option, "some.key")
    assert finished.exit_code == EXIT_USAGE and f"{option} " in finished.output and "--server " in finished.output


def test_several_daemons_are_refused_by_name() -> None:
    finished = run("--server", "127.0.0.1:1,127.0.0.1:2")
    assert finished.exit_code == EXIT_USAGE and "--server" in finished.output


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Examination) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(Examination, "run", interrupted)
    finished = run()
    assert finished.exit_code == 130 and finished.output.endswith("zsl doctor: interrupted\n")


def test_help_loads_no_torch() -> None:
    assert zsl_and_what_it_loads(["doctor", "--help"], {"torch", "transformers", "zmq"})[1] == set()
