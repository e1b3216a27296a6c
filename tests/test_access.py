"""Nobody gets in who is not on the list, and nobody reaches another tenant's state: on real, encrypted sockets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.echo import EchoServer
from support.peer import Peer, forward
from support.square import SquareClient, SquareServer, some
from test_server import backward, code_of
from zsl.errors import ConfigError, ForbiddenError, TrunkAuthError
from zsl.transport.curve_keys import ClientKeys, KeyPair, read_key_pair, write_key_pair
from zsl.trunk.access.options import Access, read_access
from zsl.trunk.settings import ServerSettings
from zsl.wire.messages import Error, Hello, Ping, Result, Welcome

NAMES = ("server", "alice", "bob", "mallory")


class Keys:
    """Key pairs in files, and a list of tenants that a test can change."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in NAMES:
            write_key_pair(directory, name)
        self.list = directory / "tenants.toml"

    def pair(self, name: str) -> KeyPair:
        return read_key_pair(self.secret(name))

    @property
    def access(self) -> Access | None:
        """The server's access to this list, as it is now."""
        return read_access(self.directory, self.list)

    def secret(self, name: str) -> Path:
        return self.directory / f"{name}.key_secret"

    def public(self, name: str) -> str:
        return str(self.directory / f"{name}.key")

    def of(self, name: str) -> ClientKeys:
        return ClientKeys(self.pair("server").public, self.pair(name))

    def write_list(self, *names: str, more: str = "") -> None:
        tables = [f'[tenants.{name}]\npublic_key = "{self.pair(name).public.decode()}"\n{more}' for name in names]
        self.list.write_text("\n".join(tables))


@pytest.fixture(scope="module")
def all_keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def keys(all_keys: Keys) -> Keys:
    all_keys.write_list("alice", "bob")
    return all_keys


@pytest.fixture
def server(keys: Keys) -> Iterator[SquareServer]:
    with SquareServer(access=keys.access) as running:
        yield running


def client(
    server: EchoServer, keys: Keys, name: str, *, server_key: str | None = None, seconds: float = 5
) -> SquareClient:
    return SquareClient(
        server.endpoint,
        server_key=server_key or keys.public("server"),
        client_key=keys.secret(name),
        connect_timeout_seconds=seconds,
        request_timeout_seconds=10,
    )


def test_who_is_on_the_list_trains_over_an_encrypted_connection(server: SquareServer, keys: Keys) -> None:
    with client(server, keys, "alice") as alice, client(server, keys, "bob") as bob:
        assert all(one.is_right(some(seed), some(seed + 1)) for seed in range(3) for one in (alice, bob))


def test_an_unknown_key_is_refused_at_once_with_what_to_do(server: SquareServer, keys: Keys) -> None:
    with pytest.raises(TrunkAuthError, match=r"tenants\.toml"):
        client(server, keys, "mallory", seconds=60).connect()
    assert server.sessions == 0


def test_another_server_key_than_expected_is_named(server: SquareServer, keys: Keys) -> None:
    with pytest.raises(TrunkAuthError, match="server_key"):
        client(server, keys, "alice", server_key=keys.public("mallory"), seconds=60).connect()


def test_a_client_without_keys_at_a_daemon_with_keys_is_told_so(server: SquareServer) -> None:
    with pytest.raises(TrunkAuthError, match="encrypts"):
        SquareClient(server.endpoint, connect_timeout_seconds=60).connect()
    with Peer(server.endpoint) as peer:
        peer.wait_ms = 500
        with pytest.raises(TimeoutError):
            peer.hello()


def test_a_client_with_keys_at_a_daemon_without_is_told_so(keys: Keys) -> None:
    with SquareServer() as plain, pytest.raises(TrunkAuthError, match="encrypts"):
        client(plain, keys, "alice", seconds=60).connect()


def test_one_key_without_the_other_is_refused_before_anything_is_sent(keys: Keys) -> None:
    with pytest.raises(ConfigError, match="client_key"):
        SquareClient("127.0.0.1:1", server_key=keys.public("server"))
    with pytest.raises(ConfigError, match="server_key"):
        SquareClient("127.0.0.1:1", client_key=keys.secret("alice"))


def test_nobody_reaches_another_tenants_session_though_its_id_is_known(server: SquareServer, keys: Keys) -> None:
    with Peer(server.endpoint, keys.of("alice")) as alice, Peer(server.endpoint, keys.of("bob")) as bob:
        welcome = alice.hello()
        assert isinstance(alice.ask(*forward(welcome, 1, keep=True)), Result)
        for message in (
            forward(welcome, 2),
            backward(welcome, 3, step=1),
            (Ping(session=welcome.session, epoch=welcome.epoch, request=4), []),
        ):
            assert code_of(bob.ask(*message)) == "UNKNOWN_SESSION"
        assert bob.hello(resume=welcome.session).session != welcome.session
        assert isinstance(alice.ask(*backward(welcome, 5, step=1)), Result), "alice's step is still there"


def test_a_key_that_is_taken_off_the_list_is_refused_on_its_next_message_and_cut_off(
    server: SquareServer, keys: Keys
) -> None:
    with Peer(server.endpoint, keys.of("alice")) as alice, Peer(server.endpoint, keys.of("bob")) as bob:
        hers, his = alice.hello(), bob.hello()
        assert isinstance(alice.ask(*forward(hers, 1, keep=True)), Result)
        keys.write_list("bob")
        server.reload_tenants()
        assert (server.sessions, server.held_bytes) == (1, 0)
        answer = alice.ask(*forward(hers, 2))
        assert code_of(answer) == "FORBIDDEN"
        alice.send(*forward(hers, 3))
        give_up = 2000
        while server.connections > 1 and give_up:
            assert isinstance(bob.ask(*forward(his, give_up)), Result), "bob does not notice"
            give_up -= 1
        assert server.connections == 1
        keys.write_list("bob", "alice")
        server.reload_tenants()
        with Peer(server.endpoint, keys.of("alice")) as again:
            assert isinstance(again.hello(), Welcome)


def test_a_client_whose_key_is_taken_off_ends_with_an_error_that_says_so(server: SquareServer, keys: Keys) -> None:
    with client(server, keys, "alice") as alice:
        assert alice.is_right(some(1), some(2))
        keys.write_list("bob")
        server.reload_tenants()
        with pytest.raises((ForbiddenError, TrunkAuthError), match="tenants"):
            alice.forward(some(1))


@pytest.mark.parametrize("broken", ["", "[tenants.alice]\npublic_k", "[tenants.alice]\npublic_key = 'short'\n"])
def test_a_list_that_is_half_written_changes_nothing(server: SquareServer, keys: Keys, broken: str) -> None:
    keys.list.write_text(broken)
    with pytest.raises(ConfigError, match=r"tenants\.toml"):
        server.reload_tenants()
    with client(server, keys, "alice") as alice:
        assert alice.is_right(some(1), some(2))


def test_a_tenant_has_no_more_sessions_than_its_quota(keys: Keys) -> None:
    keys.write_list("alice", "bob", more="max_sessions = 1\n")
    with SquareServer(access=keys.access) as server:
        with client(server, keys, "alice") as first, Peer(server.endpoint, keys.of("alice")) as second:
            hello = Hello(request=1, software="t", dtype="f32", model=None, cut=None, resume=None)
            answer = second.ask(hello)
            assert isinstance(answer, Error) and answer.code == "QUOTA" and "tenant alice has 1" in answer.text
            with client(server, keys, "bob") as bob:
                assert bob.is_right(some(1), some(2)) and first.is_right(some(1), some(2))


def test_a_tenant_whose_client_died_can_start_it_again_before_the_lease_has_ended(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zsl.trunk.sessions.sessions.QUIET_SECONDS", 0.5)
    keys.write_list("alice", more="max_sessions = 1\n")
    settings = ServerSettings(lease_seconds=600)
    with SquareServer(access=keys.access, settings=settings) as server:
        with Peer(server.endpoint, keys.of("alice")) as died:
            died.hello()
        with client(server, keys, "alice", seconds=20) as again:
            assert again.is_right(some(1), some(2))
        with Peer(server.endpoint, keys.of("alice")) as observer:
            assert observer.status().sessions == 0
