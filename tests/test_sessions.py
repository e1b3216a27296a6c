"""Sessions are leases: they end, and with them everything that was kept."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import pytest

from zsl.errors import OverloadedError, UnknownSessionError
from zsl.trunk.sessions import Session, Sessions
from zsl.trunk.work import Held, Shape


@dataclass(frozen=True)
class Kept:
    nbytes: int
    has_graph: bool = False


def table(**changes: float) -> Sessions:
    ids = count()
    settings = {"lease_seconds": 60, "max_inflight_requests": 2, "max_inflight_bytes": 100, **changes}
    return Sessions(**settings, new_id=lambda: next(ids).to_bytes(16, "big"))  # type: ignore[arg-type]


def hold(session: Session, step: int, nbytes: int = 10) -> None:
    session.held[step] = Held(Kept(nbytes), Shape(1, 1), None)


def test_a_session_ends_with_its_lease_and_frees_what_it_held() -> None:
    sessions = table()
    session = sessions.open(b"peer", now=0.0)
    hold(session, 1, nbytes=10)
    assert sessions.held_bytes == 10
    assert sessions.close_expired(now=59.9) == []
    assert sessions.close_expired(now=60.0) == [session.id]
    assert sessions.held_bytes == 0
    with pytest.raises(UnknownSessionError):
        sessions.get(session.id, b"peer", now=60.0)


def test_a_sign_of_life_renews_the_lease() -> None:
    sessions = table()
    session = sessions.open(b"peer", now=0.0)
    sessions.get(session.id, b"peer", now=50.0)
    assert sessions.close_expired(now=100.0) == []
    assert sessions.close_expired(now=110.0) == [session.id]


def test_another_connection_cannot_use_a_session() -> None:
    sessions = table()
    session = sessions.open(b"mine", now=0.0)
    with pytest.raises(UnknownSessionError):
        sessions.get(session.id, b"theirs", now=1.0)


def test_a_second_hello_of_a_connection_ends_its_first_session() -> None:
    sessions = table()
    first = sessions.open(b"peer", now=0.0)
    hold(first, 1)
    second = sessions.open(b"peer", now=1.0)
    assert [session.id for session in sessions] == [second.id]
    assert sessions.held_bytes == 0


def test_requests_over_the_credit_are_refused_with_a_time_to_come_back() -> None:
    sessions = table()
    session = sessions.open(b"peer", now=0.0)
    sessions.admit(session, 1, nbytes=10)
    sessions.admit(session, 2, nbytes=10)
    with pytest.raises(OverloadedError) as caught:
        sessions.admit(session, 3, nbytes=10)
    assert caught.value.retry_after_ms > 0
    sessions.finish(session.id, 1)
    sessions.admit(session, 3, nbytes=10)


def test_bytes_over_the_credit_are_refused_but_one_large_request_goes() -> None:
    sessions = table()
    session = sessions.open(b"peer", now=0.0)
    sessions.admit(session, 1, nbytes=1000)
    with pytest.raises(OverloadedError):
        sessions.admit(session, 2, nbytes=1)


def test_finishing_in_a_closed_session_is_nothing() -> None:
    sessions = table()
    session = sessions.open(b"peer", now=0.0)
    sessions.close(session.id)
    assert sessions.finish(session.id, 1) is None
