"""One closed tree of errors.

Every error that zsl raises on purpose is a `ZslError`. It knows the code that it has on the wire (if it can
travel), whether trying again can help, and the exit code of a command that ends with it. Foreign errors are
mapped to this tree where they enter. This module knows nothing else of zsl.
"""

from __future__ import annotations

from enum import StrEnum

EXIT_RUN_FAILED = 1
EXIT_USAGE = 2
EXIT_STARTUP_FAILED = 3


class Retry(StrEnum):
    """What a client can do about an ERROR, as the message itself says it."""

    NEVER = "never"  # the same request will fail again
    SAME = "same"  # send the same request again, after `retry_after_ms`
    REPLAY = "replay"  # send the request again with everything that it needs
    REHELLO = "rehello"  # open a new session first, then replay
    ELSEWHERE = "elsewhere"  # this daemon is going away


class ZslError(Exception):
    """Base of all errors of zsl. The text says what happened, where, and what to do."""

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
    """A process could not start: a port in use, a device that is not there."""

    exit_code = EXIT_STARTUP_FAILED


class RunFailed(ZslError):
    """A run that had started could not go on. What was done until then is kept."""


class ClosedError(ZslError, RuntimeError):
    """A client was used after it was closed, or in a process that it was not made in."""


class ChangedError(ZslError, RuntimeError):
    """A tensor that a backward needs was written since the forward."""


class PaddingGradientError(ZslError, ValueError):
    """The loss depends on padded positions, which did not cross to the trunk. Leave them out of the loss, as labels of
    -100 do, or let padding cross: RemoteTrunk(padding="send"), trunk.padding = "send"."""

    def __init__(self) -> None:
        super().__init__(" ".join(str(type(self).__doc__).split()))


class TrunkUnreachable(ZslError, ConnectionError):
    """No daemon answered at the endpoint within the connect timeout."""

    exit_code = EXIT_STARTUP_FAILED


class ConnectionLost(ZslError, ConnectionError):
    """The connection broke, and replays did not bring an answer."""


class TrunkAuthError(ZslError, PermissionError):
    """The two ends do not accept each other's keys."""

    exit_code = EXIT_STARTUP_FAILED


class RequestTimeout(ZslError, TimeoutError):
    """No answer came within the request's time budget."""


class WireError(ZslError):
    """An error that travels: the daemon answers with it, the client raises it.

    `code` is the name on the wire, `retry` what the sender of the request can do, `request` the id of the
    request that it answers, `session` that of its session, where they are known.
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
    """The two ends speak different versions of the protocol."""

    code = "PROTO_VERSION"
    exit_code = EXIT_STARTUP_FAILED


class MalformedError(WireError, ValueError):
    """A message is not of the protocol's form."""

    code = "MALFORMED"


class CorruptError(WireError, ValueError):
    """A message was damaged on its way: its checksum is not that of what came."""

    code = "CORRUPT"
    retry = Retry.SAME


class TooLargeError(WireError, ValueError):
    """A message is over one of the limits that WELCOME states."""

    code = "TOO_LARGE"


class BadShapeError(WireError, ValueError):
    """A tensor does not have the shape that this trunk takes."""

    code = "BAD_SHAPE"


class BadDtypeError(WireError, ValueError):
    """A tensor does not have a dtype that this trunk takes."""

    code = "BAD_DTYPE"


class NonFiniteError(WireError, ValueError):
    """Activations have values that are not finite."""

    code = "NONFINITE"


class ForbiddenError(WireError, PermissionError):
    """The key is not on the daemon's list of tenants."""

    code = "FORBIDDEN"
    exit_code = EXIT_STARTUP_FAILED


class QuotaError(WireError):
    """The tenant, or all together, have as many sessions as they may."""

    code = "QUOTA"
    retry = Retry.SAME
    exit_code = EXIT_STARTUP_FAILED


class WrongModelError(WireError):
    """The daemon serves another model, other weights or another cut."""

    code = "WRONG_MODEL"
    exit_code = EXIT_STARTUP_FAILED


class ForwardOnlyError(WireError):
    """A backward was asked of a daemon that serves forward only."""

    code = "FORWARD_ONLY"


class UnknownSessionError(WireError):
    """The daemon does not know this session, or its lease has ended."""

    code = "UNKNOWN_SESSION"
    retry = Retry.REHELLO


class StaleEpochError(WireError):
    """The message was meant for an earlier life of the daemon."""

    code = "STALE_EPOCH"
    retry = Retry.REHELLO


class UnknownStepError(WireError):
    """The daemon no longer holds what this backward needs."""

    code = "UNKNOWN_STEP"
    retry = Retry.REPLAY


class OverloadedError(WireError):
    """The session has too many requests or bytes in flight."""

    code = "OVERLOADED"
    retry = Retry.SAME


class DeadlineError(WireError, TimeoutError):
    """The request's time budget ran out before the daemon came to it."""

    code = "DEADLINE"


class CancelledByClientError(WireError):
    """The request was cancelled by its client."""

    code = "CANCELLED"


class DrainingError(WireError):
    """The daemon is shutting down and takes no new forward."""

    code = "DRAINING"
    retry = Retry.ELSEWHERE


class LoadingError(WireError):
    """The daemon is still loading its model."""

    code = "LOADING"
    retry = Retry.SAME
    exit_code = EXIT_STARTUP_FAILED


class OutOfMemoryError(WireError):
    """The daemon's device has no memory left for this request."""

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
        UnknownSessionError,
        StaleEpochError,
        UnknownStepError,
        OverloadedError,
        DeadlineError,
        CancelledByClientError,
        DrainingError,
        LoadingError,
        OutOfMemoryError,
    )
}
