"""CURVE keys, key files, a client's socket options, and a self-test of the daemon's access control.

The files are pyzmq's certificates: `NAME.key` has the public key, for everyone; `NAME.key_secret` both, for its owner.
The server's key authenticates the server. The server's end of a handshake is in `zsl.transport.mechanisms`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import struct
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import zmq
import zmq.auth
from zmq.utils import z85

from zsl.errors import ConfigError, StartupError
from zsl.files.small_files import read_small_file
from zsl.transport.monitor import Monitor

logger = logging.getLogger(__name__)

BINARY_KEY_BYTES = 32
KEY_CHARACTERS = 40  # in z85, the text form of keys
PRIVATE_MODE = 0o600
NOT_THE_OWNER = 0o077
# Also valid as a bare key of TOML, so that it can name a tenant unquoted.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
SELF_TEST_MS = 5_000
_LOOPBACK_FOR = {"0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "[::]": "[::1]"}


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Public and secret key in z85, 40 characters each."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """Keys of a client: the server's public key, and its own pair."""

    server: bytes
    own: KeyPair


def encrypt_client(socket: zmq.Socket[bytes], keys: ClientKeys) -> None:
    """Set CURVE options, so that the socket accepts only the server with this key. Call before `connect`."""
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.own.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.own.secret)


def is_public_key(text: str) -> bool:
    """Return whether a text is a key in z85."""
    return _is_key(text.encode(errors="replace"))


def write_key_pair(directory: Path, name: str) -> tuple[Path, Path]:
    """Make a new pair in `NAME.key` and `NAME.key_secret`. Only the owner can ever read the second.

    Raises `ConfigError` if one of them exists already, `StartupError` if they cannot be written.
    """
    if NAME.fullmatch(name) is None:
        raise ConfigError(f"{name!r} cannot name a key pair: take up to 64 letters, digits, - and _")
    files = directory / f"{name}.key", directory / f"{name}.key_secret"
    for file in files:
        if os.path.lexists(file):
            raise ConfigError(f"{file} is there already; take another name or --out, or move the pair away first")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".keygen-", dir=directory) as private:  # has mode 0700
            written = [Path(path) for path in zmq.auth.create_certificates(private, name)]
            written[1].chmod(PRIVATE_MODE)
            for made, file in zip(written, files, strict=True):
                made.rename(file)
    except OSError as error:
        raise StartupError(f"{directory} cannot be written: {error.strerror}; name another --out") from error
    return files


def read_key_pair(path: Path) -> KeyPair:
    """Read the pair in a `.key_secret` file. Raises `ConfigError`."""
    public, secret = _load(path)
    if secret is None:
        raise ConfigError(f"{path} holds a public key only; the file of the whole pair is needed, NAME.key_secret")
    if path.stat().st_mode & NOT_THE_OWNER:
        raise ConfigError(f"{path} can be read by others than its owner: chmod 600 {shlex.quote(str(path))}")
    if not (_is_key(public) and _is_key(secret)) or zmq.curve_public(secret) != public:
        raise ConfigError(f"{path} is damaged: its keys are not a pair; take a copy that is whole, or make a new pair")
    return KeyPair(public, secret)


def read_public_key(text_or_path: str) -> bytes:
    """Return a public key, given as text or as a `.key` file. Raises `ConfigError`."""
    if not os.path.isfile(text_or_path):
        if is_public_key(text_or_path):
            return text_or_path.encode()
        raise ConfigError(
            f"{text_or_path!r} is neither a file nor a public key, which has {KEY_CHARACTERS} characters; "
            "give a .key file, or what stands in it as public-key"
        )
    path = Path(text_or_path)
    public, secret = _load(path)
    if secret is not None:
        raise ConfigError(f"{path} holds a secret key, which nobody but its owner should have: give the .key file")
    if not _is_key(public):
        raise ConfigError(f"{path} is damaged: its key is invalid; take a copy that is whole")
    return public


async def refuses_unknown_keys(endpoint: str, server_public: bytes) -> bool:
    """Connect with an unknown key. True if rejected because unknown; False if accepted or unanswered."""
    scheme, _, address = endpoint.partition("://")
    host, _, port = address.rpartition(":")
    logger.info("self-test: an unknown key has to be refused")
    reachable = f"{scheme}://{_LOOPBACK_FOR.get(host, host)}:{port}"
    return await asyncio.to_thread(_is_refused, reachable, server_public)


def _is_refused(endpoint: str, server_public: bytes) -> bool:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.setsockopt(zmq.IPV6, int("[" in endpoint))
    encrypt_client(dealer, ClientKeys(server_public, KeyPair(*zmq.curve_keypair())))
    monitor = Monitor(context, dealer, zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
    try:
        dealer.connect(endpoint)
        monitor.socket.poll(SELF_TEST_MS)
        event, _ = monitor.next_event() or (None, None)
        return event == zmq.EVENT_HANDSHAKE_FAILED_AUTH
    finally:
        monitor.close()
        dealer.close()
        context.term()


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        read_small_file(path)
        return zmq.auth.load_certificate(path)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; `zsl keygen NAME` makes a pair of key files") from error
    except (ValueError, IndexError) as error:
        raise ConfigError(f"{path} holds no key; give a file that `zsl keygen NAME` made") from error


def _is_key(text: bytes) -> bool:
    try:
        return len(text) == KEY_CHARACTERS and len(z85.decode(text)) == BINARY_KEY_BYTES
    except (KeyError, struct.error):  # an invalid character, or a group that is too large
        return False
