"""Draining: no new requests, those that run go on until a deadline, and what is left then is cut off.

The process stays alive and reports that it is drained until it is ended from outside. So asking for a drain
can be repeated safely, also by an operator that was restarted in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from pydantic import Field

from .engine_client import EngineClient
from .openai_api import Strict
from .protocol import AgentState
from .status_board import StatusBoard

log = logging.getLogger("blockyard.agent")


class DrainRequest(Strict):
    """``POST /drain``."""

    timeout_s: float = Field(ge=0, le=86400, description="seconds that running requests get")


class Drain:
    """There is at most one drain at a time; asking again can only bring its deadline nearer."""

    def __init__(
        self,
        board: StatusBoard,
        engine: EngineClient,
        enter: Callable[[AgentState], None],
        cut_off: Callable[[str], None],
    ) -> None:
        self._board = board
        self._engine = engine
        self._enter = enter
        self._cut_off = cut_off
        self._task: asyncio.Task[None] | None = None
        self._scope: asyncio.Timeout | None = None  # of the wait for running requests

    def begin(self, seconds: float) -> None:
        """Return at once; the progress is in the status."""
        deadline = asyncio.get_running_loop().time() + seconds
        if self._task is None:
            if self._board.state in ("drained", "failed"):
                return
            self._enter("draining")
            self._scope = asyncio.timeout_at(deadline)
            self._task = asyncio.create_task(self._run(self._scope, seconds))
        elif self._scope is not None and deadline < (self._scope.when() or deadline):
            log.info("the drain's deadline is now in %g s", seconds)
            self._scope.reschedule(deadline)

    async def _run(self, scope: asyncio.Timeout, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with scope:
                await self.requests_ended()
        self._scope = None
        if self._engine.in_flight:
            self._cut_off(f"it was told to drain within {seconds:g} seconds")
            await self.requests_ended()
        if self._board.state != "failed":
            self._enter("drained")

    async def requests_ended(self) -> None:
        """Until no client holds a request open."""
        while self._engine.in_flight:
            await self._board.next_change()
