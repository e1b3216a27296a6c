"""The stage of a hostile form: where the daemon listens, and connections to it that are as far along as a form needs.

A `Form` is named for what it sends, and does it on a `Scene`. What it leaves open stays open until the scene ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import msgpack

from zsl.wire.frames import KIND, MAGIC, MAJOR, decode, encode, seal
from zsl.wire.messages import TO_CLIENT, Bye, Header, Hello, MessageType, Welcome

from .raw_zmtp import DEALER, Curve, Metadata, RawKeys, RawPeer

HOST = "127.0.0.1"
FLOOD_SECONDS = 3.0  # a daemon that takes no more of it has defended itself


@dataclass(frozen=True)
class Place:
    """A daemon to be attacked. `tenant`: keys of one that gets in, on an encrypted daemon."""

    port: int
    hidden: int
    tenant: RawKeys | None = None


@dataclass(frozen=True)
class Victim:
    """The session of an honest client, whose ids the attacker has got hold of."""

    session: bytes
    epoch: bytes
    request: int


class Scene:
    """Connections of one attacker. A peer is `connected`, then `greeted`, then `joined`; a session is `opened`."""

    def __init__(self, place: Place, victim: Victim, random: Random) -> None:
        self.place = place
        self.victim = victim
        self.random = random
        self.peers: list[RawPeer] = []
        self.sessions: list[Welcome] = []

    @property
    def keyed(self) -> bool:
        return self.place.tenant is not None

    @property
    def tenant(self) -> RawKeys:
        assert self.place.tenant is not None, "the daemon has no keys"
        return self.place.tenant

    @property
    def mechanism(self) -> bytes:
        return b"CURVE" if self.keyed else b"NULL"

    def connected(self, **how: Any) -> RawPeer:
        peer = RawPeer(HOST, self.place.port, **how)
        self.peers.append(peer)
        return peer

    def greeted(self) -> RawPeer:
        peer = self.connected()
        peer.greet(self.mechanism)
        return peer

    def welcomed(self, keys: RawKeys | None = None) -> tuple[RawPeer, Curve]:
        """In the middle of CURVE's handshake."""
        peer = self.connected()
        return peer, peer.welcomed(keys or self.tenant)

    def joined(self, pairs: Metadata = DEALER, **how: Any) -> RawPeer:
        """Through the handshake, as one who may."""
        peer = self.connected(**how)
        peer.handshake(pairs, self.place.tenant)
        return peer

    def opened(self, **how: Any) -> tuple[RawPeer, Welcome]:
        """With a session."""
        peer = self.joined(**how)
        tell(peer, _hello(0))
        welcome = heard(peer)
        assert isinstance(welcome, Welcome), welcome
        self.sessions.append(welcome)
        return peer, welcome

    def flood(self, peer: RawPeer, piece: bytes, total_bytes: int) -> None:
        """The same bytes again and again, until the daemon does not take them."""
        for _ in range(total_bytes // len(piece)):
            if not peer.send(piece, wait_seconds=FLOOD_SECONDS):
                return

    def leave(self) -> None:
        """Close every connection, and end the sessions."""
        for peer in self.peers:
            peer.close()
        if self.sessions:
            with RawPeer(HOST, self.place.port) as last:
                last.handshake(keys=self.place.tenant)
                for number, welcome in enumerate(self.sessions):
                    # Resumed first: a session is its connection's, and BYE from another one is refused.
                    tell(last, _hello(number, welcome.session))
                    while not isinstance(resumed := heard(last), Welcome):
                        pass  # late answers
                    tell(last, Bye(session=resumed.session, epoch=resumed.epoch))


Act = Callable[[Scene], object]
Acts = dict[str, Act]


@dataclass(frozen=True)
class Form:
    """An act of a hostile peer, at a daemon with or without keys."""

    name: str
    keyed: bool
    act: Act


def _hello(request: int, resume: bytes | None = None) -> Hello:
    return Hello(request=request, software="test", dtype="f32", model=None, cut=None, resume=resume)


# --- zsl's messages --------------------------------------------------------------------------------------------------


def tell(peer: RawPeer, header: Header, buffers: Sequence[bytes] = ()) -> None:
    peer.send_message([bytes(frame) for frame in encode(header, buffers)])


def heard(peer: RawPeer) -> Header:
    """The next message. Raises `Ended`."""
    return decode(peer.receive_message(), TO_CLIENT).header


def sealed(
    kind: int, header: bytes, buffers: Sequence[bytes] = (), *, major: int = MAJOR, flags: int = 0
) -> list[bytes]:
    """A message with a right checksum, whatever is in it."""
    return [bytes(frame) for frame in seal([KIND.pack(MAGIC, major, kind, flags), header, *buffers])]


def packed(kind: int, fields: object, buffers: Sequence[bytes] = ()) -> list[bytes]:
    """The same, with a header of msgpack."""
    return sealed(kind, msgpack.packb(fields), buffers)


def hello(**changes: object) -> list[bytes]:
    fields = {"request": 1, "software": "test", "dtype": "f32", "model": None, "cut": None, "resume": None}
    return packed(MessageType.HELLO, {**fields, **changes})


def status(request: object = 1) -> list[bytes]:
    return packed(MessageType.STATUS, {"request": request})


def tensor(shape: Sequence[int], role: str = "activations", dtype: str = "f32", width: int = 4) -> dict[str, object]:
    """A descriptor whose size agrees with its shape."""
    nbytes = width
    for size in shape:
        nbytes *= size
    return {"role": role, "dtype": dtype, "shape": list(shape), "nbytes": min(nbytes, 2**64 - 1)}


def forward(
    welcome: Welcome | Victim,
    tensors: Sequence[dict[str, Any]],
    buffers: Sequence[bytes] | None = None,
    **changes: object,
) -> list[bytes]:
    """A FORWARD. Without `buffers`: zeros of the sizes that the descriptors say."""
    fields = {"keep": False, "reveal": [], "cache": None, **changes}
    return _work(MessageType.FORWARD, welcome, tensors, buffers, fields)


def backward(
    welcome: Welcome | Victim,
    step: int,
    tensors: Sequence[dict[str, Any]],
    buffers: Sequence[bytes] | None = None,
    **changes: object,
) -> list[bytes]:
    """A BACKWARD, as `forward`."""
    return _work(
        MessageType.BACKWARD,
        welcome,
        tensors,
        buffers,
        {"step": step, "adapter_sum": None, "adapter_gradients": False, **changes},
    )


def _work(
    kind: int,
    welcome: Welcome | Victim,
    tensors: Sequence[dict[str, Any]],
    buffers: Sequence[bytes] | None,
    changes: dict[str, object],
) -> list[bytes]:
    fields: dict[str, object] = {
        "session": welcome.session,
        "epoch": welcome.epoch,
        "request": 1,
        "attempt": 0,
        "budget_ms": 20_000,
        "adapter": None,
        "tensors": list(tensors),
    }
    if buffers is None:
        buffers = [bytes(described["nbytes"]) for described in tensors]
    return packed(kind, {**fields, **changes}, buffers)
