"""Choice of the next daemon and of the pause before it: pure, with the test's clock and random numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsl.errors import ConfigError, TrunkAuthError, WrongModelError
from zsl.link.endpoints import (
    FIRST_PAUSE_SECONDS,
    LASTING_SECONDS,
    LONGEST_PAUSE_SECONDS,
    Endpoints,
    parse_endpoints,
)
from zsl.transport.dealer import LinkEvent


def endpoints(*names: str, draw: float = 1.0) -> Endpoints:
    return Endpoints(names, draw=lambda: draw)


def test_several_are_written_with_commas_and_none_twice() -> None:
    assert parse_endpoints("a:1, tcp://b:2") == ("tcp://a:1", "tcp://b:2")
    with pytest.raises(ConfigError, match="twice"):
        parse_endpoints("a:1,tcp://a:1")
    for text in ("", "a:1,", "a"):
        with pytest.raises(ConfigError, match="HOST:PORT"):
            parse_endpoints(text)


def test_those_that_were_not_tried_yet_are_tried_at_once_and_then_all_with_growing_pauses() -> None:
    tried = endpoints("a", "b")
    now, order, pauses = 0.0, [], []
    for _ in range(6):
        order.append(tried.current)
        tried.failed(now)
        pauses.append(max(tried.not_before - now, 0.0))
        now = max(now, tried.not_before)
    assert order == ["a", "b"] * 3
    assert pauses == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4])


def test_the_one_that_answers_is_kept_and_pauses_begin_anew() -> None:
    tried = endpoints("a", "b")
    for _ in range(9):
        tried.failed(0.0)
    assert tried.current == "b"
    tried.answered()
    tried.failed(100.0)
    assert (tried.current, tried.not_before <= 100.0) == ("a", True)


@given(st.integers(1, 100), st.floats(0, 1), st.integers(1, 3))
def test_a_pause_is_drawn_from_all_that_it_may_be_and_is_bounded(failures: int, draw: float, count: int) -> None:
    tried = endpoints(*"abc"[:count], draw=draw)
    for _ in range(failures):
        tried.failed(0.0)
    assert 0.0 <= tried.not_before <= LONGEST_PAUSE_SECONDS
    if count == 1:
        assert tried.not_before == pytest.approx(
            draw * min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (failures - 1))
        )


def test_sessions_that_are_lost_again_and_again_without_an_answer_are_opened_after_growing_pauses() -> None:
    tried, now, pauses = endpoints("a"), 0.0, []
    for _ in range(5):
        tried.opened(now)
        tried.lost(now)
        pauses.append(tried.not_before - now)
        now = tried.not_before
    assert pauses == pytest.approx([0, 0.1, 0.2, 0.4, 0.8])
    tried.answered()
    tried.lost(now)
    assert tried.not_before == now, "it did something"
    tried.opened(now)
    tried.lost(now + LASTING_SECONDS)
    assert tried.not_before == now + LASTING_SECONDS, "it lasted"


def test_one_that_is_struck_out_is_never_tried_again_and_the_last_one_raises_why() -> None:
    tried = endpoints("a", "b", "c")
    tried.failed(0.0)
    tried.strike_out(WrongModelError())
    assert tried.current == "c" and tried.others
    tried.strike_out(WrongModelError())
    assert tried.current == "a" and not tried.others
    with pytest.raises(WrongModelError):
        tried.strike_out(WrongModelError())


def test_one_that_goes_away_is_left_at_once() -> None:
    tried = endpoints("a", "b")
    tried.leave(5.0)
    assert (tried.current, tried.not_before) == ("b", 5.0)


def test_what_was_seen_of_each_is_told_and_that_it_was_lost_hides_no_reason() -> None:
    tried = endpoints("a", "b", "c")
    for events in ([LinkEvent.MUTE, LinkEvent.LOST], [LinkEvent.UP, LinkEvent.LOST], [LinkEvent.REFUSED]):
        for event in events:
            assert tried.saw(event) is None
        tried.failed(0.0)
    text = str(tried.unreachable(10))
    assert "(tried for 10 s)" in text and "(tried for less than 0.1 s)" in str(tried.unreachable(0.0))
    assert "at a: something listens there that does not answer" in text
    assert "at b: the connection broke" in text and "at c: nothing listens there" in text


def test_a_host_whose_name_is_not_known_is_told_from_one_that_is_silent() -> None:
    tried = Endpoints(("tcp://a:1", "tcp://b:1"), resolves=lambda endpoint: endpoint == "tcp://b:1")
    text = str(tried.unreachable(10))
    assert "at tcp://a:1: the name of its host is not known" in text and "at tcp://b:1: it cannot be reached" in text


@pytest.mark.parametrize("event", [LinkEvent.UNKNOWN_KEY, LinkEvent.WRONG_SERVER_KEY, LinkEvent.OTHER_MECHANISM])
def test_what_the_daemon_itself_says_of_keys_is_told_at_once(event: LinkEvent) -> None:
    assert isinstance(endpoints("a").saw(event), TrunkAuthError)


def test_a_daemon_that_cuts_connections_may_be_full_and_is_not_said_to_have_another_key() -> None:
    tried = endpoints("a")
    assert [tried.saw(LinkEvent.CUT) for _ in range(20)] == [None] * 20
    assert "it may be full" in str(tried.unreachable(1))


def test_keys_that_were_right_before_are_not_wrong_because_a_handshake_fails() -> None:
    tried = endpoints("a")
    tried.opened(0.0)
    assert [tried.saw(LinkEvent.WRONG_SERVER_KEY) for _ in range(20)] == [None] * 20
    assert tried.saw(LinkEvent.UNKNOWN_KEY) is not None, "it was taken off the list"
