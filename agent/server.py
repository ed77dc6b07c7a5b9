"""The agent's HTTP server: OpenAI's endpoints, status, health and metrics over one engine process.

This file wires requests to the engine and owns the agent's life: starting, ready, draining, drained, or
failed. What a request means is in ``openai_api``, how its answer is put together in ``completion``, what
happens when something is wrong with it in ``envelope``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any

import msgspec
from aiohttp import web
from pydantic import BaseModel

from ..engine.errors import ConfigError, EngineError
from ..engine.model.tokenizer import Tokenizer
from ..engine.sampling_params import SamplingParams
from .bearer import Tokens
from .completion import ChatShape, Completion, CompletionShape, Piece, Shape
from .connections import Runner
from .drain import Drain, DrainRequest
from .engine_client import EngineClient, Generation
from .engine_errors import EngineDied, described
from .envelope import Handler, envelope, read_body
from .errors import BadRequest, SettingsError, Unavailable
from .messages import Ready
from .metrics import Metrics, RequestTimer
from .openai_api import (
    ChatRequest,
    CompletionRequest,
    ModelCard,
    ModelList,
    Sampling,
    TokenizeRequest,
    TokenizeResponse,
    parse,
)
from .openapi import document
from .prefix_log import PrefixLog
from .prefix_sketch import chat_parts, prompt_parts, sketch
from .prepare_model import prepare_in_child
from .settings import AgentSettings
from .status_board import StatusBoard

log = logging.getLogger("blockyard.agent")

MAX_STATUS_WAIT = 60.0  # seconds a long poll may last
MAX_TENANT = 128
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions
LARGE_TEXT = 1 << 16  # characters above which tokenizing leaves the event loop
SEND_BUFFER = 1 << 16  # bytes the kernel buffers for a client; few, so that a stalled client is noticed soon
OPEN_PATHS = ("/healthz", "/readyz", "/metrics")  # probes and Prometheus have no token
EXIT_DELAY = 1.0  # seconds for clients and probes to read the last answers

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_HEX = re.compile(r"[0-9a-f]{0,64}")
_NUMBER = re.compile(r"[0-9]{1,18}(\.[0-9]{1,18})?")


class Agent:
    """One agent: settings, the engine client, and the handlers over it."""

    def __init__(self, settings: AgentSettings) -> None:
        self.settings = settings
        self.engine = EngineClient(self._changed, settings.hang_timeout)
        self.board = StatusBoard(self.engine, settings.public_name, settings.max_queue)
        self.metrics = Metrics(self.board.report, settings.public_name)
        self._tokens = Tokens(settings.token, settings.token_dir)
        self._tokenizer: Tokenizer | None = None
        self._created = int(time.time())
        self.prefixes = PrefixLog(self.board.incarnation)
        self._drain = Drain(self.board, self.engine, self.enter, self.cut_off)
        self.app = web.Application(
            middlewares=[envelope(described), self._guard], client_max_size=settings.max_body_bytes
        )
        routes: list[tuple[str, str, Handler]] = [
            ("GET", "/v1/models", self.models),
            ("POST", "/v1/completions", self.completions),
            ("POST", "/v1/chat/completions", self.chat_completions),
            ("POST", "/tokenize", self.tokenize),
            ("GET", "/status", self.status),
            ("GET", "/prefixes", self.prefixes_used),
            ("POST", "/drain", self.drain_by),
            ("GET", "/healthz", self.healthz),
            ("GET", "/readyz", self.readyz),
            ("GET", "/metrics", self.prometheus),
            ("GET", "/openapi.json", self.openapi),
        ]
        for method, path, handler in routes:
            self.app.router.add_route(method, path, handler)

    def _changed(self) -> None:
        self.board.refresh()

    # ── Life ──────────────────────────────────────────────────────────────────────────────────────

    async def load(self) -> Ready:
        """Prepare the model and start the engine. EngineError if that cannot be done."""
        folder = await prepare_in_child(self.settings.model)
        # The tokenizer loads while the engine does, which takes longer.
        reading = asyncio.create_task(asyncio.to_thread(Tokenizer.from_directory, folder))
        try:
            ready = await self.engine.start(self.settings.engine_config(folder))
            self._tokenizer = await reading
        finally:
            reading.cancel()
        self.prefixes.resize(ready.kv_blocks * ready.block_tokens)
        if self.board.state == "starting":  # else it was told to drain meanwhile
            self.enter("ready")
        return ready

    def enter(self, state: Any) -> None:
        log.info("agent state=%s", state)
        self.board.enter(state)

    async def drain(self) -> None:
        """Take nothing new; return when all requests have ended."""
        if self.board.state != "drained":
            self.enter("draining")
        await self._drain.requests_ended()

    def cut_off(self, why: str) -> None:
        """End the requests that are left, each with an error that says why."""
        log.warning("%s; %d requests are cut off", why, self.engine.in_flight)
        self.engine.cut_off(f"the server was shut down before the answer was there ({why}); ask again")

    # ── Status, health, metrics, contract ─────────────────────────────────────────────────────────

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Only health and metrics are open to requests without the token."""
        if request.path not in OPEN_PATHS and not self._tokens.accept(request):
            raise BadRequest(
                "this server asks for its token as Authorization: Bearer", code="invalid_token", status=401
            )
        return await handler(request)

    async def status(self, request: web.Request) -> web.Response:
        """The status; with ?since=VERSION&wait=SECONDS as soon as it differs from that version, or after the
        wait.
        """
        since = _query(request, "since", _INTEGER, "a whole number")
        wait = _wait(request)
        if since is None:
            return _json(self.board.report())
        return _json(await self.board.newer_than(int(since), wait))

    async def prefixes_used(self, request: web.Request) -> web.Response:
        """Which prompts were served lately. With ?since=VERSION&incarnation=ID only what came after that
        version; with &wait=SECONDS the answer waits until there is something, or until the time is over.
        """
        since = int(_query(request, "since", _INTEGER, "a whole number") or 0)
        incarnation = _query(request, "incarnation", _HEX, "an incarnation from a status") or ""
        return _json(await self.prefixes.newer_than(since, incarnation, _wait(request)))

    async def drain_by(self, request: web.Request) -> web.Response:
        """Begin to drain, or bring a drain's deadline nearer; answers the status."""
        self._drain.begin(
            parse(DrainRequest, await read_body(request, self.settings.client_timeout)).timeout_s
        )
        return _json(self.board.report())

    async def healthz(self, _request: web.Request) -> web.Response:
        """Alive: false only when the engine has failed and the process is about to exit."""
        return self._probe(200 if self.board.state != "failed" else 500)

    async def readyz(self, _request: web.Request) -> web.Response:
        """Ready for requests: false while starting, draining, drained or failed."""
        return self._probe(200 if self.board.state == "ready" else 503)

    def _probe(self, status: int) -> web.Response:
        return web.json_response({"state": self.board.state}, status=status)

    async def prometheus(self, _request: web.Request) -> web.Response:
        content_type = "text/plain; version=0.0.4; charset=utf-8"
        return web.Response(body=self.metrics.render(), headers={"Content-Type": content_type})

    async def openapi(self, _request: web.Request) -> web.Response:
        return web.json_response(document())

    async def models(self, _request: web.Request) -> web.Response:
        ready = self.engine.ready
        card = ModelCard(
            id=self.settings.public_name,
            created=self._created,
            max_model_len=0 if ready is None else ready.max_model_len,
        )
        return _json(ModelList(data=[card]))

    # ── What clients ask for ──────────────────────────────────────────────────────────────────────

    async def completions(self, request: web.Request) -> web.StreamResponse:
        timer = RequestTimer(self.metrics)
        tokenizer, ready = self._admit()
        ask = parse(CompletionRequest, await read_body(request, self.settings.client_timeout))
        self._check_model(ask.model)
        if ask.echo and ask.logprobs is not None:
            raise BadRequest("echo and logprobs cannot be combined; leave one of them out", param="echo")
        prompts = [
            await self._encode(p, add_special_tokens=bool(ask.add_special_tokens))
            if isinstance(p, str)
            else p
            for p in ask.prompts()
        ]
        limit = max_tokens(ask, prompts, ready, wanted=ask.max_tokens, default=DEFAULT_COMPLETION_TOKENS)
        params = ask.params(max_tokens=limit, logprobs=ask.logprobs)
        echoes = [tokenizer.decode(p) if ask.echo else "" for p in prompts for _ in range(params.n)]
        shape = CompletionShape(
            self.settings.public_name, tokenizer, logprobs=ask.logprobs is not None, echoes=echoes
        )
        texts = [prompt_parts(prompt) for prompt in ask.prompts()]
        return await self._serve(request, ask, prompts, texts, params, shape, timer)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        timer = RequestTimer(self.metrics)
        tokenizer, ready = self._admit()
        ask = parse(ChatRequest, await read_body(request, self.settings.client_timeout))
        self._check_model(ask.model)
        if ask.top_logprobs is not None and not ask.logprobs:
            raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        prompt = await self._encode(self._render(ask.messages))
        wanted = ask.max_tokens if ask.max_completion_tokens is None else ask.max_completion_tokens
        if ask.max_tokens not in (None, wanted):
            raise BadRequest(
                f"max_tokens is {ask.max_tokens} and max_completion_tokens is {wanted}; leave one out",
                param="max_tokens",
            )
        params = ask.params(
            max_tokens=max_tokens(ask, [prompt], ready, wanted=wanted, default=None),
            logprobs=(ask.top_logprobs or 0) if ask.logprobs else None,
            structure=None if ask.response_format is None else ask.response_format.structure(),
        )
        shape = ChatShape(self.settings.public_name, tokenizer, logprobs=bool(ask.logprobs))
        messages = (message.rendered() for message in ask.messages)
        text = chat_parts((message["role"], message["content"]) for message in messages)
        return await self._serve(request, ask, [prompt], [text], params, shape, timer)

    async def tokenize(self, request: web.Request) -> web.Response:
        _, ready = self._admit()
        ask = parse(TokenizeRequest, await read_body(request, self.settings.client_timeout))
        if ask.model is not None:
            self._check_model(ask.model)
        if (ask.prompt is None) == (ask.messages is None):
            raise BadRequest("give either prompt or messages, and not both", param="prompt")
        text = ask.prompt
        if text is None:
            text = self._render(ask.messages or [], add_generation_prompt=ask.add_generation_prompt)
        ids = await self._encode(text, add_special_tokens=ask.add_special_tokens)
        return _json(TokenizeResponse(count=len(ids), max_model_len=ready.max_model_len, tokens=ids))

    def _admit(self) -> tuple[Tokenizer, Ready]:
        state = self.board.state
        if state != "ready" or self._tokenizer is None or self.engine.ready is None:
            raise Unavailable(
                f"the server is {state}; try another one or come back later",
                status=503,
                code=f"server_{state}",
                retry_after=5,
            )
        return self._tokenizer, self.engine.ready

    def _check_model(self, name: str) -> None:
        if name != self.settings.public_name:
            raise BadRequest(
                f"the model {name[:99]!r} does not exist here; this server has {self.settings.public_name!r}",
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

    # ── From request to answer ────────────────────────────────────────────────────────────────────

    async def _serve(
        self,
        request: web.Request,
        ask: Sampling,
        prompts: list[list[int]],
        texts: Sequence[Iterable[str]],
        params: SamplingParams,
        shape: Shape,
        timer: RequestTimer,
    ) -> web.StreamResponse:
        tokenizer, ready = self._admit()
        if ask.stream_options is not None and not ask.stream:
            raise BadRequest("stream_options needs stream to be true", param="stream_options")
        params.check(vocab_size=ready.vocab_size)
        tenant = _tenant(request, ask)
        self._refuse_overload(len(prompts))
        # There is no await between the check above and the last submit, so the bound is exact.
        async with contextlib.AsyncExitStack() as stack:
            generations: list[Generation] = []
            for prompt in prompts:
                generation = self.engine.submit(prompt, params, tenant=tenant, priority=ask.priority or 0)
                generations.append(generation)
                stack.callback(generation.close)
            if self.settings.prefix_cache:
                for text in texts:
                    self.prefixes.record(sketch(text, tenant))
            completion = Completion(tokenizer, generations, prompts, params.n, ask.stops(), params.min_tokens)
            if ask.stream:
                return await self._stream(request, ask, completion, shape, timer)
            parts: list[list[Piece]] = [[] for _ in range(completion.choices)]
            async with contextlib.aclosing(completion.pieces()) as pieces:
                async for piece in pieces:
                    if piece.tokens:
                        timer.token(piece.index)
                    parts[piece.index].append(piece)
            timer.finish(completion.totals.prompt_tokens, completion.totals.completion_tokens)
            body = msgspec.json.encode(shape.response(parts, completion.totals))
            return web.Response(body=body, content_type="application/json")

    def _refuse_overload(self, requests: int) -> None:
        """Back-pressure: refuse with a 429 when the queue is full. Retry-After is the time of about a hundred
        steps.
        """
        held, capacity = self.engine.in_flight, self.board.capacity
        if requests > capacity:
            raise BadRequest(
                f"{requests} prompts; this server holds {capacity} at once. Send fewer", param="prompt"
            )
        if held + requests > capacity:
            raise Unavailable(
                f"{held} requests run or wait and {requests} more came; this server holds {capacity} "
                "(max_num_seqs + max_queue). Try again later",
                status=429,
                code="queue_full",
                retry_after=max(1, round(self.engine.stats.mean_step_ms / 10)),
            )

    async def _stream(
        self, request: web.Request, ask: Sampling, completion: Completion, shape: Shape, timer: RequestTimer
    ) -> web.StreamResponse:
        """Server-sent events. The response starts with the first token, so that a refusal before it is still
        a 4xx.
        """
        with_usage = ask.stream_options is not None and ask.stream_options.include_usage
        async with contextlib.aclosing(_events(completion, shape, timer, with_usage=with_usage)) as events:
            data: bytes | None = await anext(events)
            response = web.StreamResponse(
                headers={
                    "Content-Type": "text/event-stream; charset=utf-8",
                    "Cache-Control": "no-cache",
                    "X-Accel-Buffering": "no",
                    "x-request-id": request["id"],
                }
            )
            connection = request.get_extra_info("socket")
            if connection is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            await response.prepare(request)
            limit = self.settings.client_timeout
            while data is not None:
                try:
                    async with asyncio.timeout(limit):
                        await response.write(data)
                except TimeoutError:
                    log.info("request id=%s took no data for %g s and is dropped", request["id"], limit)
                    if request.transport is not None:
                        request.transport.abort()
                    break
                data = await anext(events, None)
        return response


async def _events(
    completion: Completion, shape: Shape, timer: RequestTimer, *, with_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The events of a stream. An error before the first event is raised, a later one is the last event."""
    begun = False
    try:
        async with contextlib.aclosing(completion.pieces()) as pieces:
            async for piece in pieces:
                if piece.tokens:
                    timer.token(piece.index)
                chunks = [shape.chunk(piece)]
                if not begun:
                    chunks = shape.first_chunks(completion.choices) + chunks
                    begun = True
                if with_usage:  # as OpenAI's: every event has the field, the last one has numbers
                    chunks = [{"usage": None, **chunk} for chunk in chunks]
                yield _sse(chunks)
    except Exception as error:
        if not begun:
            raise
        status, body = described(error)
        if status == 500:
            log.exception("a stream failed")
        yield _sse([body.model_dump()])
        return
    if with_usage:
        yield _sse([shape.usage_chunk(completion.totals)])
    yield b"data: [DONE]\n\n"
    timer.finish(completion.totals.prompt_tokens, completion.totals.completion_tokens)


def _sse(events: list[dict[str, Any]]) -> bytes:
    return b"".join(b"data: " + msgspec.json.encode(event) + b"\n\n" for event in events)


def max_tokens(
    ask: Sampling, prompts: list[list[int]], ready: Ready, *, wanted: int | None, default: int | None
) -> int:
    """How many tokens each choice may get: what is asked for, or the default, or all that fits.

    BadRequest if a prompt, or a prompt and what is asked for, is longer than the context.
    """
    prompt = max(map(len, prompts))
    room = ready.max_model_len - prompt
    if room < (wanted or 1):
        asked = "" if wanted is None else f" and max_tokens is {wanted}, together {prompt + wanted}"
        remedy = (
            "Shorten the prompt" if wanted is None or room < 1 else "Shorten the prompt or lower max_tokens"
        )
        at_least = ", at least one of them for the answer" if wanted is None else ""
        raise BadRequest(
            f"the prompt has {prompt} tokens{asked}; this server's context is {ready.max_model_len} tokens"
            f"{at_least}. {remedy}",
            param="max_tokens" if room >= 1 else "messages" if isinstance(ask, ChatRequest) else "prompt",
            code="context_length_exceeded",
        )
    if wanted is not None:
        return wanted
    # The choices share the prompt's full blocks; what each adds must fit into the pool beside the others.
    width = max(ask.n or 1, ask.best_of or 1)
    shared = prompt // ready.block_tokens
    blocks_each = (ready.kv_blocks + (width - 1) * shared) // width
    fits = blocks_each * ready.block_tokens + 1 - prompt  # the last token's KV is never written
    return max(1, min(room, fits, room if default is None else default))


def _tenant(request: web.Request, ask: Sampling) -> str:
    """Whose request it is: the x-tenant header, and the request's cache_salt if there is one."""
    tenant = request.headers.get("x-tenant", "")
    if len(tenant) > MAX_TENANT or not tenant.isascii():
        raise BadRequest(
            f"the x-tenant header must be ASCII of at most {MAX_TENANT} characters (it has {len(tenant)})",
            param="x-tenant",
        )
    return f"{tenant}\0{ask.cache_salt}" if ask.cache_salt else tenant


def _json(model: BaseModel) -> web.Response:
    return web.Response(text=model.model_dump_json(), content_type="application/json")


def _wait(request: web.Request) -> float:
    """How many seconds a long poll may last."""
    wait = float(_query(request, "wait", _NUMBER, "a number of seconds") or 0)
    if wait > MAX_STATUS_WAIT:
        raise BadRequest(f"wait is {wait:g}; it must be at most {MAX_STATUS_WAIT:g} seconds", param="wait")
    return wait


def _query(request: web.Request, name: str, pattern: re.Pattern[str], what: str) -> str | None:
    text = request.query.get(name)
    if text is not None and not pattern.fullmatch(text):
        raise BadRequest(f"{name} is {text[:40]!a}; it must be {what}", param=name)
    return text


async def serve(settings: AgentSettings) -> int:
    """Run an agent until a signal or the engine's end; returns the process's exit code.

    0 after a signal, 1 if the engine failed, 2 if a setting cannot work. SIGTERM and SIGINT drain. A second
    SIGINT, from an impatient user at the keyboard, ends the grace period.
    """
    agent = Agent(settings)
    stop, hurry = asyncio.Event(), asyncio.Event()

    def interrupt() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGINT, interrupt)
    runner = Runner(agent.app, agent.metrics.malformed.inc, shutdown_timeout=EXIT_DELAY)
    tasks: list[asyncio.Task[Any]] = []

    def begin(work: Any) -> asyncio.Task[Any]:
        tasks.append(asyncio.create_task(work))
        return tasks[-1]

    try:
        await runner.setup()
        port = await _listen(runner, settings)
        print(f"blockyard agent: http://{settings.host}:{port} is loading {settings.model}", flush=True)
        stopping, loading = begin(stop.wait()), begin(agent.load())
        await asyncio.wait({stopping, loading}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            log.info("stopped while loading")
            return 0
        ready: Ready = loading.result()
        print(
            f"blockyard agent: ready, {settings.public_name} as {ready.dtype} on {ready.device}, "
            f"{ready.kv_blocks} KV blocks of {ready.block_tokens} tokens",
            flush=True,
        )
        gone = begin(agent.engine.gone.wait())
        await asyncio.wait({stopping, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not gone.done():
            draining, hurrying = begin(agent.drain()), begin(hurry.wait())
            await asyncio.wait(
                {draining, hurrying, gone},
                timeout=settings.grace_period,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not draining.done() and not gone.done():
                agent.cut_off(
                    "it was told twice"
                    if hurrying.done()
                    else f"the grace_period of {settings.grace_period:g} seconds is over"
                )
        if gone.done():
            raise agent.engine.failure or EngineDied("the engine is gone")
        agent.enter("drained")
        return 0
    except (EngineError, SettingsError) as error:
        print(f"blockyard agent: {error}", flush=True, file=sys.stderr)
        agent.enter("failed")
        if agent.engine.ready is not None:
            await asyncio.sleep(EXIT_DELAY)  # probes and clients still get an answer
        return 2 if isinstance(error, ConfigError | SettingsError) else 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await runner.cleanup()  # waits for open answers, at most EXIT_DELAY
        await agent.engine.close()


async def _listen(runner: web.AppRunner, settings: AgentSettings) -> int:
    """The port that is listened on. SettingsError if it cannot be had."""
    try:
        await web.TCPSite(runner, settings.host, settings.port, backlog=1024).start()
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {settings.host}:{settings.port}: {error}; set host or port"
        ) from None
    return int(runner.addresses[0][1])
