"""`zsl-trunkd` as the person who types it sees it: what it prints, how it ends, what it refuses to start with."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import zsl
from support.daemon import COMMAND, Daemon
from support.echo import CUT as ECHO_CUT
from support.echo import IDENTITY
from support.models import CUT
from support.peer import Peer
from zsl.cli.trunkd import trunkd
from zsl.cli.zsl import zsl as zsl_command
from zsl.errors import ForbiddenError, ModelError, RunFailed, TrunkAuthError
from zsl.transport.curve_keys import read_public_key, write_key_pair
from zsl.trunk.daemon.process import DaemonOptions, run_daemon
from zsl.trunk.daemon.standard_streams import MAX_WAITING_BYTES, check_output, drain_output, written_by_threads
from zsl.trunk.failpoints import failpoint_from
from zsl.trunk.openmp import SPINS, SPINS_WHERE_SHARED, limit_spinning, ready_threads, stop_spinning_if_shared
from zsl.trunk.settings import ServerSettings, TrunkInfo


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, **environment},
    )


def assert_one_line(finished: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The last line says what, where and what to do; there is no traceback."""
    assert finished.returncode == code, finished.stderr
    assert "Traceback" not in finished.stderr
    line = finished.stderr.strip().splitlines()[-1]
    assert line.startswith("zsl-trunkd: "), finished.stderr
    for word in words:
        assert word in line, line


def test_the_ready_line_names_endpoint_model_cut_and_parameters(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    path = str(checkpoints("gpt2"))
    arguments = [*COMMAND, "--port", "0", "--model", path, "--cut", CUT]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        shown = [process.stdout.readline()]  # when it is there, so are the others
        process.terminate()
        shown += process.stdout.readlines()
        assert process.wait(30) == 0
        process.stdout.close()
    first, what, *more = [line.rstrip("\n") for line in shown]
    assert re.fullmatch(r"zsl-trunkd [\d.]+ ready on tcp://127\.0\.0\.1:\d+", first), first
    assert re.fullmatch(rf"  {path}, layers 2:4, [\d,]+ parameters, float32 on cpu", what), what
    assert all(line.startswith("  ") and len(line) <= 80 for line in more), more
    logged = (tmp_path / "log").read_text().splitlines()
    assert logged and [line for line in logged if " INFO " not in line] == []  # no library's warnings


@pytest.mark.long
def test_with_no_argument_it_serves_gpt2_small_cut_2_10(tmp_path: Path) -> None:
    busy = [COMMAND[0], "-c", f"import zsl.trunk.openmp as own; own.ready_threads = lambda: 1000; {COMMAND[2]}"]
    command = ["env", "-u", "OMP_WAIT_POLICY", *busy, "--port", "0", "--log-format", "json"]  # conftest sets it
    with Daemon(log=tmp_path / "log", environment={"OMP_DISPLAY_ENV": "verbose"}, command=command) as daemon:
        ready = daemon.ready
    assert (ready["model"], ready["cut"], ready["parameters"]) == ("random:gpt2", "2:10", 56_702_976)
    # Where other processes use the cores, libgomp, which says this, has been told to.
    assert f"GOMP_SPINCOUNT = '{SPINS_WHERE_SHARED}'" in (tmp_path / "log").read_text()


def test_spins_are_limited_and_none_are_left_where_others_use_the_cores_unless_the_user_has_set_them() -> None:
    cores = os.cpu_count() or 1
    for ready, given, expected in (
        ([cores, 0, cores, cores, 0], {}, {"GOMP_SPINCOUNT": SPINS_WHERE_SHARED}),
        ([cores, cores, 0, 0, cores - 1], {}, {"GOMP_SPINCOUNT": SPINS}),
        ([cores] * 5, {"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
        ([cores] * 5, {"GOMP_SPINCOUNT": "9"}, {"GOMP_SPINCOUNT": "9"}),
    ):
        environ, looks, slept = dict(given), iter(ready), list[float]()
        is_shared = stop_spinning_if_shared(environ, count_ready=looks.__next__, sleep=slept.append)
        assert is_shared == (expected == {"GOMP_SPINCOUNT": SPINS_WHERE_SHARED})
        limit_spinning(environ)
        assert environ == expected
        assert sum(slept) <= 0.2
    assert ready_threads() >= 0


@pytest.mark.long
def test_every_option_comes_from_the_environment_too(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    environment = {
        "ZSL_TRUNKD_MODEL": str(checkpoints("gpt2")),
        "ZSL_TRUNKD_CUT": "1:3",
        "ZSL_TRUNKD_THREADS": "1",
        "ZSL_TRUNKD_DTYPE": "bfloat16",
        "ZSL_TRUNKD_FORWARD_ONLY": "1",
    }
    with Daemon(log=tmp_path / "log", environment=environment) as daemon:
        ready = daemon.ready
    assert (ready["cut"], ready["threads"], ready["dtype"], ready["forward_only"]) == ("1:3", 1, "bfloat16", True)
    help_text = run("--help").stdout
    options = set(re.findall(r"--([a-z-]+)", help_text)) - {"help", "version"}
    assert {f"ZSL_TRUNKD_{name.upper().replace('-', '_')}" for name in options} == set(
        re.findall(r"ZSL_TRUNKD_[A-Z_]+", help_text)
    )


@pytest.mark.long
def test_what_is_kept_stays_within_the_stash_memory_and_costs_no_result(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    limit = 1 << 20
    arguments = ["--model", str(checkpoints("llama")), "--cut", CUT, "--stash-memory", str(limit)]
    torch.manual_seed(0)
    gradients = torch.randn(2, 16, 32)
    with Daemon(*arguments, log=tmp_path / "log") as daemon, zsl.TrunkClient(daemon.endpoint) as client:
        activations = [torch.randn(2, 16, 32) for _ in range(300)]
        expected = client.backward(client.forward(activations[0], keep=True), gradients).tensor
        steps = [client.forward(one, keep=True) for one in activations]
        held = client.status().held_bytes
        assert 0 < held <= limit < 300 * activations[0].nbytes, "not even the inputs of all steps fit"
        assert torch.equal(client.backward(steps[0], gradients).tensor, expected), "given up, and sent again"
        assert client.backward(steps[-1], gradients).tensor.isfinite().all()


@pytest.mark.parametrize("size", ["much", "4 parsecs", "-1GiB"])
def test_a_malformed_size_is_exit_2_with_an_example(size: str) -> None:
    finished = run("--stash-memory", size)
    assert finished.returncode == 2
    assert "4GiB" in finished.stderr and "Traceback" not in finished.stderr


@pytest.mark.long
def test_batch_sizes_are_measured_or_given_and_shown(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    arguments = ["--model", str(checkpoints("llama")), "--cut", CUT]
    with Daemon(*arguments, log=tmp_path / "log") as daemon:
        assert 256 <= daemon.ready["max_batch_tokens"] <= 4096 and daemon.ready["packs"]
    given = ["--max-batch-tokens", "99", "--merge-below-tokens", "0", "--stash-memory", "1.5MiB"]
    with Daemon(*arguments, *given, log=tmp_path / "log") as daemon:
        assert (daemon.ready["max_batch_tokens"], daemon.ready["merge_below_tokens"]) == (99, 0)


@pytest.mark.long
def test_a_bfloat16_trunk_computes_in_bfloat16(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    arguments = ["--model", str(checkpoints("llama")), "--cut", CUT, "--dtype", "bfloat16"]
    with Daemon(*arguments, log=tmp_path / "log") as daemon, zsl.TrunkClient(daemon.endpoint) as client:
        assert client.connect().dtype == "bf16"
        torch.manual_seed(0)
        activations = torch.randn(2, 8, 32)
        step = client.forward(activations, keep=True)
        assert step.output.dtype == torch.float32
        assert torch.equal(step.output, step.output.bfloat16().float())
        assert client.backward(step, torch.ones(2, 8, 32)).tensor.isfinite().all()


def test_sigterm_ends_it_with_0_and_frees_the_port(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    arguments = ["--model", str(checkpoints("llama")), "--cut", CUT]
    with Daemon(*arguments, log=tmp_path / "log") as daemon:
        with zsl.TrunkClient(daemon.endpoint):
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0
        with socket.create_server(("127.0.0.1", daemon.port)):
            pass
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert any("SIGTERM" in event["message"] for event in events)


@pytest.mark.long
def test_a_second_sigterm_ends_it_at_once(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    arguments = ["--model", str(checkpoints("llama")), "--cut", CUT]
    with Daemon(*arguments, log=tmp_path / "log") as daemon, zsl.TrunkClient(daemon.endpoint) as client:
        step = client.forward(torch.zeros(1, 2, 32), keep=True)  # an open step: the first signal waits for it
        daemon.signal(signal.SIGTERM)
        while "SIGTERM" not in daemon.log.read_text():
            assert daemon.process.poll() is None
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 128 + signal.SIGTERM
        del step


def test_before_it_knows_its_model_and_while_it_reads_the_weights_it_says_that_it_loads_and_ends_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    seen: list[str] = []
    codes: list[int] = []
    ended = threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    def look() -> None:
        checked = CliRunner().invoke(zsl_command, ["doctor", "--server", f"127.0.0.1:{port}"]).output
        seen.append(next(line for line in checked.splitlines() if "  daemon " in line))

    def load(**_: object) -> None:
        look()
        os.kill(os.getpid(), signal.SIGHUP)  # there is no list to read again
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended.wait(30)
        raise ModelError("seen enough")

    def plan(*_: object, **__: object) -> SimpleNamespace:
        look()
        os.kill(os.getpid(), signal.SIGHUP)
        return SimpleNamespace(info=TrunkInfo(IDENTITY, ECHO_CUT, "f32", False, 64), cut=ECHO_CUT, load=load)

    monkeypatch.setattr("zsl.trunk.daemon.process.plan_trunk", plan)
    monkeypatch.setattr("zsl.trunk.daemon.sighup._has_terminal", lambda: False)
    monkeypatch.setattr("zsl.trunk.daemon.process.os._exit", end)
    options = DaemonOptions(
        model="a model",
        cut=None,
        host="127.0.0.1",
        port=port,
        dtype=torch.float32,
        quantize=None,
        device="cpu",
        threads=None,
        forward_only=False,
        reveals=(),
        settings=ServerSettings(),
        max_batch_tokens=None,
        merge_below_tokens=None,
        deterministic=False,
        access=None,
        failpoint=failpoint_from({}),
        log_format="text",
    )
    with pytest.raises(ModelError, match="seen enough"):
        run_daemon(options)
    assert codes == [128 + signal.SIGTERM]
    assert [line[:4] for line in seen] == ["FAIL", "FAIL"]
    assert all("still loading its model" in line and "hangs" not in line for line in seen)
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.mark.long
def test_neither_unread_output_nor_sighup_stops_an_open_daemon_and_a_closed_terminal_drains_it(
    checkpoints: Callable[..., Path],
) -> None:
    master, slave = os.openpty()

    def take_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where nohup started the tests
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    arguments = ["--port", "0", "--log-format", "json", "--debug", "--model", str(checkpoints("llama")), "--cut", CUT]
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(slave)
    assert process.stdout is not None and process.stderr is not None

    def read_until(word: str) -> dict[str, str]:
        while True:
            assert process.stderr is not None
            entry: dict[str, str] = json.loads(process.stderr.readline())  # each line is whole
            if word in entry["message"]:
                return entry

    give_up = threading.Timer(90, process.kill)
    give_up.start()
    try:
        endpoint = json.loads(process.stdout.readline())["endpoint"]
        process.send_signal(signal.SIGHUP)
        read_until("SIGHUP")
        lines = 2 * (MAX_WAITING_BYTES + (64 << 10)) // 100  # of more than 100 bytes: more than pipe and queue hold
        with Peer(endpoint) as peer:
            for _ in range(lines):
                peer.send_frames([b"nothing of ours"])
            assert peer.status().sessions == 0, "it serves though its log is stuck"
            dropped = read_until("dropped here")
            assert dropped["level"] == "warning" and int(dropped["message"].split()[0].replace(",", "")) > 100
            for _ in range(lines):
                peer.send_frames([b"nothing of ours"])
            assert peer.status().sessions == 0
        os.close(master)  # the terminal closes
        assert process.wait(30) == 0, "nor does a stuck log keep it from ending"
    finally:
        give_up.cancel()
        process.kill()
        process.wait(30)
        process.stdout.close()
        process.stderr.close()


@pytest.mark.skipif(sys.platform != "linux", reason="opens /proc/self/fd")
def test_a_library_that_writes_in_c_to_a_pipe_that_nobody_reads_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    of_the_parent = os.dup(writing)
    with open(writing, "w") as error:
        monkeypatch.setattr("sys.stderr", error)
        with written_by_threads(str):
            assert not os.get_blocking(writing)
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 1 << 16)
            os.write(writing, bytes(1 << 16))
            with pytest.raises(BlockingIOError):
                os.write(writing, b"more")
            assert os.get_blocking(of_the_parent), "whoever started it goes on to wait"
            print("a line of the log", file=sys.stderr)
            assert not drain_output(0.0)
            read = b""
            while b"a line of the log\n" not in read:
                assert select.select([reading], [], [], 30)[0]
                read += os.read(reading, 1 << 16)
        assert os.get_blocking(writing)
    os.close(of_the_parent)
    os.close(reading)


@pytest.mark.parametrize("stuck", ["full", "closed"])
def test_a_daemon_whose_ready_line_cannot_be_written_ends_with_exit_1(
    stuck: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, closed = os.pipe()
    os.close(reading)
    with open("/dev/full" if stuck == "full" else closed, "w") as output:
        monkeypatch.setattr("sys.stdout", output)
        with written_by_threads(str):
            print("ready", flush=True)
            drain_output(30)
            with pytest.raises(RunFailed, match="standard output"):
                check_output()
    if stuck == "full":
        os.close(closed)


def test_a_port_in_use_is_exit_3_with_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        to_do = "choose another with --port (0 picks one)"
        words = f"zsl-trunkd: cannot listen on 127.0.0.1:{port}: the port is in use; {to_do}"
        assert_one_line(run("--port", port), 3, words)


def test_an_ipv6_address_may_stand_in_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[DaemonOptions] = []
    monkeypatch.setattr("zsl.trunk.daemon.process.run_daemon", served.append)
    monkeypatch.setattr("zsl.trunk.daemon.log.set_up_logging", lambda *_, **__: None)
    for host in ("[::1]", "::1"):
        finished = CliRunner().invoke(trunkd, ["--host", host])
        assert finished.exit_code == 0, finished.output
    assert [options.host for options in served] == ["::1", "::1"]


def test_an_address_outside_loopback_is_refused_unless_insecure() -> None:
    assert_one_line(run("--host", "0.0.0.0", "--port", "0"), 3, "0.0.0.0", "zsl keygen", "--insecure")


def test_with_keys_it_serves_who_is_on_the_list_at_any_address_and_reads_the_list_again_on_sighup(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("server", "alice", "bob"):
        write_key_pair(tmp_path, name)
    tenants, log = tmp_path / "tenants.toml", tmp_path / "log"

    def write_list(*names: str) -> None:
        keys = {name: read_public_key(str(tmp_path / f"{name}.key")).decode() for name in names}
        tenants.write_text("".join(f"[tenants.{name}]\npublic_key = '{key}'\n" for name, key in keys.items()))

    def client(name: str) -> zsl.TrunkClient:
        return zsl.TrunkClient(
            f"127.0.0.1:{daemon.port}",
            server_key=str(tmp_path / "server.key"),
            client_key=tmp_path / f"{name}.key_secret",
            request_timeout_seconds=20,
        )

    write_list("alice")
    arguments = ["--model", str(checkpoints("llama")), "--cut", CUT, "--host", "0.0.0.0"]
    options = ["--keys", str(tmp_path), "--tenants", str(tenants)]
    with Daemon(*arguments, *options, log=log) as daemon, client("alice") as alice:
        assert daemon.ready["encrypted"]
        assert alice.forward(torch.zeros(1, 2, 32)).output.isfinite().all()
        with closing(client("bob")) as bob, pytest.raises(TrunkAuthError, match=r"tenants\.toml"):
            bob.connect()
        write_list("bob")
        daemon.signal(signal.SIGHUP)
        while "read the list of tenants again" not in log.read_text():
            assert daemon.process.poll() is None
        with pytest.raises((ForbiddenError, TrunkAuthError)):
            alice.forward(torch.zeros(1, 2, 32))
        with client("bob"):
            pass
        tenants.write_text("[tenants.bob]\n")
        daemon.signal(signal.SIGHUP)
        with closing(client("bob")) as bob_again:
            while "stays as it was" not in log.read_text():
                assert daemon.process.poll() is None
            tenants.unlink()
            os.mkfifo(tenants)  # which nobody writes to
            daemon.signal(signal.SIGHUP)
            while "not a regular file" not in log.read_text():
                assert daemon.process.poll() is None
            bob_again.connect()
    written = log.read_text()
    assert "public_key is missing" in written
    assert read_public_key(str(tmp_path / "bob.key")).decode() not in written


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--keys", "."], ["--keys without --tenants"]),
        (["--tenants", "tenants.toml"], ["--tenants without --keys"]),
        (["--keys", "/nowhere", "--tenants", "tenants.toml"], ["server.key_secret", "zsl keygen"]),
    ],
    ids=["keys", "tenants", "no-key-file"],
)
def test_half_of_what_encryption_takes_is_exit_2_with_the_other_half(options: list[str], words: list[str]) -> None:
    assert_one_line(run("--port", "0", *options), 2, *words)


def test_a_malformed_failpoint_is_exit_2_with_an_example() -> None:
    assert_one_line(run("--port", "0", ZSL_FAILPOINT="sometimes:kill"), 2, "sometimes:kill", "before-backward:kill")


@pytest.mark.parametrize("cut", ["10:2", "2", "2:2", "a:b", "-1:3"])
def test_a_malformed_cut_is_exit_2_with_an_example(cut: str) -> None:
    assert_one_line(run("--cut", cut), 2, cut, "2:10")


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--model", "random:nothing"], ["nothing"], marks=LONG),
        (["--model", "random:bloom", "--cut", "0:1"], ["bloom", "tuple"]),
        pytest.param(["--model", "/nowhere/model.gguf"], ["/nowhere/model.gguf", "No such file"], marks=LONG),
        (["--model", "no-such-org/no-such-model"], ["no-such-org/no-such-model", "random:<model_type>"]),
        pytest.param(["--model", "package:no-such-package"], ["no-such-package", "pip install"], marks=LONG),
        pytest.param(["--cut", "2:13"], ["2:13", "layers 0 to 11"], marks=LONG),
        pytest.param(["--device", "cuda:7"], ["cuda:7"], marks=LONG),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value,
)
def test_what_cannot_be_served_is_exit_3_with_its_name(arguments: list[str], words: list[str]) -> None:
    assert_one_line(run("--port", "0", *arguments, HF_HUB_OFFLINE="1"), 3, *words)


@pytest.mark.long
def test_debug_shows_the_traceback() -> None:
    finished = run("--model", "random:nothing", "--debug")
    assert "Traceback" in finished.stderr
    assert finished.returncode == 3


@pytest.mark.parametrize(("options", "nbytes"), [([], None), (["--stash-memory", "0"], 0)])
def test_the_stash_memory_is_the_one_given_or_is_left_to_the_machine(
    monkeypatch: pytest.MonkeyPatch, options: list[str], nbytes: int | None
) -> None:
    served: list[DaemonOptions] = []
    monkeypatch.setattr("zsl.trunk.daemon.process.run_daemon", served.append)
    monkeypatch.setattr("zsl.trunk.daemon.log.set_up_logging", lambda *_, **__: None)
    assert CliRunner().invoke(trunkd, options).exit_code == 0
    settings = served[0].settings
    assert (settings.saves_graphs, settings.adapter_memory_bytes) == (nbytes is None, 1 << 30)
    assert nbytes is None or settings.stash_memory_bytes == nbytes
