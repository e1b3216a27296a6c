"""Hostile forms with sessions, steps and requests: those of others, and one's own out of order or again and again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np

from zsl.wire.messages import Bye, Error, MessageType, Result, Welcome

from .hostile_scene import Act, Acts, Scene, Victim, backward, forward, heard, hello, packed, tell, tensor
from .raw_zmtp import RawPeer

KINDS = MessageType
INTEGERS = {"i64": np.int64, "i32": np.int32, "i16": np.int16, "i8": np.int8, "u8": np.uint8}
MOST_TOKENS = 32_768  # of a request
ROW = 8  # tokens
SOME, MANY = 20, 300


def sessions() -> Acts:
    """At a daemon with or without keys."""
    return {**integers(), **steps(), **others(), **hellos()}


def integers() -> Acts:
    """Masks, positions and lengths in a session of one's own."""

    def asks(tokens: int, role: str, values: Sequence[int], code: str | None, **how: Any) -> Act:
        """A FORWARD with integers beside its activations; `code`: of the answer, None: a RESULT."""

        def act(scene: Scene) -> None:
            peer, welcome = scene.opened()
            described, buffer = _integers(role, values, **how)
            activations = tensor((1, tokens, scene.place.hidden))
            buffers = [bytes(activations["nbytes"]), buffer]  # type: ignore[call-overload]
            peer.send_message(forward(welcome, [activations, described], buffers, keep=True))
            answered(peer, 1, code)
            if code is None:
                gradients = tensor((1, tokens, scene.place.hidden), "gradients")
                peer.send_message(backward(welcome, 1, [gradients], request=2))
                answered(peer, 2, None)

        return act

    def positions(values: Sequence[int], code: str | None = "BAD_SHAPE", **how: Any) -> Act:
        shape = how.pop("shape", (1, len(values)))
        return asks(ROW, "position_ids", values, code, shape=shape, **how)

    alternating = [*islice(cycle((1, 2)), MOST_TOKENS * 2 // 3 - 1), 2]
    assert sum(alternating) == MOST_TOKENS
    rising = list(range(1, 64))
    forms: Acts = {
        "lengths 1, 2, 1, 2 … up to the tokens of a request": asks(MOST_TOKENS, "lengths", alternating, None),
        "lengths 1, 2, 3 … each once": asks(sum(rising), "lengths", rising, None),
        "lengths of 1 up to the tokens of a request": asks(MOST_TOKENS, "lengths", [1] * MOST_TOKENS, None),
        "lengths that add up to too few": asks(ROW, "lengths", [1, 2], "BAD_SHAPE"),
        "lengths that add up to too many": asks(ROW, "lengths", [ROW, ROW], "BAD_SHAPE"),
        "lengths whose sum overflows": asks(ROW, "lengths", [2**63 - 1, 2**63 - 1, ROW + 2], "BAD_SHAPE"),
        "lengths that are negative": asks(ROW, "lengths", [ROW + 1, -1], "BAD_SHAPE"),
        "more lengths than tokens": asks(ROW, "lengths", [0] * 1000 + [ROW], "BAD_SHAPE"),
        "lengths over a row's tokens": asks(MOST_TOKENS, "lengths", [MOST_TOKENS], "TOO_LARGE"),
        "a mask of twos": asks(ROW, "attention_mask", [2] * ROW, "BAD_SHAPE", shape=(1, ROW)),
        "positions that are all alike": positions([0] * ROW, None),
        "positions that go down": positions(range(ROW, 0, -1), None),
        "positions of another row": positions(range(ROW), shape=(2, ROW // 2)),
        "positions of more tokens": positions(range(ROW + 1)),
        "positions of rank 4": positions(range(ROW), shape=(1, 1, 1, ROW)),
        "positions of floats": positions(range(ROW), "BAD_DTYPE", dtype="f32"),
    }
    for value in (-1, 64, 2**31 - 1, 2**31, 2**32, 2**63 - 1, -(2**63)):
        forms[f"a position of {value}"] = positions([*range(ROW - 1), value])
    forms["a position of -128 in a byte"] = positions([*range(ROW - 1), -128], dtype="i8")
    return forms


def steps() -> Acts:
    """In sessions of one's own: backwards, cancels and releases that nothing asked for."""
    return {
        "a BACKWARD without a FORWARD": _backward_without,
        "a BACKWARD for the step of another session of one's own": _backward_of_another_session,
        "a BACKWARD of other shapes before the FORWARD's answer": _backward_too_soon,
        "a BACKWARD twice": _backward_twice,
        "gradients of other sizes than the step's": _gradients_of_other_sizes,
        "a RELEASE of a step while its BACKWARD is queued": _released_while_queued,
        "backwards that are cancelled, by the dozen": _cancelled_backwards,
        "CANCEL and RELEASE of what never was, 300 times": _never_was,
    }


def others() -> Acts:
    """With the session and the request ids of an honest client."""

    def tells(kind: int, *, own: bool = False, **fields: object) -> Act:
        """`own`: on a connection that has a session, which is another one."""

        def act(scene: Scene) -> None:
            peer = scene.opened()[0] if own else scene.joined()
            peer.send_message(packed(kind, {**_ids(scene.victim), **fields}))

        return act

    forms: Acts = {
        "PING in another's session": tells(KINDS.PING, request=1),
        "BYE in another's session": tells(KINDS.BYE),
        "BYE in another's session, beside one's own": tells(KINDS.BYE, own=True),
        "HELLO that resumes another's session": lambda scene: _takes_the_session(scene, ends=False),
        "HELLO that resumes another's session, then BYE": lambda scene: _takes_the_session(scene, ends=True),
        "a BACKWARD for another's steps to come": _backward_of_others,
        "FORWARD in another's session, with its request ids to come": _forward_of_others,
    }
    for name, kind, key in (("RELEASE", KINDS.RELEASE, "step"), ("CANCEL", KINDS.CANCEL, "request")):
        forms[f"{name} of another's steps to come"] = lambda scene, kind=kind, key=key: [
            tells(kind, **{key: scene.victim.request + more})(scene) for more in range(10)
        ]
        forms[f"{name} of another's steps to come, beside a session of one's own"] = lambda scene, kind=kind, key=key: [
            tells(kind, own=True, **{key: scene.victim.request + more})(scene) for more in range(10)
        ]
        forms[f"{name} in one's own session of another's steps to come"] = lambda scene, kind=kind, key=key: [
            _ask(scene.opened(), kind, **{key: scene.victim.request + more}) for more in range(10)
        ]
    return forms


def hellos() -> Acts:
    """Sessions that are opened and resumed without end."""
    return {
        "HELLO that resumes zeros": lambda scene: _resumes(scene, bytes(16)),
        "HELLO that resumes 15 bytes": lambda scene: _resumes(scene, bytes(15)),
        "300 HELLOs on a connection": lambda scene: _many_hellos(scene, MANY),
        "a HELLO that is sent 300 times": lambda scene: _many_hellos(scene, MANY, same=True),
        "a HELLO on each of 50 connections": lambda scene: [scene.opened() for _ in range(50)],
        "a session that goes from connection to connection": _from_connection_to_connection,
        "a connection that resumes all of one's sessions": _resumes_all,
    }


# --- masks, positions, lengths ---------------------------------------------------------------------------------------


def _integers(
    role: str, values: Sequence[int], *, dtype: str = "i64", shape: Sequence[int] | None = None
) -> tuple[dict[str, object], bytes]:
    """Descriptor and buffer. Numbers over their type are cut off, as they would be on the wire."""
    bits = np.array([value % 2**64 for value in values], dtype=np.uint64).view(np.int64)
    array = bits.astype(INTEGERS.get(dtype, np.float32))
    return tensor(shape or (len(values),), role, dtype, array.itemsize), array.tobytes()


def _ids(of: Welcome | Victim) -> dict[str, object]:
    return {"session": of.session, "epoch": of.epoch}


def answered(peer: RawPeer, request: int, *codes: str | None) -> None:
    """Wait for the answer to a request, and see that it is one of these: an ERROR's code, or None for a RESULT."""
    while not isinstance(answer := heard(peer), (Result, Error)) or answer.request != request:
        pass
    found = answer.code if isinstance(answer, Error) else None
    assert found in codes, f"{found} in place of {codes}"


# --- steps -----------------------------------------------------------------------------------------------------------


def _ask(opened: tuple[RawPeer, Welcome], kind: int, **fields: object) -> None:
    peer, welcome = opened
    peer.send_message(packed(kind, {**_ids(welcome), **fields}))


def _held(scene: Scene, steps: int = 1, rows: int = 1) -> tuple[RawPeer, Welcome]:
    """A session with so many steps, from 1 on, that wait for their backward."""
    peer, welcome = scene.opened()
    for step in range(1, steps + 1):
        peer.send_message(forward(welcome, [tensor((rows, ROW, scene.place.hidden))], request=step, keep=True))
        answered(peer, step, None)
    return peer, welcome


def _gradients(scene: Scene, tokens: int = ROW, *, rows: int = 1, hidden: int | None = None) -> list[dict[str, Any]]:
    return [tensor((rows, tokens, hidden or scene.place.hidden), "gradients")]


def _backward_without(scene: Scene) -> None:
    peer, welcome = scene.opened()
    peer.send_message(backward(welcome, 7, _gradients(scene, 2)))
    answered(peer, 1, "UNKNOWN_STEP")


def _backward_of_another_session(scene: Scene) -> None:
    (first, one), (second, two) = _held(scene), scene.opened()
    second.send_message(backward(two, 1, _gradients(scene)))
    answered(second, 1, "UNKNOWN_STEP")
    second.send_message(backward(one, 1, _gradients(scene), request=2))
    answered(second, 2, "UNKNOWN_SESSION")
    first.send_message(backward(one, 1, _gradients(scene), request=3))
    answered(first, 3, None)


def _backward_too_soon(scene: Scene) -> None:
    peer, welcome = scene.opened()
    peer.send_message(forward(welcome, [tensor((1, ROW, scene.place.hidden))], keep=True))
    for request, tokens in ((2, 2), (3, ROW + 1), (4, 1)):
        peer.send_message(backward(welcome, 1, _gradients(scene, tokens), request=request))
    for _ in range(4):
        heard(peer)  # in whatever order, as the FORWARD was faster or not
    peer.send_message(backward(welcome, 1, _gradients(scene), request=5))
    answered(peer, 5, None)


def _backward_twice(scene: Scene) -> None:
    peer, welcome = _held(scene)
    for request in (2, 3):
        peer.send_message(backward(welcome, 1, _gradients(scene), request=request))
    # The same id again: with other bytes, with another shape, and for another step.
    peer.send_message(backward(welcome, 1, _gradients(scene), [b"\1" * 4 * ROW * scene.place.hidden], request=2))
    peer.send_message(backward(welcome, 1, _gradients(scene, 3), request=2))
    peer.send_message(backward(welcome, 9, _gradients(scene), request=2))
    answered(peer, 3, "UNKNOWN_STEP")


def _gradients_of_other_sizes(scene: Scene) -> None:
    peer, welcome = _held(scene)
    others = [_gradients(scene, 1), _gradients(scene, rows=2), _gradients(scene, hidden=scene.place.hidden + 1)]
    for request, wrong in enumerate(others, start=2):
        peer.send_message(backward(welcome, 1, wrong, request=request))
        answered(peer, request, "BAD_SHAPE")
    both = [tensor((1, 2, scene.place.hidden)), *_gradients(scene)]
    peer.send_message(backward(welcome, 1, both, request=9))
    answered(peer, 9, "BAD_SHAPE")
    peer.send_message(backward(welcome, 1, _gradients(scene), request=10))
    answered(peer, 10, None)


def _released_while_queued(scene: Scene) -> None:
    peer, welcome = _held(scene, SOME)
    for step in range(1, SOME + 1):
        peer.send_message(backward(welcome, step, _gradients(scene), request=SOME + step))
        for number in (step, SOME + step):
            _ask((peer, welcome), KINDS.RELEASE, step=number)
    answered(peer, 2 * SOME, None)


def _cancelled_backwards(scene: Scene) -> None:
    """Large ones; each has its answer, whether it was computed or not."""
    rows = 64
    peer, welcome = _held(scene, SOME, rows)
    for step in range(1, SOME + 1):
        peer.send_message(backward(welcome, step, _gradients(scene, rows=rows), request=SOME + step))
        _ask((peer, welcome), KINDS.CANCEL, request=SOME + step)
    for _ in range(SOME):
        assert isinstance(heard(peer), (Result, Error))


def _never_was(scene: Scene) -> None:
    peer, welcome = scene.opened()
    for number in range(MANY):
        _ask((peer, welcome), KINDS.CANCEL, request=number)
        _ask((peer, welcome), KINDS.RELEASE, step=2**53 - number)


# --- of others -------------------------------------------------------------------------------------------------------


def _backward_of_others(scene: Scene) -> None:
    """In one's own session, which has no such steps, and in theirs."""
    peer, welcome = scene.opened()
    for more in range(4):
        step = scene.victim.request + more
        peer.send_message(backward(welcome, step, _gradients(scene), request=2 * more))
        answered(peer, 2 * more, "UNKNOWN_STEP")
        peer.send_message(backward(scene.victim, step, _gradients(scene), request=2 * more + 1))
        answered(peer, 2 * more + 1, "UNKNOWN_SESSION")


def _forward_of_others(scene: Scene) -> None:
    peer = scene.joined()
    for more in range(6):
        request = scene.victim.request + more
        peer.send_message(forward(scene.victim, [tensor((1, ROW, scene.place.hidden))], request=request))
        answered(peer, request, "UNKNOWN_SESSION")


def _takes_the_session(scene: Scene, *, ends: bool) -> None:
    """With keys another tenant's session is not to be had. Without them, its client takes it back, or opens another."""
    peer, welcome = scene.joined(), None
    peer.send_message(hello(resume=scene.victim.session))
    while not isinstance(welcome, Welcome):
        welcome = heard(peer)
    scene.sessions.append(welcome)
    assert (welcome.session == scene.victim.session) == (not scene.keyed)
    if ends:
        tell(peer, Bye(session=welcome.session, epoch=welcome.epoch))


# --- HELLO -----------------------------------------------------------------------------------------------------------


def _resumes(scene: Scene, session: bytes) -> None:
    peer = scene.joined()
    peer.send_message(hello(resume=session))
    answer = heard(peer)
    if isinstance(answer, Welcome):  # to another session
        scene.sessions.append(answer)


def _many_hellos(scene: Scene, count: int, *, same: bool = False) -> None:
    """No answer is read meanwhile. The session of the last one is the one that is left."""
    peer, _ = scene.opened()
    for number in range(count):
        peer.send_message(hello(request=2 if same else number + 2))
    last = count + 2
    peer.received_until_quiet()
    peer.send_message(hello(request=last))
    while not isinstance(welcome := heard(peer), Welcome) or welcome.request != last:
        pass
    scene.sessions[-1] = welcome


def _from_connection_to_connection(scene: Scene) -> None:
    """Two at a time ask for it; the second of them has it, and the one that had it is cut off."""
    _, welcome = scene.opened()
    for number in range(SOME):
        first, second = scene.joined(), scene.joined()
        for peer in (first, second):
            peer.send_message(hello(request=number, resume=welcome.session))
        resumed = heard(second)
        assert isinstance(resumed, Welcome) and resumed.session == welcome.session


def _resumes_all(scene: Scene) -> None:
    """The connections that had them are cut."""
    sessions = [scene.opened()[1] for _ in range(SOME)]
    peer = scene.joined()
    for number, welcome in enumerate(sessions):
        peer.send_message(hello(request=number, resume=welcome.session))
        resumed = heard(peer)
        assert isinstance(resumed, Welcome) and resumed.session == welcome.session
    peer.send_message(forward(sessions[0], [tensor((1, ROW, scene.place.hidden))]))
    heard(peer)
