"""The agents' reports: one long poll per agent, and what it answered last.

A poll waits at the agent until its status changes, so an idle fleet costs one request per agent and 20 s. A
busy agent's status changes with every step; it is asked again after a pause that keeps the whole fleet below
``polls_per_second``. A service is marked dirty at once when something changed that decisions depend on
(state, incarnation, layout, an error that came or went), and after ``LOAD_DELAY`` when only load changed, so
that a steady fleet causes next to no work and no writes. Services that are scaled by load are marked after
``SCALED_DELAY``, or later if so many of them are busy that ``SCALED_ROUNDS`` would be exceeded. None of this
is traffic of the API server.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from pydantic import ValidationError

from ..agent.protocol import AgentStatus
from .observed import Pod, Report
from .workqueue import Key, WorkQueue

log = logging.getLogger("blockyard.operator.fleet")

WAIT = 20  # seconds that an agent may hold a poll
MARGIN = 10.0  # seconds that its answer may be late
FIRST_TIMEOUT = 5.0  # seconds for an agent that has not answered yet
DRAIN_TIMEOUT = 5.0
SHORTEST_PAUSE = 0.5  # seconds between two polls of one agent
DRAINING_PAUSE = 0.1  # a round waits for the end of the drain
FIRST_BACKOFF, LONGEST_BACKOFF = 1.0, 30.0
CONNECTING = 64  # agents that are connected to at once
LOAD_DELAY = 30.0  # seconds after which a change of load alone marks the service
SCALED_DELAY = 3.0  # the same for services that are scaled by their load
SCALED_ROUNDS = 200.0  # rounds a second that load may cause in all services that are scaled by it
LOAD_STEP = 5  # percent of the pool by which blocks must change to count as a change of load
LARGEST_ANSWER = 1 << 20


@dataclass(slots=True)
class _Agent:
    """One agent's pod, polled for as long as it exists."""

    key: Key
    name: str
    ip: str
    port: int
    tokens: tuple[str, ...]  # to be tried in this order
    since: float  # when it was first followed, by the loop's clock
    report: Report | None = None
    told: AgentStatus | None = None  # the status that the service was last marked dirty for
    urgent: bool = False  # poll it as often as is sensible
    ready: bool = False  # whether its pod is ready
    scaled: bool = False  # its load decides how many agents its service has
    wake: asyncio.Event = field(default_factory=asyncio.Event)  # ends the pause after an error
    task: asyncio.Task[None] | None = None


class Fleet:
    """Polls the agents of all services; ``report`` returns the last report of one."""

    def __init__(
        self,
        queue: WorkQueue,
        *,
        polls_per_second: float = 200.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._queue = queue
        self._rate = polls_per_second
        self._clock = clock
        self._agents: dict[str, _Agent] = {}  # by uid of the pod
        self._of: dict[Key, set[str]] = {}  # uids by service
        self._connecting = asyncio.Semaphore(CONNECTING)
        # Pods are reached by their IP, never through a proxy. A poll occupies a connection: no total limit.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, limit_per_host=4, keepalive_timeout=2 * WAIT),
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=1 << 14,
        )
        self.polls = 0
        self.errors = 0

    def __len__(self) -> int:
        return len(self._agents)

    def report(self, uid: str) -> Report | None:
        found = self._agents.get(uid)
        return None if found is None else found.report

    def unheard(self, key: Key) -> float:
        """Seconds for which a round should wait for the first reports of a service's agents; 0 if all are
        there.

        An operator that has just started has no reports of agents that have long been running. Decisions
        without them would be undone a moment later.
        """
        now = asyncio.get_running_loop().time()
        agents = [self._agents[uid] for uid in self._of.get(key, ())]
        waits = (agent.since + FIRST_TIMEOUT - now for agent in agents if agent.report is None)
        return max(waits, default=0.0)

    def follow(
        self, key: Key, pods: Mapping[str, Pod], tokens: tuple[str, ...], *, scaled: bool = False
    ) -> None:
        """Poll exactly these pods of a service, given by uid. Others are forgotten with their reports.

        ``scaled``: the number of agents depends on their load, so changes of load are reported soon.
        """
        for uid in self._of.get(key, set()) - pods.keys():
            self._forget(uid)
        for uid, pod in pods.items():
            agent = self._agents.get(uid)
            if not pod.ip or pod.finished:
                if agent is not None:
                    self._forget(uid)
                continue
            if agent is not None and (agent.ip, agent.port) != (pod.ip, pod.port):
                self._forget(uid)
                agent = None
            if agent is None:
                now = asyncio.get_running_loop().time()
                agent = _Agent(key, pod.name, pod.ip, pod.port, tokens, now)
                self._agents[uid] = agent
                self._of.setdefault(key, set()).add(uid)
                agent.task = asyncio.create_task(self._follow(agent), name=f"agent {pod.name}")
            if agent.tokens != tokens:
                agent.tokens = tokens
                agent.wake.set()  # the new one may be what was wanting
            agent.urgent = pod.draining_since is not None
            if pod.ready and not agent.ready:
                agent.wake.set()
            agent.ready, agent.scaled = pod.ready, scaled

    def _forget(self, uid: str) -> None:
        agent = self._agents.pop(uid)
        left = self._of[agent.key]
        left.discard(uid)
        if not left:
            del self._of[agent.key]
        if agent.task is not None:
            agent.task.cancel()

    async def drain(self, uid: str, timeout_s: float) -> str:
        """Ask an agent to drain; returns why that failed, or "". It may be asked again."""
        agent = self._agents.get(uid)
        if agent is None:
            return "the agent has no address yet"
        try:
            status = await self._ask(
                agent, "POST", "/drain", limit=DRAIN_TIMEOUT, json={"timeout_s": timeout_s}
            )
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            return f"POST /drain of {agent.name}: {_words(error)}"
        agent.urgent = True
        if self._agents.get(uid) is agent:
            self._take(agent, Report(status, at=self._clock()))
        return ""

    async def clear(self) -> None:
        """Forget all agents; no task is left."""
        tasks = [agent.task for agent in self._agents.values() if agent.task is not None]
        for uid in list(self._agents):
            self._forget(uid)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """Forget all agents; no task and no connection is left."""
        await self.clear()
        await self._session.close()

    # ── One agent ─────────────────────────────────────────────────────────────────────────────────

    async def _follow(self, agent: _Agent) -> None:
        backoff = FIRST_BACKOFF
        since: int | None = None
        while True:
            try:
                if since is None:
                    # The first answer comes at once, so this bounds the connections that are being made.
                    async with self._connecting:
                        status = await self._poll(agent, None)
                else:
                    status = await self._poll(agent, since)
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                self.errors += 1
                since = None
                now, before = self._clock(), agent.report
                began = before.failing_since if before is not None else None
                self._take(agent, Report(None, _words(error), now, now if began is None else began))
                agent.wake.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(agent.wake.wait(), backoff * random.uniform(0.5, 1.0))
                backoff = min(2 * backoff, LONGEST_BACKOFF)
                continue
            backoff = FIRST_BACKOFF
            since = status.version
            self._take(agent, Report(status, at=self._clock()))
            await asyncio.sleep(self._pause(agent) * random.uniform(0.8, 1.2))

    async def _poll(self, agent: _Agent, since: int | None) -> AgentStatus:
        query = {} if since is None else {"since": str(since), "wait": str(WAIT)}
        limit = FIRST_TIMEOUT if since is None else WAIT + MARGIN
        self.polls += 1
        return await self._ask(agent, "GET", "/status", limit=limit, params=query)

    async def _ask(self, agent: _Agent, method: str, path: str, *, limit: float, **body: Any) -> AgentStatus:
        """The agent's answer, which is its status; with the next token if it refuses one."""
        timeout = aiohttp.ClientTimeout(total=limit)
        url = self._url(agent, path)
        for last, token in ((token == agent.tokens[-1], token) for token in agent.tokens):
            headers = {"Authorization": f"Bearer {token}"}
            async with self._session.request(
                method, url, headers=headers, timeout=timeout, **body
            ) as response:
                if response.status != 401 or last:
                    return await _status(response)
        raise ValueError("there is no token for it")

    def _pause(self, agent: _Agent) -> float:
        if agent.urgent:
            return DRAINING_PAUSE
        return max(SHORTEST_PAUSE, len(self._agents) / self._rate)

    def _url(self, agent: _Agent, path: str) -> str:
        host = f"[{agent.ip}]" if ":" in agent.ip else agent.ip
        return f"http://{host}:{agent.port}{path}"

    def _take(self, agent: _Agent, report: Report) -> None:
        """Keep the report, and mark the service dirty at once or later, depending on what changed."""
        first, agent.report = agent.report is None, report
        before, now = agent.told, report.status
        if before is None or now is None:
            changed = first or before is not now
        else:
            changed = _decisive(before) != _decisive(now)
        if changed:
            agent.told = now
            self._queue.add(agent.key)
        elif before is not None and now is not None and _load_moved(before, now):
            agent.told = now
            self._queue.add_after(agent.key, self._load_delay(agent))

    def _load_delay(self, agent: _Agent) -> float:
        return max(SCALED_DELAY, len(self._of) / SCALED_ROUNDS) if agent.scaled else LOAD_DELAY


async def _status(response: aiohttp.ClientResponse) -> AgentStatus:
    """The status in an answer; ValueError if it has none."""
    body = await response.content.read(LARGEST_ANSWER)
    while chunk := await response.content.read(LARGEST_ANSWER):
        body += chunk
        if len(body) > LARGEST_ANSWER:
            raise ValueError(f"the answer is longer than {LARGEST_ANSWER} bytes")
    if response.status != 200:
        raise ValueError(f"HTTP status {response.status}: {body[:200].decode(errors='replace')}")
    try:
        return AgentStatus.model_validate_json(body)
    except ValidationError as error:
        raise ValueError(f"no status of an agent: {error.errors(include_url=False)[0]['msg']}") from None


def _decisive(status: AgentStatus) -> tuple[object, ...]:
    return status.state, status.incarnation, status.layout_digest, status.device_tier.total


def _load_moved(before: AgentStatus, now: AgentStatus) -> bool:
    if (before.running, before.waiting) != (now.running, now.waiting):
        return True
    total = max(1, now.device_tier.total)
    moved = (
        abs(now.device_tier.active - before.device_tier.active),
        abs(now.device_tier.cached - before.device_tier.cached),
    )
    return max(moved) * 100 >= LOAD_STEP * total


def _words(error: BaseException) -> str:
    return str(error) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)
