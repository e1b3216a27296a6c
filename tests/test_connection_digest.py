"""Both ends know whether a connection leaves the machine or is relayed, and leave checksums out accordingly."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.faulty_link import FaultyLink
from support.square import SquareClient, SquareServer, some
from zsl.transport import connection_digest
from zsl.transport.connection_digest import digest_at_client, digest_at_server
from zsl.transport.curve_keys import read_key_pair, write_key_pair
from zsl.trunk.access.options import read_access
from zsl.wire.frames import Message, decode

Connect = Callable[[str, str], tuple[socket.socket, socket.socket]]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Connect to an address of a listening socket; return the client's end and the server's."""
    with ExitStack() as stack:

        def connected(listens: str, to: str) -> tuple[socket.socket, socket.socket]:
            family = socket.AF_INET6 if ":" in listens else socket.AF_INET
            listening = stack.enter_context(
                socket.create_server((listens, 0), family=family, dualstack_ipv6=":" in listens)
            )
            client = stack.enter_context(socket.create_connection((to, listening.getsockname()[1])))
            return client, stack.enter_context(listening.accept()[0])

        yield connected


@pytest.mark.parametrize(("listens", "to"), [("127.0.0.1", "127.0.0.1"), ("::", "127.0.0.1"), ("::1", "::1")])
def test_both_ends_of_a_connection_within_the_machine_have_one_digest(connect: Connect, listens: str, to: str) -> None:
    (first, at_first), (second, at_second) = connect(listens, to), connect(listens, to)
    digests = [digest_at_client(one.fileno()) for one in (first, second)]
    assert digests == [digest_at_server(one) for one in (at_first, at_second)]
    assert None not in digests and digests[0] != digests[1]


def test_an_end_without_digest_is_at_no_other_end(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    client, accepted = connect("127.0.0.1", "127.0.0.1")
    descriptor = client.fileno()
    client.close()
    assert digest_at_client(descriptor) is None
    monkeypatch.setattr(connection_digest, "_boot_id", lambda: "")  # not Linux
    assert digest_at_server(accepted) is None
    accepted.close()
    monkeypatch.undo()
    assert digest_at_server(accepted) is None
    assert connection_digest._digest(("10.0.0.1", 9), ("10.0.0.2", 5555)) is None


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, bool]]:
    """Ends that received tensors, and whether with a checksum of them."""
    seen: set[tuple[str, bool]] = set()

    def noting(end: str) -> Callable[..., Message]:
        def noted(*arguments: object) -> Message:
            message = decode(*arguments)  # type: ignore[arg-type]
            if message.buffers:
                seen.add((end, message.checked))
            return message

        return noted

    monkeypatch.setattr("zsl.trunk.requests.handlers.decode", noting("daemon"))
    monkeypatch.setattr("zsl.link.open_session.decode", noting("client"))
    return seen


def test_tensors_have_a_checksum_where_something_passes_them_on(checked: set[tuple[str, bool]]) -> None:
    with SquareServer() as server, FaultyLink(server.port) as between:
        with SquareClient(server.endpoint) as client:
            assert client.is_right(some(0), some(1))
        assert checked == {("daemon", False), ("client", False)}
        checked.clear()
        with SquareClient(between.endpoint) as client:
            assert client.is_right(some(0), some(1))
        assert checked == {("daemon", True), ("client", True)}


def test_encrypted_tensors_have_none_because_the_cipher_notices_damage(
    checked: set[tuple[str, bool]], tmp_path: Path
) -> None:
    for name in ("server", "alice"):
        write_key_pair(tmp_path, name)
    key = read_key_pair(tmp_path / "alice.key_secret").public.decode()
    (tmp_path / "tenants.toml").write_text(f'[tenants.alice]\npublic_key = "{key}"\n')
    keys = {"server_key": str(tmp_path / "server.key"), "client_key": tmp_path / "alice.key_secret"}
    with (
        SquareServer(access=read_access(tmp_path, tmp_path / "tenants.toml")) as server,
        FaultyLink(server.port) as between,
        SquareClient(between.endpoint, **keys) as client,
    ):
        assert client.is_right(some(0), some(1))
        between.flip_bits("up", after_bytes=50)
        assert client.is_right(some(2), some(3)) and between.happened["flip_bits"] == 1
    assert checked == {("daemon", False), ("client", False)}
