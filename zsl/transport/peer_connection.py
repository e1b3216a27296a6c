"""One TCP connection of the daemon's ROUTER: greeting, handshake, messages in, messages out.

Never blocks: the `Router` tells it when to read or write. Memory for a peer is bounded before it is allocated: the
bytes of a handshake, the frames and bytes of a message, the answers that the peer has not read.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from enum import Enum

from zsl.transport.mechanisms import Mechanism, Refused
from zsl.transport.send_queue import THREAD_BYTES, SendQueue, slow_seconds
from zsl.transport.zmtp import (
    COMMAND,
    GREETING_BYTES,
    LARGE_BYTES,
    MORE,
    FrameReader,
    ProtocolViolation,
    check_greeting,
    command,
    greeting,
    head,
    parse_command,
)
from zsl.wire.frames import Frame

logger = logging.getLogger(__name__)

MAX_HANDSHAKE_BYTES = 1024  # of one command; libzmq's INITIATE has about 330
MAX_COMMAND_BYTES = 64
PING_TTL_BYTES, MAX_PING_CONTEXT_BYTES = 2, 16
HANDSHAKE_SECONDS = 5.0
GOODBYE_SECONDS = 1.0  # for a refused peer to read the reason
MESSAGES_PER_TURN = 16
READS_PER_TURN = 4


class State(Enum):
    GREETING = "greeting"
    HANDSHAKE = "handshake"
    OPEN = "open"
    REFUSED = "refused"  # the reason is being sent, then the connection ends
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class MessageLimits:
    """Limits of one message: frames, bytes a frame, and total bytes."""

    frames: int
    frame_bytes: int
    message_bytes: int


class Connection:
    """Accepted TCP connection. `receive(self, frames)` is called for each message.

    `executor` seals and opens large frames; its results return by `call_soon`. `changed(self)` is called when
    `wants_to_read` or `wants_to_write` may have changed, and at close. Not thread-safe; `clock` returns seconds.
    """

    def __init__(
        self,
        peer: bytes,
        connected: socket.socket,
        address: str,
        mechanism: Mechanism,
        limits: MessageLimits,
        *,
        max_unsent_messages: int,
        receive: Callable[[Connection, list[Frame]], None],
        changed: Callable[[Connection], None],
        executor: Executor | None,
        call_soon: Callable[..., object],
        clock: Callable[[], float],
    ) -> None:
        self.peer = peer
        self.socket = connected
        self.address = address
        self.limits = limits
        self.state = State.GREETING
        self.since = clock()  # time of accept
        self.heard_at = self.since
        self.why = ""  # reason of the close
        self._mechanism = mechanism
        self._max_unsent_messages = max_unsent_messages
        self._receive = receive
        self._changed = changed
        self._executor = executor
        self._call_soon = call_soon
        self._clock = clock
        self._greeting = bytearray()
        self._reader = FrameReader(self._admit)
        self._left = memoryview(b"")  # read but not parsed
        self._frames: list[Frame] = []
        self._message_bytes = 0
        self._message_since: float | None = None
        self._opening_bytes = 0  # of a frame being opened on another thread
        self._parked = False
        self.has_memory = False  # granted for the large message being received
        self.unsent = SendQueue(
            connected, mechanism, executor=executor, call_soon=call_soon, write=self.write, clock=clock
        )
        self.unsent.put(greeting(mechanism.name))

    @property
    def tenant(self) -> str:
        """Public key of the peer in z85; "" without keys, and before the peer has proven that it has it."""
        return self._mechanism.tenant

    @property
    def wants_to_read(self) -> bool:
        return self.state is not State.CLOSED and not self._opening_bytes and not self._parked

    @property
    def wants_to_write(self) -> bool:
        return self.unsent.has_sealed and self.state is not State.CLOSED

    @property
    def has_left(self) -> bool:
        """True if bytes were read that the next turn has to parse."""
        return bool(self._left) and self.wants_to_read

    @property
    def receiving_bytes(self) -> int:
        """Received bytes of an unfinished message."""
        return self._message_bytes + self._reader.held_bytes + self._opening_bytes

    @property
    def wants_memory(self) -> bool:
        """True if a large frame has begun, or the received part of the message is as large."""
        return self._reader.rest is not None or self.receiving_bytes >= LARGE_BYTES

    def overdue(self, now: float) -> bool:
        """Return whether the handshake, or a message being received, takes too long."""
        if self.state is State.REFUSED:
            return now - self.heard_at > GOODBYE_SECONDS
        if self.state is not State.OPEN:
            return now - self.since > HANDSHAKE_SECONDS
        if self._message_since is None:
            return False
        return now - self._message_since > slow_seconds(self.receiving_bytes)

    # --- in ------------------------------------------------------------------------------------------------------

    def read(self, scratch: memoryview) -> None:
        """Read available bytes and deliver whole messages, up to the limits of one turn."""
        now = self._clock()
        try:
            left, self._left = self._left, memoryview(b"")
            messages = MESSAGES_PER_TURN - (self._feed(left, now, MESSAGES_PER_TURN) if left else 0)
            for _ in range(READS_PER_TURN):
                if messages <= 0 or self._left or not self.wants_to_read:
                    return
                rest = self._reader.rest
                into = scratch if rest is None else rest
                nbytes = self.socket.recv_into(into)
                if not nbytes:
                    self.close("its peer closed it")
                    return
                if self.state is State.REFUSED:
                    continue
                self.heard_at = now
                if rest is None:
                    messages -= self._feed(scratch[:nbytes], now, messages)
                else:
                    frame = self._reader.filled(nbytes)
                    if frame is not None:
                        messages -= self._frame(*frame)
                if nbytes < len(into):
                    return
        except (BlockingIOError, InterruptedError):
            pass
        except Refused as refused:
            logger.info("refused %s: %s", self.address, refused)
            self._refuse(str(refused), refused.answer)
        except ProtocolViolation as violation:
            if self.state is State.GREETING:
                self._refuse(str(violation), b"")  # the peer may still read this end's greeting, and find the reason
            else:
                self.close(str(violation))
        except OSError as error:
            self.close(error.strerror or "it was reset")

    def park(self) -> None:
        """Stop reading until `unpark`, because there is no memory for the next large frame."""
        self._parked = True
        self._changed(self)

    def unpark(self) -> None:
        """Resume reading; the message's time limit starts now."""
        self._parked = False
        self._message_since = self._clock()
        self._changed(self)

    def _feed(self, data: memoryview, now: float, messages: int) -> int:
        """Parse and deliver up to `messages` messages, and keep the bytes left. Return the number delivered."""
        handed_on = 0
        if self.state is State.GREETING:
            data = self._take_greeting(data)
        while data and handed_on < messages and self.wants_to_read and self.state is not State.REFUSED:
            if self._message_since is None:
                self._message_since = now
            frame, used = self._reader.feed(data)
            data = data[used:]
            if frame is not None:
                handed_on += self._frame(*frame)
        if data and self.state in (State.HANDSHAKE, State.OPEN):
            self._left = memoryview(bytes(data))  # a copy, because the buffer is reused
        return handed_on

    def _take_greeting(self, data: memoryview) -> memoryview:
        part = data[: GREETING_BYTES - len(self._greeting)]
        self._greeting += part
        check_greeting(bytes(self._greeting), self._mechanism.name)
        if len(self._greeting) == GREETING_BYTES:
            self.state = State.HANDSHAKE
        return data[len(part) :]

    def _admit(self, flags: int, nbytes: int) -> None:
        """Check a frame by its head, before memory is allocated. Raises `ProtocolViolation`."""
        if self.state is State.HANDSHAKE:
            if nbytes > MAX_HANDSHAKE_BYTES:
                raise ProtocolViolation(f"a handshake of {nbytes} bytes")
        elif flags & COMMAND and not self._mechanism.encrypts:
            if nbytes > MAX_COMMAND_BYTES:
                raise ProtocolViolation(f"a command of {nbytes} bytes")
        elif nbytes > self.limits.frame_bytes + self._mechanism.overhead_bytes:
            raise ProtocolViolation(f"a frame of {nbytes} bytes, over {self.limits.frame_bytes}")
        elif self._message_bytes + nbytes > self.limits.message_bytes + self._mechanism.overhead_bytes:
            raise ProtocolViolation(f"a message of over {self.limits.message_bytes} bytes")

    def _frame(self, flags: int, body: memoryview) -> int:
        """Handle a whole frame. Return the number of messages or commands that it completes."""
        if self.state is State.HANDSHAKE:
            answer = self._mechanism.answer(body)
            self.unsent.put(head(len(answer), COMMAND) + answer)
            self._message_since = None
            if self._mechanism.is_ready:
                self.state = State.OPEN
            self.write()
            return 1
        if self._executor is not None and len(body) >= THREAD_BYTES:
            self._opening_bytes = len(body)
            self._changed(self)
            opened = self._executor.submit(self._mechanism.open, flags, body)
            opened.add_done_callback(lambda done: self._call_soon(self._opened, done))
            return 0
        return self._take_opened(*self._mechanism.open(flags, body))

    def _opened(self, done: object) -> None:
        self._opening_bytes = 0
        if self.state is State.CLOSED:
            return
        try:
            self._take_opened(*done.result())  # type: ignore[attr-defined]
        except ProtocolViolation as violation:
            self.close(str(violation))
            return
        except Exception:
            logger.exception("a frame of %s could not be opened", self.address)
            self.close("it failed")
            return
        self._changed(self)

    def _take_opened(self, flags: int, body: memoryview) -> int:
        if flags & COMMAND:
            self._take_command(body)
            if not self._frames:
                self._message_since = None
            return 1
        self._frames.append(body)
        self._message_bytes += len(body)
        if len(self._frames) > self.limits.frames:
            raise ProtocolViolation(f"a message of more than {self.limits.frames} frames")
        if self._message_bytes > self.limits.message_bytes:
            raise ProtocolViolation(f"a message of over {self.limits.message_bytes} bytes")
        if flags & MORE:
            return 0
        frames, self._frames, self._message_bytes, self._message_since = self._frames, [], 0, None
        self.has_memory = False
        self._receive(self, frames)
        return 1

    def _take_command(self, body: memoryview) -> None:
        name, data = parse_command(body)
        if name != b"PING" or not PING_TTL_BYTES <= len(data) <= PING_TTL_BYTES + MAX_PING_CONTEXT_BYTES:
            raise ProtocolViolation("a command that is not known")
        if self.unsent.is_empty:  # only a peer that has read all gets a PONG
            before, sealed = self._mechanism.seal(COMMAND, command(b"PONG", data[PING_TTL_BYTES:]))
            self.unsent.put(before + bytes(sealed))
            self.write()

    # --- out -----------------------------------------------------------------------------------------------------

    def send(self, frames: Sequence[Frame]) -> bool:
        """Send without waiting; the rest is sent when the peer reads.

        Return False, with nothing sent, if not open or too many messages wait. The frames' memory must not be written
        any more.
        """
        if self.state is not State.OPEN or self.unsent.messages >= self._max_unsent_messages:
            return False
        self.unsent.add(frames)
        self.write()
        return True

    def write(self) -> None:
        """Send as much as the kernel accepts now."""
        try:
            self.unsent.write()
        except OSError as error:
            self.close(error.strerror or "it was reset")
            return
        if self.state is State.REFUSED and not self.unsent.has_sealed:
            try:
                self.socket.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # the peer has closed already
        self._changed(self)

    # --- the end -------------------------------------------------------------------------------------------------

    def _refuse(self, why: str, answer: bytes) -> None:
        """Send the peer the reason, then end. An immediate close could lose it."""
        self.state = State.REFUSED
        self.why = why
        self._left = memoryview(b"")
        if answer:
            self.unsent.put(head(len(answer), COMMAND) + answer)
        self.write()

    def close(self, why: str) -> None:
        """Close the connection, and drop unsent messages."""
        if self.state is State.CLOSED:
            return
        self.why = self.why or why
        self.state = State.CLOSED
        self.unsent.clear()
        self._frames.clear()
        self._left = memoryview(b"")
        self._changed(self)
        self.socket.close()
