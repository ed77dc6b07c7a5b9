"""Around every request: an id, errors in OpenAI's shape, one line in the log.

Handlers raise what is wrong; the one place that turns exceptions into answers is here, so that no path
can answer a client's mistake with a 5xx or in a shape of its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable

from aiohttp import web

from ..engine.errors import EngineError, RequestError
from .engine_client import InternalError, ShuttingDown
from .openai_api import BadRequest, ErrorResponse, error_body

log = logging.getLogger("blockyard.agent")

MAX_REQUEST_ID = 128
CLIENT_GONE = 499  # in the log only, as nginx does
_QUIET = ("/status", "/prefixes", "/healthz", "/readyz", "/metrics")  # asked all the time by machines

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Unavailable(Exception):
    """The request is fine, but it cannot be served now."""

    def __init__(self, message: str, *, status: int, code: str, retry_after: int) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after


def described(error: Exception) -> tuple[int, ErrorResponse]:
    """(HTTP status, body) of anything that went wrong with a request."""
    text = str(error)
    match error:
        case BadRequest():
            return error.status, error_body(text, "invalid_request_error", param=error.param, code=error.code)
        case RequestError():
            return 400, error_body(text, "invalid_request_error", param=error.field)
        case Unavailable():
            kind = "rate_limit_error" if error.status == 429 else "service_unavailable_error"
            return error.status, error_body(text, kind, code=error.code)
        case InternalError():
            return 500, error_body(text, "server_error", code="internal_error")
        case ShuttingDown():
            return 503, error_body(text, "service_unavailable_error", code="server_shutdown")
        case EngineError():
            return 503, error_body(text, "server_error", code="engine_failed")
        case _:
            return 500, error_body("internal error; the server's log has the details", "server_error")


def _answer(error: Exception) -> web.Response:
    status, body = described(error)
    response = web.Response(status=status, text=body.model_dump_json(), content_type="application/json")
    if isinstance(error, Unavailable):
        response.headers["Retry-After"] = str(error.retry_after)
    elif status == 503:
        response.headers["Retry-After"] = "5"
    return response


def request_id(request: web.Request) -> str:
    """The client's own id if it can be sent back as it is, else a new one."""
    given = request.headers.get("x-request-id", "")
    if 0 < len(given) <= MAX_REQUEST_ID and given.isascii() and given.isprintable():
        return given
    return uuid.uuid4().hex


async def read_body(request: web.Request, seconds: float) -> bytes:
    """The whole body. BadRequest if it does not come within ``seconds``, the setting client_timeout."""
    try:
        async with asyncio.timeout(seconds):
            return await request.read()
    except TimeoutError:
        raise BadRequest(
            f"the body did not arrive within {seconds:g} seconds (client_timeout); send it faster",
            code="body_timeout",
            status=408,
        ) from None


@web.middleware
async def envelope(request: web.Request, handler: Handler) -> web.StreamResponse:
    request["id"] = request_id(request)
    begin = time.monotonic()
    status = CLIENT_GONE
    try:
        response = await _guarded(request, handler)
        status = response.status
        return response
    finally:
        if request.path not in _QUIET:
            log.info(
                "request method=%s path=%.100s status=%d ms=%.0f id=%s",
                request.method,
                request.raw_path,
                status,
                1e3 * (time.monotonic() - begin),
                request["id"],
            )


async def _guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        response = await handler(request)
    except (asyncio.CancelledError, ConnectionError):
        raise  # the client went away: nobody is left to tell
    except web.HTTPRequestEntityTooLarge as error:
        response = _answer(
            BadRequest(
                f"the body is too large: {error.text}. Send less, or raise the server's max_body_bytes",
                code="body_too_large",
                status=413,
            )
        )
    except web.HTTPException as error:
        path = ascii(request.raw_path)[1:-1][:200]
        text = f"{request.method} {path}: {error.reason}; /openapi.json says what there is"
        response = _answer(BadRequest(text, status=error.status))
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
    except web.RequestPayloadError as error:
        response = _answer(BadRequest(f"the body cannot be decoded: {error}", code="invalid_body"))
    except Exception as error:
        if described(error)[0] == 500:
            log.exception("request %s failed", request["id"])
        response = _answer(error)
    if not response.prepared:
        response.headers["x-request-id"] = request["id"]
    return response
