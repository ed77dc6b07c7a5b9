"""Which prompts an agent has served, small enough to be told to every gateway.

A prompt is sketched by hashes of its growing beginnings: 64 characters, 128, 192, ... and, beyond 1024, in
steps of a sixteenth, so that the longest prompt has fewer than two hundred. Two prompts share a hash exactly
if they begin with the same text, so the last hash they share tells how much KV one can reuse of the other.
Text and not tokens, because a gateway has no tokenizer; a tenant's beginnings only equal its own, as its KV
blocks do. The sketch is a hint: what it gets wrong costs time, never an answer.

``PrefixLog`` is the agent's side, ``PrefixMirror`` the gateway's. The log forgets the beginnings that were
used longest ago, when together they cover more text than the pool has room for; the mirror is brought up
to date with what changed since the version it has.
"""

from __future__ import annotations

import asyncio
import contextlib
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

from pydantic import BaseModel, Field

FIRST_STEP = 64  # characters; about one KV block of 16 tokens
LONGEST = 1 << 24  # characters of a prompt that are looked at
CHARACTERS_PER_TOKEN = 4  # a rough mean over languages and tokenizers
MAX_ENTRIES = 1 << 14  # hashes that a log holds at most


def _boundaries() -> list[int]:
    found = [FIRST_STEP]
    while found[-1] < LONGEST:
        found.append(found[-1] + max(FIRST_STEP, found[-1] // 16))
    return found


BOUNDARIES = _boundaries()  # lengths, in characters, at which a prompt's beginning is hashed


@dataclass(frozen=True, slots=True)
class Prefix:
    """The sketch of one prompt: ``hashes[i]`` is that of its first ``BOUNDARIES[i]`` characters."""

    hashes: tuple[int, ...] = ()
    length: int = 0

    def shared_with(self, known: PrefixMirror | PrefixLog | frozenset[int]) -> int:
        """How many characters at its beginning are known there.

        Whoever knows a beginning knows all shorter ones of it: they were used with it, and are forgotten
        no sooner.
        """
        first_unknown = bisect_left(self.hashes, True, key=lambda entry: entry not in known)
        return BOUNDARIES[first_unknown - 1] if first_unknown else 0


def sketch(parts: Iterable[str], tenant: str) -> Prefix:
    """The sketch of a prompt that is given in parts; how it is cut into parts makes no difference."""
    text = "".join(parts)[:LONGEST]
    digest = blake2b(tenant.encode("utf-8", "surrogatepass"), digest_size=8)
    digest.update(b"\0")
    hashes, begin = [], 0
    for end in BOUNDARIES[: bisect_right(BOUNDARIES, len(text))]:
        digest.update(text[begin:end].encode("utf-8", "surrogatepass"))
        hashes.append(int.from_bytes(digest.digest(), "big"))
        begin = end
    return Prefix(tuple(hashes), len(text))


def chat_parts(messages: Iterable[tuple[str, str]]) -> Iterator[str]:
    """A conversation, given as (role, text), so that a longer one begins with a shorter one."""
    for role, text in messages:
        yield f"{role}\0"
        yield text
        yield "\0"


def prompt_parts(prompt: str | list[int]) -> Iterator[str]:
    """A prompt that is text or token ids."""
    if isinstance(prompt, str):
        yield prompt
    else:
        yield "\0"  # ids are no text
        yield " ".join(map(str, prompt))


class PrefixUse(BaseModel):
    """The hashes that one request has used, as 16 hexadecimal digits each."""

    version: int
    hashes: list[str]


class PrefixReport(BaseModel):
    """What ``GET /prefixes`` answers."""

    incarnation: str
    version: int = Field(description="pass it as ?since=, with the incarnation, to wait for what comes next")
    oldest: int = Field(description="hashes last used by an older version are forgotten")
    uses: list[PrefixUse] = Field(description="all uses after since, the oldest first")


class PrefixLog:
    """The agent's own record; every recorded prompt is one version.

    ``incarnation`` is the agent's: versions of different lives cannot be compared.
    """

    def __init__(self, incarnation: str) -> None:
        self._incarnation = incarnation
        self._version = 0
        self._oldest = 0
        self._characters = 0  # covered by all hashes
        self._room = LONGEST
        self._used: OrderedDict[int, tuple[int, int]] = OrderedDict()  # hash -> (version, characters)
        self._waiters: set[asyncio.Event] = set()

    def __contains__(self, entry: int) -> bool:
        return entry in self._used

    def __len__(self) -> int:
        return len(self._used)

    def __iter__(self) -> Iterator[int]:
        return iter(self._used)

    def resize(self, pool_tokens: int) -> None:
        """From now on remember about as much text as so many tokens are."""
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
        """Whole versions at a time, the newest never: a mirror needs only to know the oldest that is left."""
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
        """What was used after ``since``: once there is something, or after ``seconds`` at the latest.

        Everything, and at once, if ``since`` is a version of another life.
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


class PrefixMirror:
    """A gateway's copy of one agent's log."""

    def __init__(self) -> None:
        self.incarnation = ""
        self.version = 0
        self._used: OrderedDict[int, int] = OrderedDict()  # hash -> version

    def __contains__(self, entry: int) -> bool:
        return entry in self._used

    def __len__(self) -> int:
        return len(self._used)

    def __iter__(self) -> Iterator[int]:
        return iter(self._used)

    def update(self, report: PrefixReport) -> None:
        """Take over a report that was asked for with this mirror's version and incarnation.

        ValueError if it has a hash that is none.
        """
        if report.incarnation != self.incarnation:
            self._used.clear()  # versions of another life cannot be compared
            self.incarnation = report.incarnation
        for use in report.uses:
            for text in use.hashes:
                self._use(int(text, 16), use.version)
        self.version = report.version
        self._forget_before(report.oldest)

    def expect(self, prefix: Prefix) -> None:
        """A request has just been sent there: count on it before the agent says so."""
        for entry in prefix.hashes:
            self._use(entry, self.version + 1)
        while len(self._used) > 2 * MAX_ENTRIES:
            self._forget_before(next(iter(self._used.values())) + 1)

    def _forget_before(self, version: int) -> None:
        while self._used and next(iter(self._used.values())) < version:
            self._used.popitem(last=False)

    def _use(self, entry: int, version: int) -> None:
        self._used[entry] = version
        self._used.move_to_end(entry)
