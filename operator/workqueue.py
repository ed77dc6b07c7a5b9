"""The queue of services to reconcile: equal keys coalesce, one worker per key, back-off after errors.

The design is client-go's work queue: a key that is added while it waits stays one key; a key that is added
while a worker has it is queued again when the worker is done. So a burst of events costs one or two rounds,
and a slow service delays only itself.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

Key = tuple[str, str]  # namespace and name of an LLMService

FIRST_RETRY = 0.5  # seconds after the first failure; doubled with each that follows
LONGEST_RETRY = 60.0


class WorkQueue:
    """Keys in the order in which they became due."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock or asyncio.get_running_loop().time
        self._ready: deque[Key] = deque()
        self._since: dict[Key, float] = {}  # waiting keys, and since when they are due
        self._working: dict[Key, float] = {}  # keys that a worker has taken, and when
        self._again: set[Key] = set()  # of those, the ones added meanwhile
        self._later: dict[Key, asyncio.TimerHandle] = {}
        self._failures: dict[Key, int] = {}
        self._wakeup = asyncio.Event()

    def __len__(self) -> int:
        """Keys that are due and that no worker has taken."""
        return len(self._since)

    def add(self, key: Key) -> None:
        """The key is due now."""
        if (timer := self._later.pop(key, None)) is not None:
            timer.cancel()
        if key in self._working:
            self._again.add(key)
        elif key not in self._since:
            self._since[key] = self._clock()
            self._ready.append(key)
            self._wakeup.set()

    def add_after(self, key: Key, seconds: float) -> None:
        """The key is due in so many seconds, unless it becomes due before."""
        loop = asyncio.get_running_loop()
        when, timer = loop.time() + seconds, self._later.get(key)
        if key in self._since or key in self._again:
            return
        if timer is not None:
            if timer.when() <= when:
                return
            timer.cancel()
        self._later[key] = loop.call_at(when, self.add, key)

    async def take(self) -> tuple[Key, float]:
        """The next key, for this worker alone until ``done``; and the seconds that it has waited."""
        while not self._ready:
            self._wakeup.clear()
            await self._wakeup.wait()
        key = self._ready.popleft()
        waited = self._clock() - self._since.pop(key)
        self._working[key] = self._clock()
        return key, waited

    def done(self, key: Key) -> None:
        """The worker has finished with the key, whatever the result."""
        del self._working[key]
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def failed(self, key: Key) -> float:
        """Make the key due again after a pause that doubles with each failure in a row -> the pause in
        seconds.

        ``add`` still makes it due at once: a change may be what it waited for.
        """
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        pause = min(FIRST_RETRY * 2.0**failures, LONGEST_RETRY)
        self.add_after(key, pause)
        return pause

    def succeeded(self, key: Key) -> None:
        self._failures.pop(key, None)

    def oldest(self) -> float:
        """Seconds for which the oldest key has been waiting or worked on; 0 if there is none."""
        times = (*self._since.values(), *self._working.values())
        return self._clock() - min(times) if times else 0.0

    def close(self) -> None:
        """Forget all keys but those in a worker's hands, and cancel all timers."""
        for timer in self._later.values():
            timer.cancel()
        self._later.clear()
        self._ready.clear()
        self._since.clear()
        self._again.clear()
        self._failures.clear()

    def check(self) -> None:
        """Invariants: a key waits once, and never while a worker has it."""
        assert len(self._ready) == len(self._since) == len(set(self._ready))
        assert set(self._ready) == set(self._since)
        assert not set(self._since) & set(self._working)
        assert self._again <= set(self._working)
        assert not set(self._later) & set(self._since)
