"""The gateway: a stateless HTTP server that holds the clients' connections and picks the agents.

A request is sent to the agent that ``routing`` puts first. A request that has produced no token is repeated
at another agent; a stream that has is replayed there and goes on where it was (``replay``), so that a client
does not notice when an agent is killed, drained or cut off. Gateways share no state: each sees the agents as
they report themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import aiohttp
from aiohttp import web

from ..bearer import Tokens, bearer
from ..connections import Runner
from ..envelope import CLIENT_GONE, Handler, envelope, read_body
from ..errors import BadRequest, SettingsError, Unavailable, described
from ..prefix_sketch import Prefix
from .dispatch import Dispatch, Failure, Pick
from .fleet_view import FleetView
from .metrics import GatewayMetrics
from .replay import DONE, AgentFailed, BrokenStream, Diverged, Ledger
from .request import Ask
from .settings import GatewaySettings
from .tenants import MAX_TENANT, Keys, LimitReached, Limits
from .upstream import Answer, Attempt, TookTooLong

log = logging.getLogger("blockyard.gateway")

SEND_BUFFER = 1 << 16  # bytes the kernel buffers for a client; few, so that a stalled client is noticed soon
KEEP_ALIVE = 15.0  # seconds an unused connection to an agent is kept; agents keep theirs longer
EXIT_DELAY = 1.0  # seconds in which answers that were cut off are still sent


class Gateway:
    """One gateway: settings, the fleet it sees, and the handlers over it. Use as an async context manager."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self.metrics = GatewayMetrics(self._count_agents)
        self.stopping = False
        self.open: set[asyncio.Task[Any]] = set()  # requests being served
        self.drained = asyncio.Event()  # stopping, and nothing is open
        self._cut_off = ""  # why requests are being ended
        self._had_agents = -math.inf  # when an agent was last ready
        self._keys = None if settings.keys_dir is None else Keys(settings.keys_dir)
        self._tokens = Tokens(settings.token, settings.token_dir)
        self._limits = Limits(settings.requests_per_minute, settings.concurrent_requests)
        self._endpoints = settings.endpoints()
        self._fleet: FleetView | None = None
        self._session: aiohttp.ClientSession | None = None
        self.app = web.Application(
            middlewares=[self._counted, envelope()], client_max_size=settings.max_body_bytes
        )
        routes: list[tuple[str, str, Handler]] = [
            ("POST", "/v1/chat/completions", self.complete),
            ("POST", "/v1/completions", self.complete),
            ("POST", "/tokenize", self.forward),
            ("GET", "/v1/models", self.forward),
            ("GET", "/status", self.status),
            ("GET", "/healthz", self.healthz),
            ("GET", "/readyz", self.readyz),
            ("GET", "/metrics", self.prometheus),
        ]
        self._paths = {path for _, path, _ in routes}
        for method, path, handler in routes:
            self.app.router.add_route(method, path, handler)
        self.app.cleanup_ctx.append(self._running)

    async def _running(self, _app: web.Application) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE)
        async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session:
            self._session = session
            self._fleet = FleetView(self._endpoints, session, self._tokens)
            following = asyncio.create_task(self._fleet.run())
            yield
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    @property
    def fleet(self) -> FleetView:
        assert self._fleet is not None
        return self._fleet

    def _count_agents(self) -> dict[str, int]:
        return {"known": len(self.fleet.agents()), "ready": self.fleet.ready()}

    # ── Health, status, metrics ───────────────────────────────────────────────────────────────────

    async def healthz(self, _request: web.Request) -> web.Response:
        return web.json_response({"state": "stopping" if self.stopping else "running"})

    async def readyz(self, _request: web.Request) -> web.Response:
        """Ready while at least one agent is, and as long afterwards as a request would wait for one.

        Otherwise a Service would send clients to no gateway while the only agent is replaced, and they would
        be refused instead of held.
        """
        agents, now = self.fleet.ready(), time.monotonic()
        if agents:
            self._had_agents = now
        holds = now - self._had_agents < self.settings.patience
        ready = not self.stopping and (agents > 0 or holds or self.settings.ready_without_agents)
        return web.json_response({"ready": ready, "ready_agents": agents}, status=200 if ready else 503)

    async def status(self, request: web.Request) -> web.Response:
        """The agents as this gateway sees them."""
        if not self._tokens.accept(request):
            raise BadRequest(
                "/status needs the gateway's own token as Authorization: Bearer",
                code="invalid_token",
                status=401,
            )
        return web.json_response(
            {"stopping": self.stopping, "open_requests": len(self.open), "agents": self.fleet.described()}
        )

    async def prometheus(self, _request: web.Request) -> web.Response:
        content_type = "text/plain; version=0.0.4; charset=utf-8"
        return web.Response(body=self.metrics.render(), headers={"Content-Type": content_type})

    # ── Around every request ──────────────────────────────────────────────────────────────────────

    @web.middleware
    async def _counted(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        code = CLIENT_GONE
        try:
            response = await handler(request)
            code = response.status
            if self.stopping:
                response.force_close()  # the next request goes to another gateway
            return response
        finally:
            path = request.path if request.path in self._paths else "other"
            self.metrics.requests.labels(path, str(code)).inc()

    def _tenant(self, request: web.Request) -> str:
        """Whose request it is: by its API key, or what it says itself if there are no keys."""
        if self._keys is None:
            return request.headers.get("x-tenant", "")[: MAX_TENANT + 1]  # agents refuse what is too long
        tenant = self._keys.tenant(bearer(request))
        if tenant is None:
            raise BadRequest(
                "no valid API key; send one as Authorization: Bearer", code="invalid_api_key", status=401
            )
        return tenant

    @contextlib.asynccontextmanager
    async def _serving(self, tenant: str) -> AsyncIterator[None]:
        """Count the tenant's request as open: within its limits, and cancelled when the gateway must stop."""
        task = asyncio.current_task()
        assert task is not None
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._limits.request(tenant))
            except LimitReached as error:
                label = tenant if self._keys is not None else ""  # nobody has checked the name
                self.metrics.refusals.labels(label, error.reason).inc()
                raise Unavailable(
                    str(error), status=429, code="rate_limit_exceeded", retry_after=error.retry_after
                ) from None
            self.open.add(task)
            try:
                yield
            except asyncio.CancelledError:
                raise self.why_cancelled() from None
            finally:
                self.open.discard(task)
                if self.stopping and not self.open:
                    self.drained.set()

    def why_cancelled(self) -> BaseException:
        """What to raise in a request that was cancelled: CancelledError if the client has gone, else an error
        that says why the gateway ends it.
        """
        if not self._cut_off:
            return asyncio.CancelledError()
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
        return Unavailable(
            f"the gateway was shut down before the answer was there ({self._cut_off}); ask again",
            status=503,
            code="server_shutdown",
            retry_after=1,
        )

    def stop(self) -> None:
        """Stop being ready; ``drained`` is set once no request is open."""
        self.stopping = True
        if not self.open:
            self.drained.set()

    def cut_off(self, why: str) -> None:
        """End the requests that are left, each with an error that says why."""
        if self.open:
            log.warning("%s; %d requests are cut off", why, len(self.open))
        self._cut_off = why
        for task in self.open:
            task.cancel()

    def headers_for(self, request: web.Request, tenant: str) -> dict[str, str]:
        return {"x-request-id": request["id"], "x-tenant": tenant, "Content-Type": "application/json"}

    def dispatch(self, request: web.Request, prefix: Prefix) -> Dispatch:
        return Dispatch(
            self.fleet,
            self.metrics,
            prefix,
            request_id=request["id"],
            max_attempts=self.settings.max_attempts,
            patience=self.settings.patience,
        )

    def attempt(self, pick: Pick, deadline: float) -> Attempt:
        assert self._session is not None
        return Attempt(self._session, pick, deadline, self.metrics, self._tokens)

    def deadline(self) -> float:
        return asyncio.get_running_loop().time() + self.settings.request_timeout

    # ── Requests ──────────────────────────────────────────────────────────────────────────────────

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """A request that any agent can answer."""
        tenant = self._tenant(request)
        if request.method == "GET":
            return await self._whole(request, None, Prefix(), tenant)
        async with self._serving(tenant):
            return await self._whole(
                request, await read_body(request, self.settings.client_timeout), Prefix(), tenant
            )

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """A completion, streaming or not."""
        tenant = self._tenant(request)
        async with self._serving(tenant):
            ask = Ask.of(await read_body(request, self.settings.client_timeout), tenant)
            if ask.stream:
                return await _Stream(self, request, ask, tenant).serve()
            return await self._whole(request, ask.body, ask.prefix, tenant)

    async def _whole(
        self, request: web.Request, body: bytes | None, prefix: Prefix, tenant: str
    ) -> web.StreamResponse:
        """An answer that is sent to the client as a whole, so that it can be repeated until then."""
        dispatch, deadline = self.dispatch(request, prefix), self.deadline()
        headers = self.headers_for(request, tenant)
        while True:
            pick = await dispatch.next()
            try:
                async with self.attempt(pick, deadline) as attempt:
                    await attempt.send(request.method, request.path, body, headers)
                    return _passed_on(await attempt.whole(), pick)
            except Failure as failure:
                dispatch.failed(pick, failure)
            except TookTooLong:
                raise self.too_long() from None

    def too_long(self) -> Unavailable:
        return Unavailable(
            f"there was no answer within {self.settings.request_timeout:g} seconds (request_timeout); "
            "ask for fewer tokens",
            status=504,
            code="request_timeout",
            retry_after=5,
        )


class _ClientGone(Exception):
    """The client no longer reads the stream."""


class _Stream:
    """One streaming request: from agent to agent, to one client."""

    def __init__(self, gateway: Gateway, request: web.Request, ask: Ask, tenant: str) -> None:
        self._gateway = gateway
        self._request = request
        self._ask = ask
        self._headers = gateway.headers_for(request, tenant)
        self._ledger = Ledger()
        self._response: web.StreamResponse | None = None
        self._begin = time.monotonic()

    async def serve(self) -> web.StreamResponse:
        """An error before the first event is raised; a later one becomes the last event."""
        try:
            return await self._serve()
        except _ClientGone as gone:
            log.info("client id=%s %s", self._request["id"], gone)
            assert self._response is not None
            return self._response
        except asyncio.CancelledError:
            why = self._gateway.why_cancelled()
            if self._response is None or not isinstance(why, Unavailable):
                raise why from None
            return await self._end_with(why)
        except Exception as error:
            if self._response is None:
                raise
            return await self._end_with(error)

    async def _serve(self) -> web.StreamResponse:
        gateway, request = self._gateway, self._request
        dispatch, deadline = gateway.dispatch(request, self._ask.prefix), gateway.deadline()
        while True:
            pick = await dispatch.next()
            try:
                async with gateway.attempt(pick, deadline) as attempt:
                    await attempt.send("POST", request.path, self._ask.body, self._headers)
                    if attempt.streams:
                        return await self._relay(attempt, pick)
                    answer = await attempt.whole()
                    if self._response is None:
                        return _passed_on(answer, pick)
                    raise _interrupted("replay_refused", f"{pick.name} answers {answer.status} to the replay")
            except Failure as failure:
                dispatch.failed(pick, failure)
                if self._ledger.sent_anything:
                    self._begin_replay(failure)
                self._ledger.rewind()
            except TookTooLong:
                raise gateway.too_long() from None

    def _begin_replay(self, failure: Failure) -> None:
        if not self._ask.replayable:
            self._gateway.metrics.replays.labels("impossible").inc()
            raise _interrupted(
                "agent_lost",
                f"{failure}; several sampled prompts cannot be replayed without a seed. Set seed, or send "
                "them one by one",
            )
        self._gateway.metrics.replays.labels("begun").inc()

    async def _relay(self, attempt: Attempt, pick: Pick) -> web.StreamResponse:
        """Send the client what it does not have yet, until the end. Failure if the agent is lost earlier."""
        async with contextlib.aclosing(attempt.events()) as batches:
            async for batch in batches:
                fresh, ended, problem = self._sift(batch, pick)
                if fresh:
                    await self._write(fresh, pick)
                if problem is not None:
                    raise problem
                if ended:
                    if self._ledger.replaying:
                        self._gateway.metrics.replays.labels("gone_on").inc()
                    assert self._response is not None
                    await attempt.finish()
                    return self._response
        raise Failure("lost", f"{pick.name} ended the stream in the middle")

    def _sift(self, batch: list[bytes], pick: Pick) -> tuple[bytes, bool, Exception | None]:
        """(what is new to the client, whether the stream has ended, what is wrong with what comes next)."""
        fresh = b""
        for data in batch:
            try:
                kept = self._ledger.take(data)
            except AgentFailed as error:
                if error.final:
                    return fresh + _event(data), True, None
                return fresh, False, Failure("lost", f"{pick.name}: {error}")
            except Diverged as error:
                self._gateway.metrics.replays.labels("diverged").inc()
                problem = f"{pick.name} gives another answer than the agent that was lost: {error}"
                return fresh, False, _interrupted("replay_diverged", problem)
            except BrokenStream as error:
                return fresh, False, _interrupted("bad_stream", f"{pick.name} sent {error}")
            if kept:
                fresh += _event(kept)
            if data == DONE:
                return fresh, True, None
        return fresh, False, None

    async def _write(self, data: bytes, pick: Pick) -> None:
        if self._response is None:
            self._response = await self._begin_response(pick)
        limit = self._gateway.settings.client_timeout
        try:
            async with asyncio.timeout(limit):
                await self._response.write(data)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise _ClientGone(f"took no data for {limit:g} s and is dropped") from None
        except ConnectionError as error:
            raise _ClientGone(f"is gone: {error}") from None

    async def _begin_response(self, pick: Pick) -> web.StreamResponse:
        self._gateway.metrics.first_token.observe(time.monotonic() - self._begin)
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
                "x-request-id": self._request["id"],
                **_explained(pick),
            }
        )
        connection = self._request.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if self._gateway.stopping:
            response.force_close()
        await response.prepare(self._request)
        return response

    async def _end_with(self, error: Exception) -> web.StreamResponse:
        """Send the error as the stream's last event."""
        assert self._response is not None
        status, body = described(error)
        if status == 500:
            log.error("request id=%s failed", self._request["id"], exc_info=error)
        else:
            log.warning("stream ended early id=%s: %s", self._request["id"], error)
        await self._response.write(_event(body.model_dump_json().encode()))
        return self._response


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _interrupted(code: str, message: str) -> Unavailable:
    return Unavailable(
        f"the stream was interrupted: {message}. Ask again", status=503, code=code, retry_after=1
    )


def _explained(pick: Pick) -> dict[str, str]:
    """Response headers that name the agent and the reason for choosing it."""
    return {"x-blockyard-agent": pick.name, "x-blockyard-why": pick.why}


def _passed_on(answer: Answer, pick: Pick) -> web.Response:
    return web.Response(
        status=answer.status, body=answer.body, content_type=answer.content_type, headers=_explained(pick)
    )


async def serve(settings: GatewaySettings) -> int:
    """Run a gateway until a signal; returns the process's exit code: 0, or 2 if a setting cannot work.

    SIGTERM and SIGINT stop it: not ready any more, after ``linger`` seconds no new connections, and open
    requests end within ``grace_period``. A second SIGINT does not wait.
    """
    stop, hurry = asyncio.Event(), asyncio.Event()

    def interrupt() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        gateway = Gateway(settings)
        runner = Runner(gateway.app, gateway.metrics.malformed.inc, shutdown_timeout=EXIT_DELAY)
        await runner.setup()
    except SettingsError as error:
        print(f"blockyard gateway: {error}", flush=True, file=sys.stderr)
        return 2
    try:
        site = web.TCPSite(runner, settings.host, settings.port, backlog=1024)
        try:
            await site.start()
        except OSError as error:
            where = f"{settings.host}:{settings.port}"
            print(f"blockyard gateway: cannot listen on {where}: {error}; set host or port", file=sys.stderr)
            return 2
        print(f"blockyard gateway: http://{settings.host}:{runner.addresses[0][1]}", flush=True)
        await stop.wait()
        gateway.stop()
        log.info("stopping open_requests=%d", len(gateway.open))
        await _first_of(hurry.wait(), at_most=settings.linger)
        await site.stop()
        await _first_of(gateway.drained.wait(), hurry.wait(), at_most=settings.grace_period)
        if gateway.open:
            gateway.cut_off(
                "it was told twice"
                if hurry.is_set()
                else f"the grace_period of {settings.grace_period:g} seconds is over"
            )
        return 0
    finally:
        await runner.cleanup()


async def _first_of(*waits: Coroutine[Any, Any, Any], at_most: float) -> None:
    """Until one of them is over, at most ``at_most`` seconds."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=at_most, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
