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
from aiohttp.typedefs import Middleware

from . import errors
from .errors import BadRequest, ErrorResponse, Unavailable

log = logging.getLogger("blockyard.agent")

MAX_REQUEST_ID = 128
CLIENT_GONE = 499  # in the log only, as nginx does
_QUIET = ("/status", "/prefixes", "/healthz", "/readyz", "/metrics")  # polled all the time, not logged

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Described = Callable[[Exception], tuple[int, ErrorResponse]]


def _answer(error: Exception, described: Described) -> web.Response:
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


def envelope(described: Described = errors.described) -> Middleware:
    """The middleware. ``described`` says how each kind of exception is answered."""

    @web.middleware
    async def around(request: web.Request, handler: Handler) -> web.StreamResponse:
        request["id"] = request_id(request)
        begin = time.monotonic()
        status = CLIENT_GONE
        try:
            response = await _guarded(request, handler, described)
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

    return around


async def _guarded(request: web.Request, handler: Handler, described: Described) -> web.StreamResponse:
    try:
        response = await handler(request)
    except (asyncio.CancelledError, ConnectionError):
        raise  # the client went away: there is nobody to answer
    except web.HTTPException as error:
        response = _answer(_refusal(request, error), described)
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
    except web.RequestPayloadError as error:
        response = _answer(BadRequest(f"the body cannot be decoded: {error}", code="invalid_body"), described)
    except Exception as error:
        if described(error)[0] == 500:
            log.exception("request %s failed", request["id"])
        response = _answer(error, described)
    if not response.prepared:
        response.headers["x-request-id"] = request["id"]
    return response


def _refusal(request: web.Request, error: web.HTTPException) -> BadRequest:
    """What aiohttp itself refuses, in our words."""
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return BadRequest(
            f"the body is too large: {error.text}. Send less, or raise the server's max_body_bytes",
            code="body_too_large",
            status=413,
        )
    path = ascii(request.raw_path)[1:-1][:200]
    return BadRequest(
        f"{request.method} {path}: {error.reason}; /openapi.json says what there is", status=error.status
    )
