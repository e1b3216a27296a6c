"""A daemon that is still loading: it says so, and its clients wait for it."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from click.testing import CliRunner

from support.echo import EchoServer
from support.peer import Peer
from support.square import SquareClient, SquareServer, some
from test_access import Keys
from zsl.cli.zsl import zsl as command
from zsl.errors import EXIT_STARTUP_FAILED, LoadingError, Retry, StartupError
from zsl.transport.curve_keys import refuses_unknown_keys
from zsl.trunk.daemon.loading_port import Loading
from zsl.wire.messages import Error, Hello, Ping, StatusRequest

WAIT_SECONDS = 30


class CountedLoading(Loading):
    """A loading daemon that counts what it was asked."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1", 0, None)
        self.asked = threading.Semaphore(0)

    def _receive(self, *arguments: Any) -> None:
        super()._receive(*arguments)
        self.asked.release()


def test_whoever_asks_is_told_to_come_again_and_a_session_of_before_to_open_another() -> None:
    hello = Hello(request=3, software="test", dtype="f32", model=None, cut=None, resume=None)
    with Loading("127.0.0.1", 0, None) as loading, Peer(loading.endpoint) as peer:
        for request in (hello, StatusRequest(request=3)):
            answer = peer.ask(request)
            assert isinstance(answer, Error)
            assert (answer.request, answer.code, answer.retry) == (3, "LOADING", Retry.SAME)
            assert answer.retry_after_ms > 0
        answer = peer.ask(Ping(request=4, session=b"s" * 16, epoch=b"e" * 16))
        assert isinstance(answer, Error) and (answer.request, answer.code) == (4, "STALE_EPOCH")


def test_a_client_waits_for_a_daemon_that_loads_for_longer_than_for_one_that_is_silent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with CountedLoading() as loading, ThreadPoolExecutor(1) as pool:
        client = SquareClient(loading.endpoint, connect_timeout_seconds=0.1, request_timeout_seconds=20)
        connected = pool.submit(client.connect)
        # The second HELLO comes half a second after the first.
        assert all(loading.asked.acquire(timeout=WAIT_SECONDS) for _ in range(2))
        loading.close()
        with SquareServer(port=loading.port):
            connected.result(WAIT_SECONDS)
            assert client.is_right(some(1), some(2))
            client.connection.close()
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [text for text in said if "still loading" in text] == said[:1]


def test_a_daemon_that_loads_for_too_long_is_what_the_error_says() -> None:
    with Loading("127.0.0.1", 0, None) as loading:
        client = SquareClient(loading.endpoint, connect_timeout_seconds=0.1, request_timeout_seconds=0.2)
        with pytest.raises(LoadingError, match=loading.endpoint) as raised:
            client.connect()
        client.connection.close()
    assert raised.value.exit_code == EXIT_STARTUP_FAILED


def test_of_several_daemons_one_that_serves_is_taken_before_one_that_loads() -> None:
    with Loading("127.0.0.1", 0, None) as loading, SquareServer() as server:
        with SquareClient(f"{loading.endpoint},{server.endpoint}", request_timeout_seconds=20) as client:
            assert client.is_right(some(1), some(2))


def test_info_says_that_it_loads() -> None:
    with Loading("127.0.0.1", 0, None) as loading:
        alone = CliRunner().invoke(command, ["info", loading.endpoint])
        with EchoServer() as server:
            both = CliRunner().invoke(command, ["info", f"{server.endpoint},{loading.endpoint}"])
            listed = CliRunner().invoke(command, ["info", f"{server.endpoint},{loading.endpoint}", "--json"])
    assert alone.exit_code == EXIT_STARTUP_FAILED
    assert alone.output.count("\n") == 1 and "loading" in alone.output and "hangs" not in alone.output
    assert both.exit_code == 0 and "state          loading: " in both.output
    assert [entry.get("loading") for entry in json.loads(listed.output)] == [None, True]


def test_only_who_is_on_the_list_is_told(tmp_path: Any) -> None:
    keys = Keys(tmp_path)
    keys.write_list("alice")
    with Loading("127.0.0.1", 0, keys.access) as loading:
        assert asyncio.run(refuses_unknown_keys(loading.endpoint, keys.pair("server").public))
        with Peer(loading.endpoint, keys.of("alice")) as alice:
            answer = alice.ask(StatusRequest(request=1))
    assert isinstance(answer, Error) and answer.code == "LOADING"


def test_a_port_in_use_is_told_with_the_port() -> None:
    with Loading("127.0.0.1", 0, None) as loading:
        with pytest.raises(StartupError, match=str(loading.port)):
            Loading("127.0.0.1", loading.port, None).__enter__()
