"""Exception classes of zsl, with their wire codes, retry advice and exit codes.

Every error that zsl raises on purpose is a `ZslError`. Errors of other libraries are mapped to this tree where they
enter. This module imports nothing else of zsl.
"""

from __future__ import annotations

from enum import StrEnum

EXIT_RUN_FAILED = 1
EXIT_USAGE = 2
EXIT_STARTUP_FAILED = 3


class Retry(StrEnum):
    """Retry advice in an ERROR message."""

    NEVER = "never"  # the same request will fail again
    SAME = "same"  # send the same request again, after `retry_after_ms`
    REPLAY = "replay"  # send the request again with everything that it needs
    REHELLO = "rehello"  # open a new session first, then replay
    ELSEWHERE = "elsewhere"  # this daemon is going away


class ZslError(Exception):
    """Base class of all zsl errors. The text says what happened, where, and what to do."""

    exit_code = EXIT_RUN_FAILED


class ConfigError(ZslError, ValueError):
    """A configuration file, an option or an argument is wrong. Nothing was started."""

    exit_code = EXIT_USAGE


class ModelError(ZslError, ValueError):
    """A model reference cannot be loaded, or the model cannot be split."""

    exit_code = EXIT_STARTUP_FAILED


class DataError(ZslError, ValueError):
    """A data set cannot be used."""

    exit_code = EXIT_STARTUP_FAILED


class StartupError(ZslError):
    """A process could not start: a port in use, a missing device."""

    exit_code = EXIT_STARTUP_FAILED


class RunFailed(ZslError):
    """A run failed after its start. Completed work is kept."""


class ClosedError(ZslError, RuntimeError):
    """A client was used after it was closed, or in another process than the one that made it."""


class ChangedError(ZslError, RuntimeError):
    """A tensor that a backward needs was modified in place after the forward."""


class PaddingGradientError(ZslError, ValueError):
    """The loss depends on padded positions, which did not cross to the trunk. Leave them out of the loss, as labels of
    -100 do, or let padding cross: RemoteTrunk(padding="send"), trunk.padding = "send"."""

    def __init__(self) -> None:
        super().__init__(" ".join(str(type(self).__doc__).split()))


class TrunkUnreachable(ZslError, ConnectionError):
    """No daemon answered at the endpoint within the connect timeout."""

    exit_code = EXIT_STARTUP_FAILED


class ConnectionLost(ZslError, ConnectionError):
    """The connection was lost, and replays got no answer."""


class TrunkAuthError(ZslError, PermissionError):
    """Client and daemon do not accept each other's keys."""

    exit_code = EXIT_STARTUP_FAILED


class RequestTimeout(ZslError, TimeoutError):
    """No answer came within the request's time budget."""


class WireError(ZslError):
    """Base class of errors that the daemon sends in an ERROR message and the client raises.

    `code` is the name on the wire, `retry` the advice to the sender of the request. `request` and `session` are the ids
    of the failed request and its session, if known.
    """

    code = "INTERNAL"
    retry = Retry.NEVER
    request: int | None = None
    session: bytes | None = None

    def __init__(self, text: str = "", *, retry_after_ms: int = 0) -> None:
        super().__init__(text or type(self).__doc__)
        self.retry_after_ms = retry_after_ms


class InternalError(WireError):
    """The daemon failed while it worked on this request."""


class ProtocolVersionError(WireError):
    """Client and daemon speak different versions of the protocol."""

    code = "PROTO_VERSION"
    exit_code = EXIT_STARTUP_FAILED


class MalformedError(WireError, ValueError):
    """A message does not follow the protocol."""

    code = "MALFORMED"


class CorruptError(WireError, ValueError):
    """A message was damaged in transit: its checksum does not match its bytes."""

    code = "CORRUPT"
    retry = Retry.SAME


class TooLargeError(WireError, ValueError):
    """A message exceeds a limit of the WELCOME."""

    code = "TOO_LARGE"


class BadShapeError(WireError, ValueError):
    """A tensor has a shape that this trunk does not accept."""

    code = "BAD_SHAPE"


class BadDtypeError(WireError, ValueError):
    """A tensor has a dtype that this trunk does not accept."""

    code = "BAD_DTYPE"


class NonFiniteError(WireError, ValueError):
    """Activations contain values that are not finite."""

    code = "NONFINITE"


class ForbiddenError(WireError, PermissionError):
    """The key is not on the daemon's list of tenants."""

    code = "FORBIDDEN"
    exit_code = EXIT_STARTUP_FAILED


class QuotaError(WireError):
    """The tenant, or all tenants together, have the maximum number of sessions."""

    code = "QUOTA"
    retry = Retry.SAME
    exit_code = EXIT_STARTUP_FAILED


class WrongModelError(WireError):
    """The daemon serves another model, other weights or another cut."""

    code = "WRONG_MODEL"
    exit_code = EXIT_STARTUP_FAILED


class ForwardOnlyError(WireError):
    """A backward was sent to a daemon that serves forward only."""

    code = "FORWARD_ONLY"


class NotRevealedError(WireError):
    """The daemon does not reveal this tensor from inside the trunk. Its owner can, with --reveal."""

    code = "NOT_REVEALED"


class UnknownSessionError(WireError):
    """The session is unknown to the daemon, or its lease has expired."""

    code = "UNKNOWN_SESSION"
    retry = Retry.REHELLO


class StaleEpochError(WireError):
    """The message was meant for an earlier process of the daemon."""

    code = "STALE_EPOCH"
    retry = Retry.REHELLO


class UnknownStepError(WireError):
    """The daemon no longer holds the activations or graph that this backward needs."""

    code = "UNKNOWN_STEP"
    retry = Retry.REPLAY


class AdapterError(WireError, ValueError):
    """An adapter does not fit the trunk: an unknown module, another shape, a rank or a size over the limit."""

    code = "BAD_ADAPTER"


class UnknownAdapterError(WireError):
    """The daemon does not hold this version of the session's adapter."""

    code = "UNKNOWN_ADAPTER"
    retry = Retry.REPLAY


class UnknownSumError(WireError):
    """The daemon does not hold the sum of adapter gradients that this backward is to be added to."""

    code = "UNKNOWN_SUM"


class UnknownCacheError(WireError):
    """The daemon does not hold these keys and values, or not in this version: send all of the trunk's inputs again."""

    code = "UNKNOWN_CACHE"


class OverloadedError(WireError):
    """The session has too many requests or bytes in flight."""

    code = "OVERLOADED"
    retry = Retry.SAME


class DeadlineError(WireError, TimeoutError):
    """The request's time budget ran out before the daemon computed it."""

    code = "DEADLINE"


class CancelledByClientError(WireError):
    """The request was cancelled by its client."""

    code = "CANCELLED"


class DrainingError(WireError):
    """The daemon is shutting down and accepts no new forward."""

    code = "DRAINING"
    retry = Retry.ELSEWHERE


class LoadingError(WireError):
    """The daemon is still loading its model."""

    code = "LOADING"
    retry = Retry.SAME
    exit_code = EXIT_STARTUP_FAILED


class OutOfMemoryError(WireError):
    """The daemon's device has too little memory for this request."""

    code = "OOM"


WIRE_ERRORS: dict[str, type[WireError]] = {
    cls.code: cls
    for cls in (
        InternalError,
        ProtocolVersionError,
        MalformedError,
        CorruptError,
        TooLargeError,
        BadShapeError,
        BadDtypeError,
        NonFiniteError,
        ForbiddenError,
        QuotaError,
        WrongModelError,
        ForwardOnlyError,
        NotRevealedError,
        UnknownSessionError,
        StaleEpochError,
        UnknownStepError,
        AdapterError,
        UnknownAdapterError,
        UnknownSumError,
        UnknownCacheError,
        OverloadedError,
        DeadlineError,
        CancelledByClientError,
        DrainingError,
        LoadingError,
        OutOfMemoryError,
    )
}
