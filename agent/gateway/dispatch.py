"""One request on its way to an agent: which agent is next, how often, and how long to wait in between.

An agent at which an attempt failed is not asked again for a while: as long as it said itself (Retry-After),
or longer each time. Other agents are asked at once. When none is left the request waits, at most ``patience``
seconds in all; the time in which an agent works on it does not count.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from ..errors import Unavailable
from ..prefix_sketch import Prefix
from .fleet_view import Agent, FleetView
from .metrics import GatewayMetrics
from .routing import Choice, choose

log = logging.getLogger("blockyard.gateway")

FIRST_PAUSE = 0.25  # seconds for which an agent that failed is not asked again; doubled each time


class Failure(Exception):
    """An attempt that another agent, or a later one, may do better."""

    def __init__(
        self, reason: str, message: str, *, retry_after: float | None = None, unreachable: bool = False
    ) -> None:
        super().__init__(message)
        self.reason = reason  # one word, for metrics
        self.retry_after = retry_after
        self.unreachable = unreachable


@dataclass(frozen=True, slots=True)
class Pick:
    """An agent that a request is sent to, and why it was this one."""

    agent: Agent
    choice: Choice
    number: int  # of the attempt, from 1

    @property
    def name(self) -> str:
        return self.agent.endpoint.name

    @property
    def why(self) -> str:
        return self.choice.why if self.number == 1 else f"attempt {self.number}, {self.choice.why}"


class Dispatch:
    """The attempts of one request."""

    def __init__(
        self,
        fleet: FleetView,
        metrics: GatewayMetrics,
        prefix: Prefix,
        *,
        request_id: str,
        max_attempts: int,
        patience: float,
    ) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._prefix = prefix
        self._id = request_id
        self._max_attempts = max_attempts
        self._patience = patience
        self._attempts = 0
        self._until: dict[str, float] = {}  # by an agent's key: when it may be asked again
        self._failures: dict[str, int] = {}
        self._last: Failure | None = None

    async def next(self) -> Pick:
        """The agent to ask now. Unavailable if there was none for too long, or too many have failed."""
        loop = asyncio.get_running_loop()
        while True:
            if self._attempts >= self._max_attempts:
                raise self._given_up(f"{self._attempts} attempts failed")
            now = loop.time()
            resting = {key for key, until in self._until.items() if until > now}
            views = self._fleet.views()
            ranked = choose(self._prefix, views, resting)
            if ranked:
                return self._picked(ranked[0])
            # Only agents that are ready will be worth asking when their pause is over.
            rests = [self._until[view.key] - now for view in views if view.ready and view.key in resting]
            if min(rests, default=0.0) > self._patience or self._patience <= 0:
                raise self._given_up("there is no other agent")
            await self._fleet.next_change(min([*rests, self._patience]))
            self._patience -= loop.time() - now

    def _picked(self, choice: Choice) -> Pick:
        self._attempts += 1
        agent = self._fleet.of(choice.agent)
        agent.prefixes.expect(self._prefix)
        pick = Pick(agent, choice, self._attempts)
        log.info("attempt id=%s number=%d agent=%s: %s", self._id, pick.number, pick.name, choice.why)
        return pick

    def failed(self, pick: Pick, failure: Failure) -> None:
        """The attempt failed: do not ask its agent again for a while."""
        key = pick.choice.agent.key
        self._last = failure
        self._failures[key] = self._failures.get(key, 0) + 1
        pause = FIRST_PAUSE * 2 ** (self._failures[key] - 1)
        self._until[key] = asyncio.get_running_loop().time() + (failure.retry_after or pause)
        self._metrics.retries.labels(failure.reason).inc()
        if failure.unreachable:
            self._fleet.suspect(pick.agent, str(failure))
        log.warning(
            "attempt failed id=%s number=%d agent=%s reason=%s: %s",
            self._id, pick.number, pick.name, failure.reason, failure,
        )  # fmt: skip

    def _given_up(self, why: str) -> Unavailable:
        if self._last is None:
            return Unavailable(
                f"no agent is ready ({self._fleet.problems()}); try again later",
                status=503,
                code="no_agent_ready",
                retry_after=5,
            )
        busy = self._last.reason == "busy"
        return Unavailable(
            f"{why}; the last one: {self._last}. Try again later",
            status=429 if busy else 503,
            code="queue_full" if busy else "agents_failed",
            retry_after=max(1, round(self._last.retry_after or 5)),
        )
