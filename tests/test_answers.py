"""An answer is taken by whoever it names: session and request together, on open lines too."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

from support.peer import Peer, forward
from support.rogue import EPOCH, SESSION, Answer, Rogue
from support.square import SquareClient, SquareServer, squared
from zsl.errors import ConnectionLost, ForbiddenError, ProtocolVersionError, RequestTimeout, Retry
from zsl.trunk.settings import ServerSettings
from zsl.wire.frames import KIND, MAGIC, MAJOR, decode, seal
from zsl.wire.messages import (
    TO_CLIENT,
    TO_DAEMON,
    Error,
    GoAway,
    Hello,
    InSession,
    MessageType,
    Ping,
    Pong,
    Release,
    Result,
    TensorDescriptor,
    Welcome,
    WorkHeader,
)

OTHERS = b"o" * 16
X = np.arange(4, dtype=np.float32).reshape(1, 4)
ONE = TensorDescriptor(role="activations", dtype="f32", shape=(1, 1, 4), nbytes=16)


def result(request: int, values: np.ndarray, *, session: bytes = SESSION) -> Answer:
    header = Result(session=session, epoch=EPOCH, request=request, merged=1, queue_us=0, compute_us=0, tensors=[ONE])
    return header, [values.astype(np.float32).tobytes()]


def error(request: int | None, code: str, *, session: bytes | None, retry: Retry = Retry.NEVER) -> Answer:
    return (
        Error(
            request=request, session=session, epoch=EPOCH, code=code, retry=retry, retry_after_ms=0, text="on purpose"
        ),
        [],
    )


ANOTHERS = {
    "a RESULT": lambda request: result(request, 21 * X, session=OTHERS),
    "an ERROR": lambda request: error(request, "INTERNAL", session=OTHERS),
    "an ERROR without a session": lambda request: error(request, "INTERNAL", session=None),
    "that its session is gone": lambda request: error(request, "UNKNOWN_SESSION", session=OTHERS, retry=Retry.REHELLO),
    "that its key is unknown": lambda request: error(None, "FORBIDDEN", session=OTHERS),
    "a GOAWAY": lambda _: (GoAway(session=OTHERS, epoch=EPOCH, drain_ms=0), []),
}


@pytest.mark.parametrize("what", ANOTHERS)
def test_what_was_meant_for_another_session_is_not_taken(what: str, caplog: pytest.LogCaptureFixture) -> None:
    with (
        Rogue(lambda header: [ANOTHERS[what](header.request), result(header.request, squared(X))]) as daemon,
        SquareClient(daemon.endpoint) as client,
    ):
        output, _ = client.forward(X)
        assert np.array_equal(output, squared(X))
        assert client.connection.traffic.replays == 0
    assert caplog.text == ""


def test_a_welcome_or_a_refusal_that_was_meant_for_another_client_is_not_taken() -> None:
    """Whoever else connects has its own number of HELLO, though both are the first that their clients say."""
    heard: list[int] = []

    def also_anothers(hello: Hello, welcome: Welcome) -> list[Welcome | Error]:
        heard.append(hello.request)
        refused, _ = error(1, "WRONG_MODEL", session=None)
        return [welcome.model_copy(update={"request": 1, "session": OTHERS}), refused]  # type: ignore[list-item]

    with Rogue(lambda header: [result(header.request, squared(X))], hello=also_anothers) as daemon:
        for _ in range(2):
            with SquareClient(daemon.endpoint) as client:
                assert client.connect().session == SESSION
                assert np.array_equal(client.forward(X)[0], squared(X))
    assert len(set(heard)) == 2 and 1 not in heard


def test_a_status_is_answered_by_a_status_only_and_a_request_never_by_one() -> None:
    with SquareServer() as server, SquareClient(server.endpoint) as client:
        status = client.connection.submit_status().result(20).header
        assert status.TYPE is MessageType.STATUS
        session = client.connection.welcome.session.hex()[:8]
        assert f"Open({server.endpoint}, session {session}, 0 under way)" in repr(client.connection)
        assert np.array_equal(client.forward(X)[0], squared(X))


def test_a_daemon_that_says_goaway_again_and_again_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    away: Answer = GoAway(session=SESSION, epoch=EPOCH, drain_ms=0), []
    with Rogue(lambda header: [*[away] * 50, result(header.request, squared(X))]) as daemon:
        with SquareClient(daemon.endpoint) as client:
            assert np.array_equal(client.forward(X)[0], squared(X))
            assert np.array_equal(client.forward(X)[0], squared(X))
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_forbidden_with_the_id_of_a_request_ends_that_request_at_once() -> None:
    with Rogue(lambda header: [error(header.request, "FORBIDDEN", session=SESSION)]) as daemon:
        with SquareClient(daemon.endpoint, request_timeout_seconds=60) as client:
            future = client.connection.submit(1_000, lambda welcome, pending: forward(welcome, 1_000, tokens=1))
            with pytest.raises(ForbiddenError):
                future.result(10)


def test_forbidden_with_the_id_of_a_request_sends_it_to_the_next_daemon() -> None:
    with (
        Rogue(lambda header: [error(header.request, "FORBIDDEN", session=SESSION)]) as daemon,
        Rogue(lambda header: [result(header.request, squared(X))]) as other,
        SquareClient(f"{daemon.endpoint},{other.endpoint}", request_timeout_seconds=10) as client,
    ):
        assert np.array_equal(client.forward(X)[0], squared(X))


def test_a_daemon_that_opens_sessions_and_ends_them_at_once_is_asked_ever_less_often_with_the_cause_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def ends_it(header: WorkHeader) -> list[Answer]:
        return [error(None, "UNKNOWN_SESSION", session=SESSION, retry=Retry.REHELLO)]

    with Rogue(ends_it) as daemon, SquareClient(daemon.endpoint, request_timeout_seconds=2) as client:
        with pytest.raises((ConnectionLost, RequestTimeout)):
            client.forward(X)
        hellos = sum(isinstance(header, Hello) for header in daemon.heard)
    assert 2 < hellos < 60, "without pauses it would be hundreds"
    assert "reconnected 2 times" in caplog.text and "the session is not known there any more" in caplog.text


def test_what_the_daemon_answers_within_a_session_names_it() -> None:
    with SquareServer(settings=ServerSettings(max_request_tokens=8)) as server, Peer(server.endpoint) as peer:
        welcome = peer.hello()
        session, epoch = welcome.session, welcome.epoch
        answers = [
            peer.ask(*forward(welcome, 1)),
            peer.ask(*forward(welcome, 1)),  # again: the answer that was kept
            peer.ask(*forward(welcome, 2, tokens=9)),
            peer.ask(Ping(session=session, epoch=epoch, request=3)),
        ]
        assert [type(answer) for answer in answers] == [Result, Result, Error, Pong]
        assert {answer.session for answer in answers if isinstance(answer, InSession | Error)} == {session}
        unknown = peer.ask(Release(session=OTHERS, epoch=epoch, step=1))
        assert isinstance(unknown, Error) and (unknown.code, unknown.session) == ("UNKNOWN_SESSION", OTHERS)
        header, buffers = forward(welcome, 4)
        packed = msgpack.packb({**header.model_dump(), "extra": 1})
        peer.send_frames(seal([KIND.pack(MAGIC, MAJOR, header.TYPE, 0), packed, *buffers]))
        malformed = peer.hear()
        assert isinstance(malformed, Error)
        assert (malformed.code, malformed.request, malformed.session) == ("MALFORMED", 4, session)


def test_an_answer_that_was_kept_names_the_session_that_goes_on_over_a_new_connection() -> None:
    with SquareServer() as server, Peer(server.endpoint) as first, Peer(server.endpoint) as second:
        welcome = first.hello()
        assert isinstance(first.ask(*forward(welcome, 1)), Result)
        resumed = second.hello(resume=welcome.session)
        again = second.ask(*forward(resumed, 1, attempt=1))
        assert isinstance(again, Result)
        assert (again.session, again.epoch, again.request) == (resumed.session, resumed.epoch, 1)


@pytest.mark.parametrize("major", [MAJOR - 1, MAJOR + 1])
def test_the_versions_before_and_after_are_refused_by_name_at_both_ends(major: int) -> None:
    frames = seal([KIND.pack(MAGIC, major, MessageType.STATUS, 0), b"whatever it has there"])
    for schemas in (TO_DAEMON, TO_CLIENT):
        with pytest.raises(ProtocolVersionError, match=rf"version {MAJOR} .* {major}"):
            decode(frames, schemas)
    with SquareServer() as server, Peer(server.endpoint) as peer:
        peer.send_frames(frames)
        answer = peer.hear()
        assert isinstance(answer, Error) and answer.code == "PROTO_VERSION"
