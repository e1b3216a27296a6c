"""Embedded trunk: a daemon that a command starts for itself, in a process of its own on a loopback TCP port.

Not a thread of the command: two teams of OpenMP's threads in one process are more threads than cores, and libgomp lets
them sleep at every barrier. Imports no torch, so that the daemon can load beside the command's own imports.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from zsl import errors
from zsl.errors import StartupError, ZslError
from zsl.text.printable import printable
from zsl.transport.curve_keys import read_key_pair, write_key_pair

logger = logging.getLogger(__name__)

# A daemon's own settings are not meant for this one.
DAEMON_VARIABLES = "ZSL_TRUNKD_"
# Of this process: the same modules have to be found, wherever the command was started.
_PROGRAM = "import sys; sys.path[:] = {path!r}; from zsl.trunk.daemon.embedded_process import main; main()"


class EmbeddedTrunk:
    """Starts the daemon of a trunk in `with`, without waiting for it, and ends it.

    The daemon ends with this process, however that ends. It serves only who has the keys, which this process makes:
    `server_key` and `client_key`. Its log lines become those of this process.
    """

    def __init__(self, model: str, cut: str | None, dtype: str, *, deterministic: bool = False) -> None:
        self._options = {"model": model, "cut": cut, "dtype": dtype, "deterministic": deterministic}
        self._ready: Future[str] = Future()
        self._ending = False

    @property
    def endpoint(self) -> str:
        """Address of the daemon. Waits until it serves; raises what ended it instead."""
        return self._ready.result()  # the thread that reads sets it when the daemon ends, at the latest

    @property
    def server_key(self) -> str:
        return read_key_pair(self._keys / "server.key_secret").public.decode()

    @property
    def client_key(self) -> str:
        return str(self._keys / "client.key_secret")

    def __enter__(self) -> Self:
        self._directory = tempfile.TemporaryDirectory(prefix="zsl-embedded-")  # has mode 0700
        with ExitStack() as stack:
            stack.callback(self._directory.cleanup)
            self._keys = Path(self._directory.name)
            for name in ("server", "client"):
                write_key_pair(self._keys, name)
            client = read_key_pair(Path(self.client_key)).public.decode()
            (self._keys / "tenants.toml").write_text(f"[tenants.client]\npublic_key = {json.dumps(client)}\n")
            environment = {name: value for name, value in os.environ.items() if not name.startswith(DAEMON_VARIABLES)}
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM.format(path=sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={"TRANSFORMERS_VERBOSITY": "error", **environment},
                start_new_session=True,  # Ctrl-C is for the command, which ends its last step through the daemon
            )
            stack.callback(self._end)
            self._reader = threading.Thread(target=self._read, name="zsl-embedded-trunk", daemon=True)
            self._reader.start()
            assert self._process.stdin is not None
            options = {**self._options, "keys": str(self._keys), "parent": os.getpid()}
            with suppress(BrokenPipeError):  # it has ended: `endpoint` raises
                self._process.stdin.write(json.dumps(options).encode() + b"\n")
                self._process.stdin.flush()
            self._opened = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def _end(self) -> None:
        """Kill the daemon, and what it has started: its client has closed its session, or never opened one."""
        self._ending = True
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # it leads a session
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _read(self) -> None:
        """Read what the daemon writes: that it is ready, the error that ended it, and lines of its log."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                self._take(line)
            except Exception:  # the daemon waits once its pipe is full: read on, whatever a line holds
                logger.exception("a line of the embedded trunk cannot be read")
        status = self._process.wait()
        ended = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
        if not self._ready.done():
            self._ready.set_exception(StartupError(f"the embedded trunk ended while it loaded its model: {ended}"))
        elif not self._ending and self._ready.exception() is None:
            logger.error("the embedded trunk has ended: %s; start the command again", ended)

    def _take(self, line: bytes) -> None:
        text, entry = _parted(line)
        if text:
            with suppress(AttributeError, OSError, ValueError):  # standard error may be closed
                sys.stderr.write(printable(text.decode(errors="backslashreplace").rstrip("\n")) + "\n")
        if entry is None:
            return
        if entry.get("event") == "ready":
            self._ready.set_result(entry["endpoint"])
        elif entry.get("event") == "failed" and not self._ready.done():
            self._ready.set_exception(_error_of(entry))
        elif entry.get("event") == "failed":
            logger.error("the embedded trunk has failed: %s", entry["text"])
        else:
            _log(entry)


def _parted(line: bytes) -> tuple[bytes, dict[str, Any] | None]:
    """Return what a library has printed on a line, and the event or log line at its end, if there is one."""
    start = max(line.rfind(b'{"event": '), line.find(b'{"time": '), 0)
    entry = _entry(line[start:])
    return (line, None) if entry is None else (line[:start], entry)


def _entry(line: bytes) -> dict[str, Any] | None:
    """Return the event or log line in a line; None for a line of another kind, as libraries print."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    is_one = isinstance(entry, dict) and ("event" in entry or {"logger", "level", "message"} <= entry.keys())
    return entry if is_one else None


def _error_of(entry: dict[str, Any]) -> ZslError:
    """Return the daemon's error, of its own class; `StartupError` for one of another library."""
    kind = getattr(errors, entry["error"], None)
    if isinstance(kind, type) and issubclass(kind, ZslError):
        return kind(entry["text"])
    return StartupError(f"the embedded trunk cannot start: {entry['error']}: {entry['text']}")


def _log(entry: dict[str, Any]) -> None:
    """Log a daemon's log line here, if lines of its logger and level are; of other libraries, errors only."""
    origin, level = logging.getLogger(entry["logger"]), getattr(logging, entry["level"].upper())
    if origin.isEnabledFor(level) and (level >= logging.ERROR or entry["logger"].partition(".")[0] == "zsl"):
        facts = {"name": entry["logger"], "levelno": level, "levelname": entry["level"].upper()}
        origin.handle(logging.makeLogRecord({**facts, "msg": entry["message"], "exc_text": entry.get("exception")}))
