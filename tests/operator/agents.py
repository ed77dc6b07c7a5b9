"""Agents as the operator sees them: real HTTP servers whose status a test sets."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from blockyard.agent.protocol import AgentStatus, TierStatus


class Agents:
    """Agents at addresses of the loopback network, all on one port, as pods have it; 0 takes a free one.

    ``async with Agents() as agents``; then ``agents.add()`` gives the address of a new one.
    """

    def __init__(self, port: int = 0) -> None:
        self.port = port
        block = random.randrange(16, 64)
        self._block = iter(f"127.{block}.{a}.{b}" for a in range(256) for b in range(1, 255))
        self._runners: dict[str, web.AppRunner] = {}
        self.of: dict[str, Agent] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for ip in list(self._runners):
            await self.stop(ip)

    async def add(self, token: str | None = None, state: str = "ready") -> str:
        """A new agent's address."""
        ip = next(self._block)
        agent = Agent(token, state)
        self.of[ip] = agent
        await self._serve(ip, agent)
        return ip

    async def stop(self, ip: str) -> None:
        """Its process is gone: connections are refused."""
        await self.of[ip].let_go()
        await self._runners.pop(ip).cleanup()

    async def restart(self, ip: str) -> None:
        """Another life of the process at the same address."""
        self.of[ip].begin_life()
        await self._serve(ip, self.of[ip])

    async def _serve(self, ip: str, agent: Agent) -> None:
        runner = web.AppRunner(agent.make_app(), access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, ip, self.port).start()
        self.port = runner.addresses[0][1]
        self._runners[ip] = runner


class Agent:
    """The status of one, with versions and long polls, and what it was asked."""

    def __init__(self, token: str | None, state: str) -> None:
        self.token = token
        self.polls: list[dict[str, str]] = []
        self.drains: list[float] = []
        self.refuse_drain = 0  # so many POST /drain fail
        self.answer: Callable[[], web.Response] | None = None  # instead of a status
        self._changed = asyncio.Condition()
        self._open = True
        self.begin_life(state)

    def make_app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/status", self._status)
        app.router.add_post("/drain", self._drain)
        return app

    def begin_life(self, state: str = "ready") -> None:
        self._open = True
        tier = TierStatus(total=100, free=100, block_bytes=1 << 20)
        facts = {"version": 1, "incarnation": uuid.uuid4().hex, "state": state, "model": "m"}
        self.status = AgentStatus.model_validate({**facts, "device_tier": tier, "max_num_seqs": 8})

    async def set(self, **changes: Any) -> None:
        async with self._changed:
            version = self.status.version + 1
            self.status = self.status.model_copy(update={"version": version, **changes})
            self._changed.notify_all()

    async def used(self, active: int, cached: int = 0) -> None:
        tier = TierStatus(
            total=100, free=100 - active - cached, cached=cached, active=active, block_bytes=1 << 20
        )
        await self.set(device_tier=tier)

    async def polled(self, times: int, limit: float = 30.0) -> None:
        """Until it has been asked so often."""
        async with asyncio.timeout(limit), self._changed:
            await self._changed.wait_for(lambda: len(self.polls) >= times)

    async def asked_to_drain(self, limit: float = 30.0) -> None:
        async with asyncio.timeout(limit), self._changed:
            await self._changed.wait_for(lambda: self.drains)

    async def let_go(self) -> None:
        async with self._changed:
            self._open = False
            self._changed.notify_all()

    async def _status(self, request: web.Request) -> web.Response:
        async with self._changed:
            self.polls.append(dict(request.query))
            self._changed.notify_all()
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"error": "who are you?"}, status=401)
        if self.answer is not None:
            return self.answer()
        if "since" in request.query:
            since, wait = int(request.query["since"]), float(request.query["wait"])
            try:
                async with asyncio.timeout(wait), self._changed:
                    await self._changed.wait_for(lambda: self.status.version != since or not self._open)
            except TimeoutError:
                pass
        return web.Response(text=self.status.model_dump_json(), content_type="application/json")

    async def _drain(self, request: web.Request) -> web.Response:
        if self.refuse_drain:
            self.refuse_drain -= 1
            return web.json_response({}, status=500)
        self.drains.append(float((await request.json())["timeout_s"]))
        await self.set(state="draining")
        return web.Response(text=self.status.model_dump_json(), content_type="application/json")
