"""The agent's HTTP server: OpenAI's endpoints, status, health and metrics over one engine process.

This file wires requests to the engine and owns the agent's life: starting, ready, draining, failed. What
a request means is in ``openai_api``, how its answer is put together in ``completion``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web
from pydantic import BaseModel

from ..engine.errors import EngineError, RequestError
from ..engine.model_files import prepare
from ..engine.sampling_params import SamplingParams
from ..engine.tokenizer import Tokenizer
from .completion import ChatShape, Completion, CompletionShape, Piece, Shape
from .engine_client import EngineClient, EngineDied, Generation
from .metrics import Metrics
from .openai_api import (
    BadRequest,
    ChatRequest,
    CompletionRequest,
    ModelCard,
    ModelList,
    Sampling,
    TokenizeRequest,
    TokenizeResponse,
    error_body,
    from_engine,
    parse,
)
from .openapi import document
from .protocol import AgentState, AgentStatus, PrefixStatus, TierStatus
from .settings import AgentSettings

log = logging.getLogger("blockyard.agent")

MAX_STATUS_WAIT = 60.0  # seconds a long poll may last
MAX_TENANT = 128
EXIT_DELAY = 1.0  # seconds for the last errors to reach clients after the engine died
LARGE_TEXT = 1 << 16  # characters above which tokenizing leaves the event loop

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Unavailable(Exception):
    """The request is fine, but it cannot be served now."""

    def __init__(self, message: str, *, status: int, code: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after


class Agent:
    """One agent: settings, the engine client, and the handlers over it."""

    def __init__(self, settings: AgentSettings) -> None:
        self.settings = settings
        self.state: AgentState = "starting"
        self.engine = EngineClient(self._changed)
        self._incarnation = uuid.uuid4().hex
        self._version = 0
        self._snapshot: dict[str, Any] = {}
        self._waiters: set[asyncio.Event] = set()
        self._tokenizer: Tokenizer | None = None
        self._created = int(time.time())
        self.metrics = Metrics(self.status, lambda: self.engine.stats.finished, settings.public_name)
        self.app = web.Application(middlewares=[self._envelope], client_max_size=settings.max_body_bytes)
        routes: list[tuple[str, str, Handler]] = [
            ("GET", "/v1/models", self.models),
            ("POST", "/v1/completions", self.completions),
            ("POST", "/v1/chat/completions", self.chat_completions),
            ("POST", "/tokenize", self.tokenize),
            ("GET", "/status", self.get_status),
            ("GET", "/healthz", self.healthz),
            ("GET", "/readyz", self.readyz),
            ("GET", "/metrics", self.get_metrics),
            ("GET", "/openapi.json", self.openapi),
        ]
        for method, path, handler in routes:
            self.app.router.add_route(method, path, handler)

    # ── Life ──────────────────────────────────────────────────────────────────────────────────────

    async def load(self) -> None:
        """Prepare the model and start the engine. EngineError if that cannot be done."""
        folder: Path = await asyncio.to_thread(prepare, self.settings.model)
        self._tokenizer = await asyncio.to_thread(Tokenizer.from_directory, folder)
        await self.engine.start(self.settings.engine_config(folder))
        if self.state == "starting":
            self._enter("ready")

    def _enter(self, state: AgentState) -> None:
        log.info("agent is %s", state)
        self.state = state
        self._changed()

    async def drain(self) -> None:
        """Take nothing new; return when all requests have ended or the grace period is over."""
        self._enter("draining")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.grace_period):
                while self.engine.in_flight and not self.engine.gone.is_set():
                    await self._next_change()
                return
        log.warning("grace period is over; %d requests are cut off", self.engine.in_flight)
        self.engine.fail_all(
            f"the server shut down before the request was finished (grace period {self.settings.grace_period:g} s)"
        )

    def fail(self) -> None:
        self._enter("failed")

    # ── Status ────────────────────────────────────────────────────────────────────────────────────

    def _changed(self) -> None:
        """Something in the status may have changed: count a version if so, and wake who waits for it."""
        snapshot = self._facts()
        if snapshot != self._snapshot:
            self._snapshot = snapshot
            self._version += 1
            for waiter in self._waiters:
                waiter.set()

    async def _next_change(self) -> None:
        waiter = asyncio.Event()
        self._waiters.add(waiter)
        try:
            await waiter.wait()
        finally:
            self._waiters.discard(waiter)

    def _facts(self) -> dict[str, Any]:
        stats, ready = self.engine.stats, self.engine.ready
        loaded = (
            {
                name: getattr(ready, name)
                for name in ("layout_digest", "dtype", "device", "block_tokens", "max_model_len", "max_num_seqs")
            }
            if ready is not None
            else {}
        )
        counted = (
            "running", "waiting", "swapped", "steps", "last_step_ms", "mean_step_ms", "prompt_tokens",
            "generated_tokens", "prefix_queries", "prefix_hits", "preemptions_recompute", "preemptions_swap",
        )  # fmt: skip
        return {
            **loaded,
            **{name: getattr(stats, name) for name in counted},
            "state": self.state,
            "in_flight": self.engine.in_flight,
            "device_tier": TierStatus.model_validate(stats.device, from_attributes=True),
            "host_tier": TierStatus.model_validate(stats.host, from_attributes=True),
            "hottest_prefixes": [
                PrefixStatus.model_validate(prefix, from_attributes=True) for prefix in stats.hottest_prefixes
            ],
        }

    def status(self) -> AgentStatus:
        return AgentStatus(
            version=self._version,
            incarnation=self._incarnation,
            model=self.settings.public_name,
            **self._facts(),
        )

    async def get_status(self, request: web.Request) -> web.Response:
        """The status; with ?since=VERSION&wait=SECONDS not before it has changed, if it does in time."""
        since = _query_number(request, "since", int, -1)
        wait = _query_number(request, "wait", float, 0.0)
        if not 0 <= wait <= MAX_STATUS_WAIT:
            raise BadRequest(f"wait is {wait}; it must be 0 to {MAX_STATUS_WAIT:g} seconds", param="wait")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                while self._version == since:
                    await self._next_change()
        return _json(self.status())

    # ── Health, metrics, contract ─────────────────────────────────────────────────────────────────

    async def healthz(self, request: web.Request) -> web.Response:
        """Alive: false only when the engine has failed and the process is about to exit."""
        return self._probe(self.state != "failed")

    async def readyz(self, request: web.Request) -> web.Response:
        """Ready for requests: false while starting, draining or failed."""
        return self._probe(self.state == "ready")

    def _probe(self, good: bool) -> web.Response:
        return web.json_response({"state": self.state}, status=200 if good else 503)

    async def get_metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self.metrics.render(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def openapi(self, request: web.Request) -> web.Response:
        return web.json_response(document())

    async def models(self, request: web.Request) -> web.Response:
        ready = self.engine.ready
        card = ModelCard(
            id=self.settings.public_name,
            created=self._created,
            max_model_len=0 if ready is None else ready.max_model_len,
        )
        return _json(ModelList(data=[card]))

    # ── Completions ───────────────────────────────────────────────────────────────────────────────

    async def completions(self, request: web.Request) -> web.StreamResponse:
        tokenizer = self._admit()
        ask = parse(CompletionRequest, await request.read())
        self._check_model(ask.model)
        if ask.echo and ask.logprobs is not None:
            raise BadRequest("echo and logprobs cannot be combined; leave one of them out", param="echo")
        prompts = [
            await self._encode(p, add_special_tokens=ask.add_special_tokens) if isinstance(p, str) else p
            for p in ask.prompts()
        ]
        count = ask.n or 1
        echoes = [tokenizer.decode(p) if ask.echo else "" for p in prompts for _ in range(count)]
        shape = CompletionShape(
            self.settings.public_name, tokenizer, logprobs=ask.logprobs is not None, echoes=echoes
        )
        return await self._serve(request, ask, prompts, shape, logprobs=ask.logprobs, max_tokens=ask.max_tokens or 16)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        tokenizer = self._admit()
        ask = parse(ChatRequest, await request.read())
        self._check_model(ask.model)
        if ask.top_logprobs is not None and not ask.logprobs:
            raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        prompt = await self._encode(self._render(ask.messages))
        shape = ChatShape(self.settings.public_name, tokenizer, logprobs=bool(ask.logprobs))
        return await self._serve(
            request,
            ask,
            [prompt],
            shape,
            logprobs=(ask.top_logprobs or 0) if ask.logprobs else None,
            max_tokens=ask.max_completion_tokens or ask.max_tokens,
        )

    async def tokenize(self, request: web.Request) -> web.Response:
        self._admit()
        ask = parse(TokenizeRequest, await request.read())
        if ask.model is not None:
            self._check_model(ask.model)
        if (ask.prompt is None) == (ask.messages is None):
            raise BadRequest("give either prompt or messages, and not both", param="prompt")
        text = ask.prompt
        if text is None:
            text = self._render(ask.messages or [], add_generation_prompt=ask.add_generation_prompt)
        ids = await self._encode(text, add_special_tokens=ask.add_special_tokens)
        assert self.engine.ready is not None
        return _json(TokenizeResponse(count=len(ids), max_model_len=self.engine.ready.max_model_len, tokens=ids))

    def _admit(self) -> Tokenizer:
        if self.state != "ready" or self._tokenizer is None:
            raise Unavailable(
                f"the server is {self.state}; try another one or come back later",
                status=503,
                code=f"server_{self.state}",
                retry_after=5,
            )
        return self._tokenizer

    def _check_model(self, name: str) -> None:
        if name != self.settings.public_name:
            raise BadRequest(
                f"the model {name!r} does not exist here; this server has {self.settings.public_name!r}",
                param="model",
                code="model_not_found",
                status=404,
            )

    def _render(self, messages: list[Any], *, add_generation_prompt: bool = True) -> str:
        assert self._tokenizer is not None
        rendered = [message.rendered() for message in messages]
        return self._tokenizer.render_chat(rendered, add_generation_prompt=add_generation_prompt)

    async def _encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        assert self._tokenizer is not None
        if len(text) < LARGE_TEXT:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens=add_special_tokens)

    async def _serve(
        self,
        request: web.Request,
        ask: Sampling,
        prompts: list[list[int]],
        shape: Shape,
        *,
        logprobs: int | None,
        max_tokens: int | None,
    ) -> web.StreamResponse:
        begin = time.monotonic()
        ready = self.engine.ready
        assert ready is not None and self._tokenizer is not None
        longest = max(map(len, prompts))
        room = ready.max_model_len - longest
        if room < 1:
            raise BadRequest(
                f"the prompt has {longest} tokens; this server's context is {ready.max_model_len} tokens, and at least "
                "one must be left for the answer. Shorten the prompt",
                param="messages" if isinstance(ask, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        structure = None
        if isinstance(ask, ChatRequest) and ask.response_format is not None:
            structure = ask.response_format.structure()
        params = ask.params(max_tokens=room if max_tokens is None else max_tokens, logprobs=logprobs, structure=structure)
        params.check(vocab_size=ready.vocab_size)
        self._refuse_overload(len(prompts))
        async with contextlib.AsyncExitStack() as stack:
            generations = [
                await stack.enter_async_context(self._submit(request, ask, prompt, params)) for prompt in prompts
            ]
            completion = Completion(self._tokenizer, generations, prompts, params.n, ask.stops())
            if ask.stream:
                return await self._stream(request, ask, completion, shape, begin)
            pieces: list[list[Piece]] = [[] for _ in range(params.n * len(prompts))]
            first = None
            async for piece in completion.pieces():
                first = first or time.monotonic()
                pieces[piece.index].append(piece)
            self._observe(begin, first, completion)
            return web.json_response(shape.response(pieces, completion.totals))

    def _submit(self, request: web.Request, ask: Sampling, prompt: list[int], params: SamplingParams) -> Generation:
        tenant = request.headers.get("x-tenant", "")
        if len(tenant) > MAX_TENANT:
            raise BadRequest(f"the x-tenant header has {len(tenant)} characters; at most {MAX_TENANT}", param="x-tenant")
        salt = f"{tenant}\0{ask.cache_salt}" if ask.cache_salt else tenant
        return self.engine.submit(prompt, params, tenant=salt, priority=ask.priority)

    def _refuse_overload(self, requests: int) -> None:
        """Back-pressure: a bounded queue. The hint is how long the queue in front takes, roughly."""
        ready, settings = self.engine.ready, self.settings
        assert ready is not None
        limit = ready.max_num_seqs + settings.max_queue
        if self.engine.in_flight + requests > limit:
            raise Unavailable(
                f"{self.engine.in_flight} requests are running or queued and {requests} more came; this server holds "
                f"{limit} (max_num_seqs {ready.max_num_seqs} + max_queue {settings.max_queue}). Try again later",
                status=429,
                code="queue_full",
                retry_after=max(1, round(self.engine.stats.mean_step_ms / 1e3 * 100)),
            )

    async def _stream(
        self, request: web.Request, ask: Sampling, completion: Completion, shape: Shape, begin: float
    ) -> web.StreamResponse:
        """Server-sent events. The response starts with the first token, so that a refusal is still a 4xx."""
        pieces = completion.pieces()
        try:
            first = await anext(pieces)
        except StopAsyncIteration:
            raise EngineDied("the engine ended the request without an answer") from None
        arrived = time.monotonic()
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        response = web.StreamResponse(headers=headers | {"x-request-id": request["id"]})
        await response.prepare(request)

        async def send(*events: dict[str, Any]) -> None:
            await response.write(b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events))

        try:
            count = len(completion.prompts) * completion.choices_each
            await send(*shape.first_chunks(count), shape.chunk(first))
            async for piece in pieces:
                await send(shape.chunk(piece))
            if ask.stream_options is not None and ask.stream_options.include_usage:
                await send(shape.usage_chunk(completion.totals))
            await response.write(b"data: [DONE]\n\n")
            self._observe(begin, arrived, completion)
        except (EngineError, RequestError) as error:
            await send(error_body(str(error), "server_error", code="engine_failed").model_dump())
        except (ConnectionResetError, ConnectionError):
            log.info("request %s: the client went away", request["id"])
        return response

    def _observe(self, begin: float, first: float | None, completion: Completion) -> None:
        end = time.monotonic()
        self.metrics.request_latency.observe(end - begin)
        if first is not None:
            self.metrics.time_to_first_token.observe(first - begin)
            tokens = completion.totals.completion_tokens / max(1, completion.choices_each * len(completion.prompts))
            if tokens > 1:
                self.metrics.time_per_output_token.observe((end - first) / (tokens - 1))

    # ── Around every request ──────────────────────────────────────────────────────────────────────

    @web.middleware
    async def _envelope(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Request id, errors in OpenAI's shape, one log line."""
        request["id"] = request.headers.get("x-request-id", "")[:128] or uuid.uuid4().hex
        begin = time.monotonic()
        try:
            response = await handler(request)
        except BadRequest as error:
            response = _error(str(error), "invalid_request_error", error.status, param=error.param, code=error.code)
        except RequestError as error:
            bad = from_engine(error)
            response = _error(str(bad), "invalid_request_error", bad.status, param=bad.param, code=bad.code)
        except Unavailable as error:
            kind = "rate_limit_error" if error.status == 429 else "service_unavailable_error"
            response = _error(str(error), kind, error.status, code=error.code)
            if error.retry_after is not None:
                response.headers["Retry-After"] = str(error.retry_after)
        except EngineError as error:
            response = _error(str(error), "server_error", 503, code="engine_failed")
        except web.HTTPRequestEntityTooLarge:
            limit = self.settings.max_body_bytes
            message = f"the body is larger than {limit} bytes; send less, or raise max_body_bytes"
            response = _error(message, "invalid_request_error", 413, code="body_too_large")
        except web.HTTPException as error:
            message = f"{request.method} {request.path}: {error.reason}"
            response = _error(message, "invalid_request_error", error.status)
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
        except asyncio.CancelledError:
            log.info("request %s: the client went away", request["id"])
            raise
        except Exception:
            log.exception("request %s failed", request["id"])
            response = _error("internal error; the server's log has the details", "server_error", 500)
        if not response.prepared:
            response.headers["x-request-id"] = request["id"]
        if request.path.startswith(("/v1/", "/tokenize")):
            log.info(
                "%s %s %d %.0f ms id=%s", request.method, request.path, response.status,
                1e3 * (time.monotonic() - begin), request["id"],
            )  # fmt: skip
        return response


def _json(model: BaseModel) -> web.Response:
    return web.Response(text=model.model_dump_json(), content_type="application/json")


def _error(
    message: str, kind: str, status: int, *, param: str | None = None, code: str | None = None
) -> web.Response:
    body = error_body(message, kind, param=param, code=code).model_dump()
    return web.json_response(body, status=status)


def _query_number(request: web.Request, name: str, kind: type[Any], default: Any) -> Any:
    text = request.query.get(name)
    if text is None:
        return default
    try:
        return kind(text)
    except ValueError:
        raise BadRequest(f"{name} is {text[:40]!r}; it must be a number", param=name) from None


async def serve(settings: AgentSettings) -> int:
    """Run an agent until a signal or the engine's end; returns the process's exit code."""
    agent = Agent(settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    runner = web.AppRunner(agent.app, handler_cancellation=True, access_log=None, shutdown_timeout=EXIT_DELAY)
    await runner.setup()
    site = web.TCPSite(runner, settings.host, settings.port, backlog=1024)
    await site.start()
    port = runner.addresses[0][1]
    print(f"blockyard agent: http://{settings.host}:{port} is loading {settings.model}", flush=True)
    stopping = asyncio.create_task(stop.wait())
    loading = asyncio.create_task(agent.load())
    try:
        await asyncio.wait({stopping, loading}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            loading.cancel()
            return 0
        loading.result()
        ready = agent.engine.ready
        assert ready is not None
        print(
            f"blockyard agent: ready, {settings.public_name} as {ready.dtype} on {ready.device}, "
            f"{ready.kv_blocks} KV blocks of {ready.block_tokens} tokens",
            flush=True,
        )
        gone = asyncio.create_task(agent.engine.gone.wait())
        await asyncio.wait({stopping, gone}, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            draining = asyncio.create_task(agent.drain())
            await asyncio.wait({draining, gone}, return_when=asyncio.FIRST_COMPLETED)
        if agent.engine.gone.is_set():
            raise agent.engine.failure or EngineDied("the engine is gone")
        return 0
    except EngineError as error:
        agent.fail()
        print(f"blockyard agent: {error}", flush=True, file=sys.stderr)
        return 1
    finally:
        if not loading.done():
            loading.cancel()
        await runner.cleanup()  # waits for open answers, at most EXIT_DELAY
        await agent.engine.close()
