"""A balancer of TCP connections before daemons that serve the same trunk, and what is logged of reconnects."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from support.balancer import Balancer
from support.square import SquareClient, SquareServer, some
from test_faults_without_torch import steps_are_right, wait_until
from zsl.link.lost_connections import (
    ALL_ARE_SAID,
    BETWEEN_LINES_SECONDS,
    FIRST_WAIT_SECONDS,
    WINDOW_SECONDS,
    LostConnections,
)
from zsl.link.open_session import Open
from zsl.trunk.requests.handlers import Handlers
from zsl.trunk.settings import ServerSettings
from zsl.wire.messages import Ping, Welcome

QUICK = ServerSettings(ping_seconds=0.05)
CLIENTS = 3


@pytest.fixture(scope="module")
def servers() -> Iterator[list[SquareServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(SquareServer(settings=QUICK)) for _ in range(2)]


def reconnects(client: SquareClient) -> int:
    link = client.connection.link
    assert link is not None
    return link.reconnects


def session_of(client: SquareClient) -> Welcome:
    """The WELCOME of the session that is open."""
    link = client.connection.link
    assert link is not None and isinstance(link.state, Open), link
    return link.state.welcome


def pings_alone(client: SquareClient) -> bool:
    """Return whether the session has one connection, which has carried a pong."""
    link = client.connection.link
    return link is not None and isinstance(link.state, Open) and link.state.pings_alone


@pytest.mark.parametrize("seed", [None, 1, 2], ids=["in turn", "at random", "at random, otherwise"])
def test_clients_behind_a_balancer_train_without_reconnects_and_are_told_what_stands_between(
    servers: list[SquareServer], seed: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    with Balancer([server.port for server in servers], seed=seed) as balancer, ExitStack() as stack:
        clients = [stack.enter_context(SquareClient(balancer.endpoint)) for _ in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            wait_until(lambda: balancer.accepted >= 2 * CLIENTS, "they did not connect")
            for _ in range(3):  # pings come meanwhile
                assert all(pool.map(lambda client: steps_are_right(client, 20), clients))
        if seed is None:
            wait_until(lambda: any(map(pings_alone, clients)), "nobody noticed the other daemon")
        assert [reconnects(client) for client in clients] == [0] * CLIENTS
        assert [client.connection.traffic.replays for client in clients] == [0] * CLIENTS
        alone = sum(map(pings_alone, clients))
        wait_until(lambda: balancer.accepted <= 2 * CLIENTS, "more connections than two a client")
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == alone and all("balances" in record.getMessage() for record in said)


def test_a_lost_connection_that_comes_back_at_the_other_daemon_goes_on_there_complete(
    servers: list[SquareServer], caplog: pytest.LogCaptureFixture
) -> None:
    with Balancer([server.port for server in servers]) as balancer, SquareClient(balancer.endpoint) as client:
        wait_until(lambda: pings_alone(client), "it did not notice the other daemon")
        first = session_of(client).epoch
        x, gradients = some(1), some(2)
        _, step = client.forward(x)
        balancer.cut()
        balancer.accepted = 1  # the next one leads to the other daemon
        assert (client.backward(step, x, gradients) == 2 * x * gradients).all()
        assert session_of(client).epoch != first
        assert steps_are_right(client, 3)
        assert reconnects(client) == 1 and pings_alone(client)
    assert sum("balances" in text for text in caplog.messages) == 1


def test_a_session_with_one_connection_keeps_its_lease_and_notices_that_its_session_is_gone() -> None:
    settings = ServerSettings(ping_seconds=0.05, lease_seconds=1.0)
    with SquareServer(settings=settings) as one, SquareServer(settings=settings) as other:
        with Balancer([one.port, other.port]) as balancer, SquareClient(balancer.endpoint) as client:
            wait_until(lambda: pings_alone(client), "it did not notice the other daemon")
            welcome = session_of(client)
            closed = one if one.server.epoch == welcome.epoch else other
            closed.close_session(welcome.session)
            wait_until(lambda: reconnects(client) == 1 and client.is_open, "it did not notice")
            assert steps_are_right(client, 1)


def test_a_session_whose_own_connection_is_silent_too_is_lost_with_the_count_and_the_cause(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SquareServer(settings=QUICK) as first, SquareServer(settings=QUICK) as second:
        answer_ping = Handlers._ping

        def ping(handlers: Handlers, sender: Any, header: Ping, now: float) -> None:
            """Answer pings of the second daemon only."""
            if handlers._answers.epoch == second.server.epoch:
                answer_ping(handlers, sender, header, now)

        monkeypatch.setattr(Handlers, "_ping", ping)
        with Balancer([first.port, second.port]) as balancer, SquareClient(balancer.endpoint) as client:
            wait_until(lambda: "reconnected 2 times" in caplog.text, "it is not said")
            assert "carries nothing" in caplog.text and "balances" not in caplog.text
            monkeypatch.undo()
            wait_until(lambda: pings_alone(client), "it did not notice the other daemon")
            assert steps_are_right(client, 1)


def test_reconnects_are_logged_with_their_number_and_causes_and_not_without_end() -> None:
    counted, now, lines = LostConnections(), 100.0, []
    assert counted.lost("the connection was lost", now) == "the connection was lost"
    assert counted.opened() and not counted.opened(), "that it is back is told once, where its loss was"
    for _ in range(200):
        now += 0.1
        lines.append(counted.lost("the session is not known there any more", now))
    said = [line for line in lines if line is not None]
    assert ALL_ARE_SAID - 1 <= len(said) <= ALL_ARE_SAID + 20 / BETWEEN_LINES_SECONDS
    assert "reconnected 2 times in 0 s" in said[0]
    assert "the session is not known there any more (1)" in said[0] and "the connection was lost (1)" in said[0]
    assert counted.count == 201
    assert counted.lost("silent", now + WINDOW_SECONDS + 1) == "silent", "what is long ago is not counted"


def test_attempts_that_come_to_nothing_are_logged_after_a_while_and_ever_less_often() -> None:
    counted, said = LostConnections(), []
    for second in range(300):
        line = counted.failed("nothing listens there", float(second))
        if line is not None:
            said.append((second, line))
    seconds = [second for second, _ in said]
    assert seconds[0] == FIRST_WAIT_SECONDS and len(seconds) < 9
    assert said[0][1] == "no session after 11 attempts in 10 s: nothing listens there"
    counted.opened()
    assert counted.failed("nothing listens there", 301.0) is None
