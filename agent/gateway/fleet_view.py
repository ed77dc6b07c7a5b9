"""The agents as a gateway sees them: their status and prefixes, followed by long polls.

An agent whose last report is old is no longer chosen, but not forgotten: perhaps only the network is slow.
When it stays silent, or comes back as another incarnation, the attempts that still wait for it are ended,
because a machine that has failed does not close its connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from typing import Any

import aiohttp
from pydantic import ValidationError

from ..bearer import Tokens, authorizations
from ..prefix_sketch import PrefixReport
from ..protocol import AgentStatus
from .endpoints import Endpoint, Endpoints
from .prefix_mirror import PrefixMirror
from .routing import AgentView

log = logging.getLogger("blockyard.gateway")

POLL_WAIT = 4.0  # seconds a long poll may last
ANSWER_TIMEOUT = 6.0  # seconds for an answer beyond that
STALE_AFTER = 6.0  # seconds after its last report an agent is no longer chosen
LOST_AFTER = 9.0  # seconds after its last report the attempts at it are ended
POLL_INTERVAL = 0.05  # least seconds between two polls; the status of a busy agent changes with every step
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0  # seconds before an agent that did not answer is asked again
NO_PREFIXES_PAUSE = 30.0  # seconds before an agent that does not know /prefixes is asked again

Abandon = Callable[[str], None]


class Agent:
    """One agent: its last report, and the attempts that are under way there."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.status: AgentStatus | None = None
        self.seen = 0.0  # when it reported last, by the event loop's clock
        self.error = "it has not been asked yet"  # why it cannot be reached; empty if it can
        self.removed = False  # no longer among the endpoints
        self.prefixes = PrefixMirror()
        self.attempts: set[Abandon] = set()

    @property
    def incarnation(self) -> str:
        return "" if self.status is None else self.status.incarnation

    def stale(self, now: float) -> bool:
        return self.status is None or now - self.seen > STALE_AFTER

    def ready(self, now: float) -> bool:
        return (
            not self.removed
            and not self.error
            and not self.stale(now)
            and self.status is not None
            and self.status.state == "ready"
        )

    def view(self, now: float) -> AgentView:
        status = self.status
        if status is None:
            return AgentView(self.endpoint.name, ready=False)
        return AgentView(
            name=self.endpoint.name,
            incarnation=status.incarnation,
            ready=self.ready(now),
            # The report does not include what was sent a moment ago.
            in_flight=max(status.in_flight, len(self.attempts)),
            waiting=status.waiting,
            capacity=status.capacity,
            used=status.device_tier.active / max(1, status.device_tier.total),
            prefixes=self.prefixes,
        )

    def reported(self, status: AgentStatus, now: float) -> None:
        if self.status is not None and self.status.incarnation != status.incarnation:
            self.abandon("the agent was restarted")
        self.status, self.seen, self.error = status, now, ""

    def abandon(self, why: str) -> None:
        """End every attempt that waits for this agent, with the reason."""
        for attempt in list(self.attempts):
            attempt(why)

    def described(self, now: float) -> dict[str, Any]:
        status = self.status
        return {
            "name": self.endpoint.name,
            "url": self.endpoint.url,
            "ready": self.ready(now),
            "stale": self.stale(now),
            "removed": self.removed,
            "error": self.error,
            "seconds_since_report": None if status is None else round(now - self.seen, 3),
            "requests_from_here": len(self.attempts),
            "prefix_hashes": len(self.prefixes),
            "status": None if status is None else status.model_dump(mode="json"),
        }


class FleetView:
    """Follows the endpoints and the agents at them. Run ``run`` for as long as it is used."""

    def __init__(self, endpoints: Endpoints, session: aiohttp.ClientSession, tokens: Tokens) -> None:
        self._endpoints = endpoints
        self._session = session
        self._tokens = tokens
        self._agents: dict[Endpoint, Agent] = {}
        self._tasks: dict[Endpoint, list[asyncio.Task[None]]] = {}
        self._waiters: set[asyncio.Event] = set()

    # ── What is known ─────────────────────────────────────────────────────────────────────────────

    def agents(self) -> list[Agent]:
        return list(self._agents.values())

    def views(self) -> list[AgentView]:
        now = _now()
        return [agent.view(now) for agent in self._agents.values()]

    def of(self, view: AgentView) -> Agent:
        """The agent that a view is of. KeyError if it is gone."""
        for agent in self._agents.values():
            if agent.endpoint.name == view.name and agent.incarnation == view.incarnation:
                return agent
        raise KeyError(view.key)

    def ready(self) -> int:
        now = _now()
        return sum(agent.ready(now) for agent in self._agents.values())

    def described(self) -> list[dict[str, Any]]:
        now = _now()
        return [agent.described(now) for agent in self._agents.values()]

    def problems(self) -> str:
        """Why no agent is ready, for people."""
        now = _now()

        def problem(agent: Agent) -> str:
            if agent.error:
                return agent.error
            if agent.stale(now):
                return f"no report for {now - agent.seen:.0f} s"
            return "unknown" if agent.status is None else agent.status.state

        listed = [f"{a.endpoint.name}: {problem(a)}" for a in self._agents.values() if not a.ready(now)]
        more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
        return ("; ".join(listed[:4]) + more) if listed else "none is known"

    async def next_change(self, seconds: float) -> None:
        """Wait until something about the agents changes, ``seconds`` at most."""
        waiter = asyncio.Event()
        self._waiters.add(waiter)
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(waiter.wait(), seconds)
        finally:
            self._waiters.discard(waiter)

    def _changed(self) -> None:
        for waiter in self._waiters:
            waiter.set()

    def suspect(self, agent: Agent, why: str) -> None:
        """A request could not reach the agent: do not choose it until it reports again."""
        agent.error = why
        self._changed()

    # ── Following ─────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Follow endpoints and agents until cancelled."""
        try:
            async with contextlib.aclosing(self._endpoints.watch()) as changes:
                async for endpoints in changes:
                    self._take(endpoints)
        finally:
            tasks = [task for tasks in self._tasks.values() for task in tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _take(self, endpoints: frozenset[Endpoint]) -> None:
        for endpoint, agent in self._agents.items():
            agent.removed = endpoint not in endpoints
        for endpoint in sorted(endpoints - self._agents.keys()):
            log.info("agent added name=%s url=%s", endpoint.name, endpoint.url)
            agent = self._agents[endpoint] = Agent(endpoint)
            self._tasks[endpoint] = [
                asyncio.create_task(self._follow(agent)),
                asyncio.create_task(self._follow_prefixes(agent)),
            ]
        for agent in list(self._agents.values()):
            if agent.removed and not agent.attempts:
                self._forget(agent)
        self._changed()

    def _forget(self, agent: Agent) -> None:
        log.info("agent removed name=%s url=%s", agent.endpoint.name, agent.endpoint.url)
        agent.abandon("the agent was removed")
        del self._agents[agent.endpoint]
        for task in self._tasks.pop(agent.endpoint):
            task.cancel()
        self._changed()

    async def _follow(self, agent: Agent) -> None:
        """Ask for the status again and again; for a removed agent until its last attempt has ended."""
        pause, version = FIRST_PAUSE, None
        while True:
            try:
                status = await self._ask_status(agent, version)
            except (aiohttp.ClientError, OSError, TimeoutError, ValidationError, _Refused) as error:
                version = None  # the agent may come back as another incarnation
                problem = _described(error)
                if agent.error != problem:
                    log.warning("agent lost name=%s: %s", agent.endpoint.name, problem)
                    agent.error = problem
                    self._changed()
                if _now() - agent.seen > LOST_AFTER:
                    agent.abandon(f"the agent cannot be reached: {problem}")
                wait = pause * random.uniform(0.5, 1.0)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if agent.error:
                    log.info("agent found name=%s state=%s", agent.endpoint.name, status.state)
                agent.reported(status, _now())
                version, pause, wait = status.version, FIRST_PAUSE, POLL_INTERVAL
                self._changed()
            if agent.removed and not agent.attempts:
                self._forget(agent)
                return
            await asyncio.sleep(wait)

    async def _ask_status(self, agent: Agent, version: int | None) -> AgentStatus:
        query = {} if version is None else {"since": str(version), "wait": f"{POLL_WAIT:g}"}
        return AgentStatus.model_validate_json(await self._get(agent, "/status", query))

    async def _follow_prefixes(self, agent: Agent) -> None:
        pause = FIRST_PAUSE
        while True:
            mirror = agent.prefixes
            query = {
                "since": str(mirror.version),
                "incarnation": mirror.incarnation,
                "wait": f"{POLL_WAIT:g}",
            }
            try:
                report = PrefixReport.model_validate_json(await self._get(agent, "/prefixes", query))
                mirror.update(report)
            except _Refused as error:
                wait = NO_PREFIXES_PAUSE if error.status == 404 else LONGEST_PAUSE
            except (
                aiohttp.ClientError,
                OSError,
                TimeoutError,
                ValueError,
            ):  # the poll of the status reports it
                wait, pause = pause, min(2 * pause, LONGEST_PAUSE)
            else:
                wait, pause = POLL_INTERVAL, FIRST_PAUSE
            await asyncio.sleep(wait)

    async def _get(self, agent: Agent, path: str, query: dict[str, str]) -> bytes:
        limit = aiohttp.ClientTimeout(total=POLL_WAIT + ANSWER_TIMEOUT)
        url = agent.endpoint.url + path
        for headers in authorizations(self._tokens):
            async with self._session.get(url, params=query, headers=headers, timeout=limit) as response:
                status = response.status
                if status == 200:
                    return await response.read()
            if status not in (401, 403):
                break
        raise _Refused(path, status)


class _Refused(Exception):
    """The agent answers with an error status."""

    def __init__(self, path: str, status: int) -> None:
        super().__init__(f"{path} answers {status}" + (" (check the token)" if status == 401 else ""))
        self.status = status


def _described(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ValidationError):
        return f"its status cannot be read: {error.errors(include_url=False)[0]['msg']}"
    return str(error) or type(error).__name__


def _now() -> float:
    return asyncio.get_running_loop().time()
