"""Versions of an adapter in the trunk's layers, and those that a session has been sent. No sockets, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from zsl.errors import ModelError, TooLargeError
from zsl.wire.frames import Frame
from zsl.wire.messages import Adapter, FloatDtypeName, TensorDescriptor, Welcome

MAX_PIECE_BYTES = 16 << 20
MAX_KEPT = 1024  # versions of a session, the newest
NO_ADAPTERS = (
    "the daemon accepts no adapters in the trunk's layers: leave them out with load_client(..., "
    'layers="client"), or start it without --no-adapters'
)


@dataclass(frozen=True, slots=True)
class EncodedAdapter:
    """Flat weights of an adapter at one moment, as they are sent. `digest` names them and their layout."""

    digest: bytes
    layout: bytes
    dtype: FloatDtypeName
    weights: Frame

    def pieces(self, welcome: Welcome, request: int) -> Iterator[tuple[Adapter, list[Frame]]]:
        """Yield the messages that bring this version to the daemon before `request`.

        Raises `ModelError` for a daemon that accepts no adapters, `TooLargeError` for a layout over its limit.
        """
        if welcome.adapters is None:
            raise ModelError(NO_ADAPTERS)
        most = min(welcome.limits.max_message_bytes, MAX_PIECE_BYTES)
        if len(self.layout) > most:
            raise TooLargeError(f"a layout of {len(self.layout)} bytes is over the daemon's limit of {most}")
        for offset in range(0, len(self.weights), most):
            named = {"weights": self.weights[offset : offset + most]}
            if offset == 0:
                named["layout"] = self.layout
            tensors = [
                TensorDescriptor.model_validate({"role": role, "dtype": "u8", "shape": (len(one),), "nbytes": len(one)})
                for role, one in named.items()
            ]
            header = Adapter(
                session=welcome.session,
                epoch=welcome.epoch,
                request=request,
                version=self.digest,
                dtype=self.dtype,
                offset=offset,
                nbytes=len(self.weights),
                tensors=tensors,
            )
            yield header, list(named.values())


class SentVersions:
    """Versions that the newest session has been sent, in the order of messages on its connection."""

    def __init__(self) -> None:
        self._session = b""
        self._sent: dict[bytes, int] = {}
        self._messages = 0

    def lacks(self, version: EncodedAdapter, session: bytes) -> bool:
        """Return whether a version has not been sent in this session."""
        if session != self._session:
            self._sent.clear()
            self._session = session
        return version.digest not in self._sent

    def sent(self, version: EncodedAdapter) -> None:
        """Note that all pieces of a version were sent."""
        self._sent[version.digest] = self.next_message()
        if len(self._sent) > MAX_KEPT:
            del self._sent[next(iter(self._sent))]

    def next_message(self) -> int:
        """Return the number of a message that is sent now."""
        self._messages += 1
        return self._messages

    def unknown(self, version: EncodedAdapter, message: int) -> None:
        """Note that the daemon did not know a version when it read a message that names it.

        Nothing changes if the version was sent again after that message.
        """
        if self._sent.get(version.digest, message) < message:
            del self._sent[version.digest]
