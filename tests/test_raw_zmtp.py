"""The raw client is right where it means to be: libzmq takes its handshake and its messages, open and encrypted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
import zmq
from zmq.utils import z85

from support.raw_zmtp import Ended, RawKeys, RawPeer

WAIT_MS = 10_000
FRAMES = [b"", b"x", b"y" * 255, b"z" * 256, b"0" * 100_000]


@pytest.fixture
def router() -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context, closing(context.socket(zmq.ROUTER)) as opened:
        opened.linger = 0
        opened.rcvtimeo = opened.sndtimeo = WAIT_MS
        yield opened


def encrypted(router: zmq.Socket[bytes]) -> RawKeys:
    """Keys for a server that takes every client."""
    public, secret = zmq.curve_keypair()
    router.curve_server, router.curve_secretkey = True, secret
    own = [z85.decode(key) for key in zmq.curve_keypair()]
    return RawKeys(z85.decode(public), *own)


@pytest.mark.parametrize("with_keys", [False, True])
def test_messages_cross_both_ways(router: zmq.Socket[bytes], with_keys: bool) -> None:
    keys = encrypted(router) if with_keys else None
    port = router.bind_to_random_port("tcp://127.0.0.1")
    with RawPeer("127.0.0.1", port) as peer:
        peer.handshake(keys=keys)
        assert peer.send_message(FRAMES)
        identity, *received = router.recv_multipart()
        assert received == FRAMES
        router.send_multipart([identity, *FRAMES])
        assert peer.receive_message() == FRAMES
        assert peer.send_command(b"PING", b"\0\0context")
        assert peer.receive_frame() == (4, b"\4PONGcontext")


@pytest.mark.parametrize("with_keys", [False, True])
def test_an_identity_is_claimed(router: zmq.Socket[bytes], with_keys: bool) -> None:
    keys = encrypted(router) if with_keys else None
    port = router.bind_to_random_port("tcp://127.0.0.1")
    with RawPeer("127.0.0.1", port) as peer:
        peer.handshake([(b"Socket-Type", b"DEALER"), (b"Identity", b"somebody")], keys)
        peer.send_message([b"hello"])
        assert router.recv_multipart() == [b"somebody", b"hello"]


def test_who_has_another_servers_key_hears_nothing(router: zmq.Socket[bytes]) -> None:
    keys = encrypted(router)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    with RawPeer("127.0.0.1", port) as peer, pytest.raises(Ended):
        peer.handshake(keys=RawKeys.of_nobody(keys.public))
