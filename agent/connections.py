"""Connections of an agent's or a gateway's HTTP server: aiohttp's, with two cases handled differently.

A *malformed request* (2,000 headers, Content-Length with Transfer-Encoding, not HTTP at all) is the peer's
fault. aiohttp logs a traceback at ERROR for it, so anybody could flood the log. Here it is counted, told in
one line at INFO, of which there are few a second, and answered with a 400 in OpenAI's error shape.

A *half-closed connection*: a client may send its request and shut down its sending side, as ``nc -N`` does.
To the server that looks like a client that has closed the connection altogether, and aiohttp drops the
request. Here the request goes on, and an interim response is sent as a probe (100 Continue, which every
HTTP/1.1 client has to accept at any time, RFC 9110 section 15.2). The system of a client that is really
gone answers the probe with a reset, which ends the request as before. asyncio does not read any more from a
connection that has ended, and so does not see the reset: the socket is asked for it now and then.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from typing import Any

from aiohttp import HttpVersion11, StreamReader, web
from aiohttp.http_exceptions import HttpProcessingError

from .errors import error_body

log = logging.getLogger("blockyard.agent")

LINES_PER_SECOND = 5.0
LONGEST_REASON = 200  # characters
FIRST_LOOK, LONGEST_LOOK = 0.02, 1.0  # seconds between two looks for a reset; doubling
PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Runner(web.AppRunner):
    """Serves an application. ``malformed`` is called for each request that is none."""

    def __init__(
        self, app: web.Application, malformed: Callable[[], None], *, shutdown_timeout: float
    ) -> None:
        super().__init__(app, handler_cancellation=True, access_log=None, shutdown_timeout=shutdown_timeout)
        self._refusals = _Refusals(malformed)

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        server = _Server.__new__(_Server)
        server.__dict__.update(made.__dict__)
        server.refusals = self._refusals
        return server


class _Server(web.Server):
    """aiohttp's, but for the class of its connections."""

    refusals: _Refusals

    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(web.RequestHandler):
    __slots__ = ("_newest",)

    def __init__(self, manager: web.Server, **options: Any) -> None:
        super().__init__(manager, **options)
        self._newest: tuple[Any, StreamReader] | None = None  # head and body of the last request that came

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._messages:
            self._newest = self._messages[-1]

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio's protocol, which aiohttp narrows
        """The client sends no more. True keeps the connection open, for what it has asked for completely."""
        waits_for_a_request = self._waiter is not None and not self._messages
        if self._newest is None or waits_for_a_request or not self._newest[1].is_eof():
            return False
        # In the middle of an answer there can be no probe, and it is rather a client that leaves.
        if self._current_request is not None and self._current_request.writer.output_size > 0:
            return False
        if not self._messages or self._current_request is None:
            self.close()  # after the answer; with several requests on their way, after a while
        version = getattr(self._newest[0], "version", HttpVersion11)
        if self.transport is not None and version >= HttpVersion11:
            self.transport.write(PROBE)
            self._loop.call_later(FIRST_LOOK, self._look_for_reset, FIRST_LOOK)
        return True

    def _look_for_reset(self, pause: float) -> None:
        """End the connection if its other end has reset it."""
        if self.transport is None or self.transport.is_closing():
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
            return
        pause = min(2 * pause, LONGEST_LOOK)
        self._loop.call_later(pause, self._look_for_reset, pause)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        manager = self._manager
        if not isinstance(exc, HttpProcessingError) or not isinstance(manager, _Server):
            return super().handle_error(request, status, exc, message)
        reason = ascii(exc.message.strip().partition("\n")[0])[1:-1][:LONGEST_REASON]
        manager.refusals.take(request.remote or "", reason)
        body = error_body(f"the request is malformed: {reason}", "invalid_request_error", code="bad_request")
        response = web.Response(status=status, text=body.model_dump_json(), content_type="application/json")
        response.force_close()
        return response


class _Refusals:
    """Counts malformed requests and tells of some of them."""

    def __init__(self, count: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._count = count
        self._clock = clock
        self._lines = LINES_PER_SECOND  # that may be written now
        self._at = clock()
        self._untold = 0

    def take(self, peer: str, reason: str) -> None:
        self._count()
        now = self._clock()
        self._lines = min(LINES_PER_SECOND, self._lines + (now - self._at) * LINES_PER_SECOND)
        self._at = now
        if self._lines < 1:
            self._untold += 1
            return
        self._lines -= 1
        more = f" ({self._untold} more were not told)" if self._untold else ""
        self._untold = 0
        log.info("malformed request peer=%s: %s%s", peer, reason, more)
