"""Measure a healthy client's step latency while an unknown peer floods the daemon, over its latency alone.

    bin/bench floods                              each kind of flood, open and with keys
    bin/bench floods --kinds garbage --seconds 10

The trunk is a Llama of 4 layers; a step is a forward and a backward of 1 x 16 tokens. Alone and beside the flood run in
alternation, and the ratio is that of neighbouring rounds. The stranger is a process at full speed: on a machine of two
cores it takes one of them from client and daemon. With nice 19 it leaves them what they need, so that what
is left is the daemon's own cost.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import msgpack
import torch
import zmq
from report import Report, median, out_option, percentile
from servers import trunk_daemon
from small_steps import CONFIG, LAYERS, remote_step
from transformers import LlamaModel

import zsl
from zsl.transport.curve_keys import read_public_key, write_key_pair
from zsl.transport.zmtp import COMMAND, MORE, command, greeting, head, metadata
from zsl.wire.frames import KIND, MAGIC, MAJOR, encode, seal
from zsl.wire.messages import Hello, StatusRequest

HOST = "127.0.0.1"
PERCENT = 99.0
STRANGER_STARTS_SECONDS = 0.5


def message(frames: list[bytes]) -> bytes:
    """A whole message as it crosses without keys."""
    flags = [MORE] * (len(frames) - 1) + [0]
    return b"".join(head(len(frame), flag) + frame for frame, flag in zip(frames, flags, strict=True))


def shaken_hands() -> bytes:
    """Greeting and READY, without waiting for the other end's."""
    ready = command(b"READY", metadata({b"Socket-Type": b"DEALER"}))
    return greeting(b"NULL") + head(len(ready), COMMAND) + ready


def unknown_keys() -> bytes:
    """A HELLO whose header is all of keys that no message has."""
    header = msgpack.packb(dict.fromkeys(range(5000)))
    return message([bytes(frame) for frame in seal([KIND.pack(MAGIC, MAJOR, Hello.TYPE, 0), header])])


def status() -> bytes:
    """A request for the daemon's status."""
    return message([bytes(part) for part in encode(StatusRequest(request=1))])


# What a stranger sends again and again on a connection, until that ends and it makes another.
FLOODS: dict[str, Callable[[], tuple[bytes, bytes]]] = {
    "connects": lambda: (b"", b""),
    "garbage": lambda: (os.urandom(1 << 16), os.urandom(1 << 16)),
    "bad messages": lambda: (shaken_hands(), message([b"x", b"y"]) * 500),
    "unknown keys": lambda: (shaken_hands(), unknown_keys()),
    "status": lambda: (shaken_hands(), status() * 100),
    "empty frames": lambda: (shaken_hands(), head(0, MORE) * 10_000),
    "a message without end": lambda: (shaken_hands(), (head(30_000, MORE) + bytes(30_000))),
    "pings": lambda: (shaken_hands(), (head(8, COMMAND) + command(b"PING", b"\0\0x")) * 500),
}
WITH_KEYS = "unknown key's handshakes"


def flood(kind: str, port: int, server_key: str) -> None:
    """The body of the stranger's process."""
    if kind == WITH_KEYS:
        public, secret = zmq.curve_keypair()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        while True:
            dealers = [context.socket(zmq.DEALER) for _ in range(20)]
            for dealer in dealers:
                dealer.linger = 0
                dealer.curve_serverkey, dealer.curve_publickey, dealer.curve_secretkey = (
                    server_key.encode(),
                    public,
                    secret,
                )
                dealer.connect(f"tcp://{HOST}:{port}")
            time.sleep(0.05)
            for dealer in dealers:
                dealer.close()
    first, again = FLOODS[kind]()
    while True:
        with suppress(OSError), socket.create_connection((HOST, port), 5) as connection:
            connection.settimeout(5)
            connection.sendall(first)
            while again:
                connection.sendall(again)
                with suppress(BlockingIOError):
                    connection.recv(1 << 20, socket.MSG_DONTWAIT)


@contextmanager
def stranger(kind: str, port: int, server_key: str, nice: bool) -> Iterator[None]:
    """A flood, between `with` and its end."""
    command_line = [sys.executable, __file__, "--flood", kind, str(port), server_key]
    process = subprocess.Popen(["nice", "-n", "19", *command_line] if nice else command_line)
    try:
        time.sleep(STRANGER_STARTS_SECONDS)
        yield
        assert process.poll() is None, "the stranger has ended"
    finally:
        process.kill()
        process.wait()


def milliseconds(step: Callable[[], None], seconds: float) -> list[float]:
    """Time each step, for about so many seconds."""
    took = []
    until = time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        step()
        took.append(1000 * (time.perf_counter() - began))
    return took


@click.command()
@click.option("--seconds", default=4.0, show_default=True, help="Duration of one measurement.")
@click.option("--rounds", default=3, show_default=True, help="Rounds of each flood.")
@click.option(
    "--kinds", default=",".join([*FLOODS, WITH_KEYS]), show_default=True, help="Floods to run, separated by commas."
)
@out_option
def main(seconds: float, rounds: int, kinds: str, out: Path) -> None:
    """Measure a healthy client's latency during an unknown peer's flood, over its latency alone."""
    torch.set_num_threads(1)
    model = LlamaModel(CONFIG).eval()
    report = Report("floods", "Steps of 1 x 16 tokens beside a stranger's flood", out)
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        model.save_pretrained(directory)
        folder = Path(directory)
        for name in ("server", "alice"):
            write_key_pair(folder / "keys", name)
        server_key = read_public_key(str(folder / "keys/server.key")).decode()
        alice = read_public_key(str(folder / "keys/alice.key")).decode()
        (folder / "tenants.toml").write_text(f'[tenants.alice]\npublic_key = "{alice}"\n')
        arguments = ["--model", directory, "--cut", f"0:{LAYERS}", "--threads", "1"]
        keyed = ["--keys", str(folder / "keys"), "--tenants", str(folder / "tenants.toml")]
        ways: dict[bool, tuple[list[str], dict[str, Any]]] = {
            False: (arguments, {}),
            True: (
                arguments + keyed,
                {"server_key": str(folder / "keys/server.key"), "client_key": str(folder / "keys/alice.key_secret")},
            ),
        }
        for with_keys in (False, True):
            chosen = [kind for kind in kinds.split(",") if (kind == WITH_KEYS) == with_keys]
            if not chosen:
                continue
            daemon_arguments, keys = ways[with_keys]
            endpoint = stack.enter_context(trunk_daemon(*daemon_arguments))["endpoint"]
            trunk = stack.enter_context(zsl.TrunkClient(endpoint, **keys))
            trunk.connect()
            step = remote_step(trunk, 1, 16)
            milliseconds(step, 1.0)
            port = int(endpoint.rpartition(":")[2])
            for kind in chosen:
                for nice in (False, True):
                    alone, beside = [], []
                    for _ in range(rounds):
                        alone.append(milliseconds(step, seconds))
                        with stranger(kind, port, server_key, nice):
                            beside.append(milliseconds(step, seconds))
                    pairs = list(zip(beside, alone, strict=True))
                    report.add(
                        flood=kind,
                        stranger="nice 19" if nice else "full speed",
                        p50_alone_ms=median([median(took) for took in alone]),
                        p50_ms=median([median(took) for took in beside]),
                        p99_alone_ms=median([percentile(took, PERCENT) for took in alone]),
                        p99_ms=median([percentile(took, PERCENT) for took in beside]),
                        p50_ratio=median([median(one) / median(other) for one, other in pairs]),
                        p99_ratio=median(
                            [percentile(one, PERCENT) / percentile(other, PERCENT) for one, other in pairs]
                        ),
                    )
    report.publish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--flood"]:
        flood(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        main()
