"""Ctrl-C anywhere in a step ends that call alone: the client's next call works."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import zsl.client
import zsl.link
import zsl.transport
from support.square import SquareClient, SquareServer, some

CLIENT_FILES = tuple(str(Path(package.__path__[0])) for package in (zsl.client, zsl.link, zsl.transport))
# After these the interpreter looks for signals: where a function begins, after a call, and where a loop goes round.
LOOKS_FOR_SIGNALS = ("RESUME", "CALL", "JUMP_BACKWARD")
Place = tuple[CodeType, int]


class Interrupts:
    """Raises KeyboardInterrupt at the first place of the client's code, in this thread, that is not in `seen`."""

    def __init__(self, seen: set[Place]) -> None:
        self.seen = seen
        self.raised_at: Place | None = None
        self._last: dict[FrameType, int] = {}
        self._places: dict[CodeType, dict[int, str]] = {}

    def __enter__(self) -> Interrupts:
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(None)
        self._last.clear()

    def _on_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(CLIENT_FILES):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self._on_opcode

    def _on_opcode(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event != "opcode" or self.raised_at is not None:
            return self._on_opcode
        last, self._last[frame] = self._last.get(frame), frame.f_lasti
        place = (frame.f_code, frame.f_lasti)
        if last is not None and place not in self.seen and self._is_a_place(frame.f_code, last, frame.f_lasti):
            self.seen.add(place)
            self.raised_at = place
            raise KeyboardInterrupt
        return self._on_opcode

    def _is_a_place(self, code: CodeType, last: int, now: int) -> bool:
        """Return whether a signal would be noticed between these two instructions, in the second one's handlers."""
        if code not in self._places:
            self._places[code] = {one.offset: one.opname for one in dis.get_instructions(code)}
        handlers = dis._parse_exception_table(code)  # type: ignore[attr-defined]

        def handler(offset: int) -> list[Any]:
            return [entry.target for entry in handlers if entry.start <= offset < entry.end]

        return self._places[code].get(last, "").startswith(LOOKS_FOR_SIGNALS) and handler(last) == handler(now)


@pytest.fixture
def client() -> Iterator[SquareClient]:
    with SquareServer() as server, SquareClient(server.endpoint, request_timeout_seconds=5) as connected:
        yield connected


def test_the_next_call_works_wherever_a_step_was_interrupted(client: SquareClient) -> None:
    seen: set[Place] = set()
    x, gradients = some(1), some(2)
    interrupted = 0
    for _ in range(2_000):
        with Interrupts(seen) as interrupts:
            try:
                client.step(x, gradients)
            except KeyboardInterrupt:
                interrupted += 1
        if interrupts.raised_at is None:
            break
        code, offset = interrupts.raised_at
        try:
            assert client.is_right(x, gradients)
        except Exception as error:
            line = next(line for start, stop, line in code.co_lines() if start <= offset < stop)
            raise AssertionError(f"after an interrupt in {code.co_qualname}, line {line}") from error
    else:
        raise AssertionError("there is always another place")
    assert interrupted > 50, "the tracer finds the places"
