"""Which beginnings of prompts this agent has served, in order of use, for gateways to follow.

The log forgets the beginnings that were used longest ago, when together they cover more text than the pool
has room for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Iterator

from .prefix_sketch import (
    BOUNDARIES,
    CHARACTERS_PER_TOKEN,
    LONGEST,
    MAX_ENTRIES,
    Prefix,
    PrefixReport,
    PrefixUse,
)


class PrefixLog:
    """The agent's own record; every recorded prompt is one version.

    ``incarnation`` is the agent's: versions of two incarnations cannot be compared.
    """

    def __init__(self, incarnation: str) -> None:
        self._incarnation = incarnation
        self._version = 0
        self._oldest = 0
        self._characters = 0  # covered by all hashes
        self._room = LONGEST
        self._used: OrderedDict[int, tuple[int, int]] = OrderedDict()  # hash -> (version, characters)
        self._waiters: set[asyncio.Event] = set()

    def __contains__(self, entry: object) -> bool:
        return entry in self._used

    def __len__(self) -> int:
        return len(self._used)

    def __iter__(self) -> Iterator[int]:
        return iter(self._used)

    def resize(self, pool_tokens: int) -> None:
        """Set the room to the text of so many tokens, as much as the block pool can hold."""
        self._room = pool_tokens * CHARACTERS_PER_TOKEN
        self._forget()

    def record(self, prefix: Prefix) -> None:
        """A prompt has been handed to the engine."""
        if not prefix.hashes:
            return
        self._version += 1
        begin = 0
        for entry, end in zip(prefix.hashes, BOUNDARIES, strict=False):
            if entry in self._used:
                self._used.move_to_end(entry)
            else:
                self._characters += end - begin
            self._used[entry] = (self._version, end - begin)
            begin = end
        self._forget()
        for waiter in self._waiters:
            waiter.set()

    def _forget(self) -> None:
        """Drop whole versions, the oldest first and never the newest, so that a mirror needs only the number
        of the oldest version that is left.
        """
        while self._used:
            version, _ = next(iter(self._used.values()))
            self._oldest = version
            if version == self._version or (
                self._characters <= self._room and len(self._used) <= MAX_ENTRIES
            ):
                return
            while self._used and next(iter(self._used.values()))[0] == version:
                _, (_, characters) = self._used.popitem(last=False)
                self._characters -= characters

    def report(self, since: int = 0) -> PrefixReport:
        """What was used after version ``since``."""
        uses: list[PrefixUse] = []
        for entry, (version, _) in reversed(self._used.items()):
            if version <= since:
                break
            if not uses or uses[-1].version != version:
                uses.append(PrefixUse(version=version, hashes=[]))
            uses[-1].hashes.append(f"{entry:016x}")
        uses.reverse()
        return PrefixReport(
            incarnation=self._incarnation, version=self._version, oldest=self._oldest, uses=uses
        )

    async def newer_than(self, since: int, incarnation: str, seconds: float) -> PrefixReport:
        """What was used after version ``since``: as soon as there is something, or after ``seconds`` at the
        latest.

        Everything, and at once, if ``since`` is a version of another incarnation.
        """
        if incarnation != self._incarnation or since > self._version:
            return self.report()
        if self._version == since:
            waiter = asyncio.Event()
            self._waiters.add(waiter)
            try:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(waiter.wait(), seconds)
            finally:
                self._waiters.discard(waiter)
        return self.report(since)
