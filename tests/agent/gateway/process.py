"""A real gateway in a process of its own, and scripted agents that consist of HTTP handlers only."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from blockyard.agent.prefix_log import PrefixLog
from blockyard.agent.prefix_sketch import Prefix
from blockyard.agent.protocol import AgentStatus, TierStatus

START_TIMEOUT = 60.0


class GatewayProcess:
    """Starts ``blockyard gateway`` on a free port; ``agents`` lists the agents it serves."""

    def __init__(self, folder: Path, agents: dict[str, str], *flags: str, **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "agents.json"
        self.log = folder / "gateway.log"
        self.set_agents(agents)
        self._output = self.log.open("wb")
        command = [sys.executable, "-m", "blockyard.cli", "gateway", "--port", "0"]
        command += ["--agents-file", str(self._file), *flags]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self._output,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        )
        self.url = ""
        self._announced = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._announced.wait(START_TIMEOUT), self.errors()
        assert self.url, self.errors()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            if match := re.search(r"(http://\S+)", raw.decode()):
                self.url = match[1]
                self._announced.set()
        self._announced.set()

    def set_agents(self, agents: dict[str, str]) -> None:
        """Name -> URL. The file is replaced atomically, as the local runtime does it."""
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps([{"name": name, "url": url} for name, url in agents.items()]))
        new.replace(self._file)

    def errors(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout: float = 60.0) -> int:
        """Send a signal and wait for the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self._output.close()


async def gateway_status(client: aiohttp.ClientSession, url: str, token: str = "inner") -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {token}"}
    async with client.get(f"{url}/status", headers=headers) as response:
        assert response.status == 200, await response.text()
        return await response.json()  # type: ignore[no-any-return]


async def agents_when(
    client: aiohttp.ClientSession, url: str, holds: Callable[[dict[str, dict[str, Any]]], bool]
) -> dict[str, dict[str, Any]]:
    """The gateway's agents by name, once ``holds`` of them. A gateway's view has no event to wait for."""
    async with asyncio.timeout(60):
        while True:
            status = await gateway_status(client, url)
            agents = {agent["name"]: agent for agent in status["agents"]}
            if holds(agents):
                return agents
            await asyncio.sleep(0.02)


async def all_ready(client: aiohttp.ClientSession, url: str, *names: str) -> None:
    """Until the gateway sees exactly these agents, all of them ready."""
    await agents_when(
        client, url, lambda agents: {n for n, a in agents.items() if a["ready"]} == set(names) == set(agents)
    )


Respond = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ScriptedAgent:
    """An agent's HTTP interface without a model: with faults that a real agent shows only by chance."""

    def __init__(self, name: str, respond: Respond | None = None) -> None:
        self.name = name
        self.respond = respond or self.answer
        self.requests: list[tuple[CIMultiDict[str], Any]] = []  # headers and body of each
        self.open = 0  # requests being answered
        self.silent = False  # accepts connections and does not answer
        self.prefixes: list[Prefix] = []  # of all requests that it has served
        self.status = AgentStatus(
            version=1,
            incarnation=f"{abs(hash(name)):032x}"[:32],
            state="ready",
            model="m",
            capacity=1000,
            device_tier=TierStatus(total=100, free=100),
        )
        self.url = ""
        self.released = asyncio.Event()  # what ``hold`` waits for
        self._changed = asyncio.Event()
        self._opened = asyncio.Event()
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> ScriptedAgent:
        await self.listen(0)
        return self

    async def listen(self, port: int) -> None:
        app = web.Application()
        app.router.add_get("/status", self._status)
        app.router.add_get("/prefixes", self._prefixes)
        app.router.add_get("/v1/models", self._serve)
        app.router.add_post("/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port, reuse_address=True).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    def change(self, **fields: Any) -> None:
        """Change fields of the status that it reports."""
        self.status = self.status.model_copy(update={**fields, "version": self.status.version + 1})
        self._changed.set()
        self._changed = asyncio.Event()

    async def _status(self, request: web.Request) -> web.Response:
        if request.query.get("since") == str(self.status.version):
            try:
                async with asyncio.timeout(float(request.query["wait"])):
                    await self._changed.wait()
            except TimeoutError:
                pass
        if self.silent:
            await asyncio.Event().wait()
        return web.Response(text=self.status.model_dump_json(), content_type="application/json")

    async def _prefixes(self, request: web.Request) -> web.Response:
        log = PrefixLog(self.status.incarnation)
        for prefix in self.prefixes:
            log.record(prefix)
        since, incarnation = int(request.query["since"]), request.query["incarnation"]
        report = await log.newer_than(since, incarnation, 0.2)
        return web.Response(text=report.model_dump_json(), content_type="application/json")

    async def until_open(self, count: int) -> None:
        """Wait until so many requests are being answered."""
        async with asyncio.timeout(60):
            while self.open != count:
                await self._opened.wait()

    def _opens(self, change: int) -> None:
        self.open += change
        self._opened.set()
        self._opened = asyncio.Event()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.requests.append((request.headers.copy(), json.loads(body) if body else None))
        self._opens(1)
        try:
            return await self.respond(request)
        finally:
            self._opens(-1)

    # ── Ways to respond ───────────────────────────────────────────────────────────────────────────

    async def answer(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response({"from": self.name})

    async def hold(self, _request: web.Request) -> web.StreamResponse:
        await self.released.wait()
        return web.json_response({"from": self.name})

    def refuse(self, status: int, code: str, **headers: str) -> Respond:
        async def respond(_request: web.Request) -> web.StreamResponse:
            error = {"message": f"{self.name} says {code}", "type": "t", "param": None, "code": code}
            return web.json_response({"error": error}, status=status, headers=headers)

        return respond

    async def reset(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    def stream(self, *texts: str, then: str = "end") -> Respond:
        """Events with these texts; then the end, an aborted connection, a wait, or an error of that code."""

        async def respond(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for number, text in enumerate(texts):
                last = then == "end" and number == len(texts) - 1
                choice = {
                    "index": 0,
                    "text": text,
                    "logprobs": None,
                    "finish_reason": "stop" if last else None,
                }
                event = {"id": self.name, "object": "text_completion", "created": 1, "choices": [choice]}
                await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            if then == "end":
                await response.write(b"data: [DONE]\n\n")
            elif then == "abort":
                assert request.transport is not None
                request.transport.abort()
            elif then == "hold":
                await self.released.wait()
            else:
                error = {"message": "over", "type": "t", "param": None, "code": then}
                await response.write(b"data: " + json.dumps({"error": error}).encode() + b"\n\n")
            return response

        return respond
