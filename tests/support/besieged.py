"""A daemon under attack, beside it an honest client; `withstands` plays a form and looks at what has become of both.

Memory, open files and the process are asked of Linux; sessions and what is held, of the daemon itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import numpy as np
from zmq.utils import z85

from zsl.errors import ZslError
from zsl.link.open_session import Open
from zsl.link.status_client import StatusClient
from zsl.transport.curve_keys import ClientKeys
from zsl.trunk.malloc import IDLE_SECONDS
from zsl.wire.messages import Welcome

from .daemon import Daemon
from .hostile_scene import Form, Place, Scene, Victim
from .raw_zmtp import RawKeys
from .square import SquareClient

MIB = 1 << 20
TOKENS = 8
BACK_SECONDS = 15.0
GROWTH_MIB = 64  # by one form, when its peer has left
PEAK_MIB = 256  # while it is there
LOOK_SECONDS = 0.02


class Honest(SquareClient):
    """Takes whatever trunk it finds; its steps can be compared bit for bit."""

    def connect(self) -> Welcome:
        welcome = self.connection.open(None, None, "f32")
        random = np.random.default_rng(0)
        shape = (TOKENS, welcome.model.hidden_size)
        self.x, self.gradients = (random.standard_normal(shape).astype(np.float32) for _ in range(2))
        return welcome

    def session(self) -> Welcome:
        """The session that is open now: others may have ended earlier ones."""
        while (link := self.connection.link) is None or not isinstance(state := link.state, Open):
            self.bits()  # opens one
        return state.welcome

    def bits(self) -> bytes:
        """Run a step, and return its output and gradient."""
        return b"".join(part.tobytes() for part in self.step(self.x, self.gradients))


class Besieged:
    """`keys`: of the honest client, and of a tenant that attacks."""

    def __init__(self, start: Callable[[], Daemon], keys: tuple[Path, Path, Path] | None = None) -> None:
        """`keys`: the server's public key, and the secret ones of the honest client and of the attacker."""
        self._start = start
        self._keys = keys
        self._running: Daemon | None = None

    def begin(self) -> None:
        """Start the daemon if it does not run; what is measured then is what has to be again after each form."""
        if self._running is not None:
            if self.pid_lives():
                return
            self.end()
        self._running = self._start().start()
        self.honest = Honest(self._running.endpoint, **self._client_keys())
        welcome = self.honest.connect()
        tenant = None
        if self._keys is not None:
            server, attacker = _public(self._keys[0]), _secret(self._keys[2])
            tenant = RawKeys(server, *attacker)
        self.place = Place(self._running.port, welcome.model.hidden_size, tenant)
        for _ in range(20):
            self.bits = self.honest.bits()
        with self._status_client() as client:
            client.welcome()
            self.files, self.sessions = self._files(), client.status().sessions
            self.held_bytes = client.status().held_bytes
        self.memory = self._memory("VmRSS")

    def end(self) -> None:
        with suppress(ZslError):
            self.honest.connection.close()
        if self._running is not None:
            with suppress(Exception):
                self._running.kill() if self.pid_lives() else None
            assert self._running.process.stdout is not None
            self._running.process.stdout.close()
            self._running = None

    def withstands(self, form: Form, seed: int) -> None:
        """Raises `AssertionError` with what is not as it was."""
        self.begin()
        before = self._memory("VmRSS")
        self._forget_peak()
        welcome = self.honest.session()
        ids = self.honest.connection.new_request_id()
        victim = Victim(welcome.session, welcome.epoch, ids + 1)
        scene = Scene(self.place, victim, Random(f"{seed} {form.name}"))
        try:
            try:
                form.act(scene)
            except Exception:
                self.check_lives()  # a daemon that has ended explains it better
                raise
            self.check_step("beside the hostile peer")
            with self._status_client() as client:
                client.welcome()
        finally:
            with suppress(Exception):
                scene.leave()
            self.check_lives()
        self.check_step("after the hostile peer")
        self.check_back()
        peak = self._memory("VmHWM")
        assert peak - before < PEAK_MIB * MIB, f"memory rose by {(peak - before) // MIB} MiB"

        def grown() -> int:
            return self._memory("VmRSS") - before

        _until(lambda: grown() < GROWTH_MIB * MIB, lambda: f"{grown() // MIB} MiB of memory stay")

    def check_step(self, when: str) -> None:
        self.check_lives()
        try:
            assert self.honest.bits() == self.bits, f"another gradient {when}"
        finally:
            self.check_lives()

    def check_lives(self) -> None:
        assert self._running is not None
        if not self.pid_lives():
            lines = self._running.log.read_text(errors="replace").splitlines()
            raise AssertionError(f"the daemon has ended with {self._running.process.returncode}: {lines[-3:]}")

    def check_back(self, seconds: float = BACK_SECONDS) -> None:
        """Files, sessions, requests and what is held are as they were."""
        with self._status_client() as client:

            def now() -> tuple[int, int, int, int]:
                status = client.status()
                return self._files(), status.sessions, status.queued_requests, status.held_bytes

            wanted = (self.files, self.sessions, 0, self.held_bytes)
            _until(
                lambda: now() == wanted,
                lambda: f"files, sessions, queued requests, held bytes are {now()}, not {wanted}",
                seconds,
            )

    def check_memory(self, growth_mib: int) -> None:
        """The process is at most `growth_mib` larger than at its start, once it has returned what was freed."""

        def grown() -> int:
            return (self._memory("VmRSS") - self.memory) // MIB

        _until(lambda: grown() < growth_mib, lambda: f"{grown()} MiB of memory stay", 2 * IDLE_SECONDS + BACK_SECONDS)

    def pid_lives(self) -> bool:
        assert self._running is not None
        return self._running.process.poll() is None

    def _client_keys(self) -> dict[str, str]:
        if self._keys is None:
            return {}
        return {"server_key": str(self._keys[0]), "client_key": str(self._keys[1])}

    def _status_client(self) -> StatusClient:
        assert self._running is not None
        return StatusClient(self._running.endpoint, self.honest.connection._keys)

    @property
    def _proc(self) -> Path:
        assert self._running is not None
        return Path(f"/proc/{self._running.process.pid}")

    def _files(self) -> int:
        return len(list((self._proc / "fd").iterdir()))

    def _memory(self, name: str) -> int:
        for line in (self._proc / "status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
        raise AssertionError(name)

    def _forget_peak(self) -> None:
        (self._proc / "clear_refs").write_text("5")


def tenant_of(keys: ClientKeys) -> RawKeys:
    """The same keys, 32 bytes each."""
    return RawKeys(*(z85.decode(key) for key in (keys.server, keys.own.public, keys.own.secret)))


def _public(path: Path) -> bytes:
    import zmq.auth

    return z85.decode(zmq.auth.load_certificate(path)[0])


def _secret(path: Path) -> tuple[bytes, bytes]:
    import zmq.auth

    public, secret = zmq.auth.load_certificate(path)
    assert secret is not None
    return z85.decode(public), z85.decode(secret)


def _until(holds: Callable[[], bool], says: Callable[[], str], seconds: float = BACK_SECONDS) -> None:
    give_up_at = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < give_up_at, says()
        time.sleep(LOOK_SECONDS)
