"""The agent's status for the outside: made of the engine's numbers, with a version, and with waiting.

The version is increased when something in the report changes, not when somebody asks. So a long poll with the
last version seen misses no change and returns only for a change.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import Any

from .engine_client import EngineClient
from .protocol import AgentState, AgentStatus, PrefixStatus, TierStatus

_OF_ENGINE = ("layout_digest", "dtype", "device", "block_tokens", "max_model_len", "max_num_seqs")
_OF_STATS = (
    "running",
    "waiting",
    "swapped",
    "finished",
    "steps",
    "last_step_ms",
    "mean_step_ms",
    "prompt_tokens",
    "generated_tokens",
    "prefix_queries",
    "prefix_hits",
    "preemptions_recompute",
    "preemptions_swap",
)


class StatusBoard:
    """Owns the agent's state, its incarnation and the version of its report."""

    def __init__(self, engine: EngineClient, model: str, max_queue: int) -> None:
        self.state: AgentState = "starting"
        self._engine = engine
        self._model = model
        self._max_queue = max_queue
        self.incarnation = uuid.uuid4().hex
        self._version = 0
        self._facts: dict[str, Any] = {}
        self._waiters: set[asyncio.Event] = set()
        self.refresh()

    @property
    def capacity(self) -> int:
        """Requests held at most, running and queued; 0 before the engine is loaded."""
        return 0 if self._engine.ready is None else self._engine.ready.max_num_seqs + self._max_queue

    def enter(self, state: AgentState) -> None:
        self.state = state
        self.refresh()

    def refresh(self) -> None:
        """Something may have changed: if so, increase the version and wake the long polls."""
        facts = self._gather()
        if facts != self._facts:
            self._facts = facts
            self._version += 1
            for waiter in self._waiters:
                waiter.set()

    def report(self) -> AgentStatus:
        return AgentStatus(
            version=self._version, incarnation=self.incarnation, model=self._model, **self._facts
        )

    async def next_change(self) -> None:
        waiter = asyncio.Event()
        self._waiters.add(waiter)
        try:
            await waiter.wait()
        finally:
            self._waiters.discard(waiter)

    async def newer_than(self, version: int, seconds: float) -> AgentStatus:
        """The report, once its version is another one, or after ``seconds`` at the latest."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._version == version:
                    await self.next_change()
        return self.report()

    def _gather(self) -> dict[str, Any]:
        stats, ready = self._engine.stats, self._engine.ready
        return {
            **({} if ready is None else {name: getattr(ready, name) for name in _OF_ENGINE}),
            **{name: getattr(stats, name) for name in _OF_STATS},
            "state": self.state,
            "in_flight": self._engine.in_flight,
            "capacity": self.capacity,
            "commands_pending": self._engine.commands_pending,
            "device_tier": TierStatus.model_validate(stats.device, from_attributes=True),
            "host_tier": TierStatus.model_validate(stats.host, from_attributes=True),
            "hottest_prefixes": [
                PrefixStatus.model_validate(p, from_attributes=True) for p in stats.hottest_prefixes
            ],
        }
