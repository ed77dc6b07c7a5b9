"""What the engine raises, and what its end means, in the form in which an agent tells its clients.

EngineError (of the engine)
├── RequestError       400: the engine refuses the request
├── EngineDied         503: the engine process is gone; another agent may still answer
├── ShuttingDown       503: cut off because the agent is being shut down
└── InternalError      500: the engine failed at this one request
"""

from __future__ import annotations

from ..engine.errors import EngineError, RequestError
from . import errors
from .errors import ErrorResponse, error_body


class EngineDied(EngineError):
    """The engine process is gone; nothing can be computed any more."""


class ShuttingDown(EngineError):
    """The request was cut off because the server is being shut down."""


class InternalError(EngineError):
    """The engine failed at this request; the other requests go on."""


def described(error: Exception) -> tuple[int, ErrorResponse]:
    """(HTTP status, body) of anything that went wrong with a request, in the engine or before it."""
    text = str(error)
    match error:
        case RequestError():
            return 400, error_body(text, "invalid_request_error", param=error.field)
        case InternalError():
            return 500, error_body(text, "server_error", code="internal_error")
        case ShuttingDown():
            return 503, error_body(text, "service_unavailable_error", code="server_shutdown")
        case EngineError():
            return 503, error_body(text, "server_error", code="engine_failed")
        case _:
            return errors.described(error)
