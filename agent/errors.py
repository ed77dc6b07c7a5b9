"""What goes wrong in an agent or a gateway, and how clients are told: in OpenAI's error shape.

SettingsError      a setting cannot work; the process prints it and exits
BadRequest         the client's mistake: 4xx, with the field, the limit and the remedy
Unavailable        the request is fine and cannot be served now: 429, 503 or 504, with Retry-After

Errors of the engine are in ``engine_errors``, because a gateway has no engine.
"""

from __future__ import annotations

from pydantic import BaseModel


class SettingsError(Exception):
    """A setting of this process cannot work; the message names the setting and what to change."""


class BadRequest(Exception):
    """A request that is answered with a 4xx in OpenAI's error shape."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class Unavailable(Exception):
    """The request is fine, but it cannot be served now."""

    def __init__(self, message: str, *, status: int, code: str, retry_after: int) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorBody


def error_body(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> ErrorResponse:
    return ErrorResponse(error=ErrorBody(message=message, type=kind, param=param, code=code))


def described(error: Exception) -> tuple[int, ErrorResponse]:
    """(HTTP status, body) of anything that went wrong with a request."""
    text = str(error)
    match error:
        case BadRequest():
            return error.status, error_body(text, "invalid_request_error", param=error.param, code=error.code)
        case Unavailable():
            kind = "rate_limit_error" if error.status == 429 else "service_unavailable_error"
            return error.status, error_body(text, kind, code=error.code)
        case _:
            return 500, error_body("internal error; the server's log has the details", "server_error")
