"""Errors in the form of OpenAI's API, with their status codes. Imports no torch."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from zsl import errors
from zsl.errors import DataError, ZslError

_TRY_AGAIN = (
    errors.ConnectionLost,
    errors.DeadlineError,
    errors.DrainingError,
    errors.LoadingError,
    errors.OverloadedError,
    errors.QuotaError,
    errors.RequestTimeout,
    errors.TrunkUnreachable,
)


class ApiError(ZslError):
    """A request is refused or has failed: the answer to its client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """Return the answer's body."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def invalid_request(error: ValidationError) -> ApiError:
    """Return the answer to a request that does not follow its schema."""
    problem = error.errors(include_url=False, include_input=False)[0]
    context = problem.get("ctx", {})
    place = ".".join(map(str, problem["loc"]))
    name = context.get("field") or next(iter(map(str, problem["loc"])), None)
    text = problem["msg"] if "field" in context or not place else f"{place}: {problem['msg']}"
    codes = {"unsupported": "unsupported_parameter", "unknown": "unknown_parameter"}
    return ApiError(400, text, param=name, code=codes.get(problem["type"]))


def as_api_error(error: Exception) -> ApiError:
    """Return the answer to a request that has failed. It says nothing of errors that are not zsl's own."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, DataError):
        return ApiError(400, str(error))
    if isinstance(error, _TRY_AGAIN):
        return ApiError(503, str(error), kind="server_error", code="trunk_unavailable")
    text = str(error) if isinstance(error, ZslError) else "the generation has failed; the server's log says more"
    return ApiError(500, text, kind="server_error")
