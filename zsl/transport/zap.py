"""Who may connect: the answers to ZAP, ZeroMQ's question for each new encrypted connection (its RFC 27).

pyzmq's own authenticator ends with the first exception in its callback, and locks everyone out from then on. This one
denies whoever it happened with, and goes on. Knows no list of tenants: it asks `allowed`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import zmq
from zmq.utils import z85

from zsl.transport.curve import BINARY_KEY_BYTES, ZAP_DOMAIN
from zsl.transport.reading import Reader

logger = logging.getLogger(__name__)

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
ZAP_VERSION = b"1.0"
REQUEST_FRAMES = 8  # with the empty one in front, and the one credential of CURVE
SHOWN_KEY_CHARACTERS = 8

_Answer = tuple[bytes, bytes, bytes]  # status code, status text, user id


class Authenticator:
    """Answers ZAP in a context: `allowed(key)` says who gets in, by the public key in z85.

    That key is then the `User-Id` of every frame that comes in by the connection.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed: Callable[[str], bool]) -> None:
        self._allowed = allowed
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._reader = Reader(self._socket, self._take)

    def start(self) -> None:
        """Begin, on the running loop."""
        self._socket.bind(ZAP_ENDPOINT)
        self._reader.start()

    def close(self) -> None:
        """From now on nobody gets in."""
        self._reader.stop()
        self._socket.close()

    def _take(self) -> None:
        asker, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
        request = frames[2] if len(frames) > 2 else b""
        try:
            code, text, user = self._answer(frames)
        except Exception:
            logger.exception("nobody could be asked whether a key may connect; it was refused")
            code, text, user = b"500", b"internal error", b""
        self._socket.send_multipart([asker, b"", ZAP_VERSION, request, code, text, user, b""], zmq.NOBLOCK)

    def _answer(self, frames: Sequence[bytes]) -> _Answer:
        if len(frames) != REQUEST_FRAMES or frames[0] or frames[1] != ZAP_VERSION:
            logger.warning("refused an authentication request that is not of ZAP's form, of %d frames", len(frames))
            return b"500", b"malformed", b""
        domain, address, _, mechanism, credential = frames[3:]
        if domain != ZAP_DOMAIN or mechanism != b"CURVE" or len(credential) != BINARY_KEY_BYTES:
            logger.warning("refused %s: it has no key", address.decode(errors="replace"))
            return b"400", b"no key", b""
        key = z85.encode(credential).decode()
        if not self._allowed(key):
            shown = key[:SHOWN_KEY_CHARACTERS]
            logger.info("refused %s: its key %s… is on no list", address.decode(errors="replace"), shown)
            return b"400", b"unknown key", b""
        return b"200", b"OK", key.encode()
