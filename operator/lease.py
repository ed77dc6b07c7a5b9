"""One operator acts at a time: a guard over a coordination.k8s.io/v1 Lease.

The rules are those of client-go's leader election, which kopf does not have. The times in the Lease are only
for people: each contender measures on its own monotonic clock how long it has seen the Lease unchanged, so
clocks need not agree. A contender takes over after 15 s without change; the holder stops acting 10 s after it
*sent* its last successful renewal. The 5 s between are for requests on their way; both bounds count from
before the write was sent, so an answer that comes late makes the holder stop earlier, never later.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Protocol

from .kube import LEASE, Conflict, Kind, KubeError, Raw

log = logging.getLogger("blockyard.operator.lease")

DURATION = 15.0  # seconds without change after which others take the Lease
DEADLINE = 10.0  # seconds after its last renewal was sent in which a holder may act
RENEW = 5.0  # seconds between renewals
RETRY = 1.0  # seconds after a renewal that failed
CALL_TIMEOUT = 4.0


class LeaseApi(Protocol):
    """The methods of ``Kube`` that are needed here."""

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Raw | None: ...
    async def create(self, body: Raw) -> Raw: ...
    async def replace(self, body: Raw) -> Raw: ...


class Lease:
    """This process's claim on one Lease."""

    def __init__(
        self,
        api: LeaseApi,
        namespace: str,
        name: str,
        identity: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = api
        self._namespace, self._name, self.identity = namespace, name, identity
        self._clock = clock
        self._until = float("-inf")  # this process may act until then, by the monotonic clock
        self._seen: tuple[str, str] = (
            "",
            "",
        )  # holder and version in the last change of the Lease that we saw
        self._seen_at = clock()
        self.attempted_at = clock()

    @property
    def held(self) -> bool:
        """May this process act? False from the deadline on, also while it cannot reach the API server."""
        return self._clock() < self._until

    @property
    def remaining(self) -> float:
        """Seconds in which this process may still act without another renewal; 0 or less if it may not."""
        return self._until - self._clock()

    async def attempt(self) -> bool:
        """Take or renew the Lease if possible; returns ``held``. A KubeError is logged, not raised."""
        sent = self._clock()
        # A call of the holder must not last longer than its right to act.
        limit = min(CALL_TIMEOUT, self.remaining) if self.held else CALL_TIMEOUT
        try:
            async with asyncio.timeout(limit):
                if await self._write():
                    self._until = sent + DEADLINE
        except (KubeError, TimeoutError) as error:
            log.warning("lease %s/%s: %s", self._namespace, self._name, str(error) or "no answer in time")
        self.attempted_at = self._clock()
        return self.held

    async def _write(self) -> bool:
        """One read and, if it is ours or free, one write that fails if anybody else wrote in between."""
        try:
            found = await self._api.get(LEASE, self._namespace, self._name)
            if found is None:
                await self._api.create(self._body({}, transitions=0))
                return True
            if not self._takeable(found):
                return False
            spec = found.get("spec") or {}
            moved = spec.get("holderIdentity") != self.identity
            body = self._body(found, transitions=int(spec.get("leaseTransitions") or 0) + moved)
            await self._api.replace(body)
        except Conflict:  # another process wrote first
            return False
        return True

    def _takeable(self, found: Raw) -> bool:
        holder = str((found.get("spec") or {}).get("holderIdentity") or "")
        seen = (holder, str(found["metadata"]["resourceVersion"]))
        if seen != self._seen:
            self._seen, self._seen_at = seen, self._clock()
        if holder == self.identity and not self.held:
            # Our name is in it, but others may be about to take it: only a successful write counts.
            return True
        return holder in ("", self.identity) or self._clock() - self._seen_at >= DURATION

    def _body(self, found: Raw, transitions: int, holder: str | None = None) -> Raw:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = found.get("spec") or {}
        holder = self.identity if holder is None else holder
        same = spec.get("holderIdentity") == self.identity
        return {
            "apiVersion": LEASE.api,
            "kind": LEASE.name,
            "metadata": found.get("metadata") or {"name": self._name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": holder,
                "leaseDurationSeconds": int(DURATION),
                "acquireTime": spec.get("acquireTime", now) if same else now,
                "renewTime": now,
                "leaseTransitions": transitions,
            },
        }

    async def release(self) -> None:
        """Stop acting, and let others take the Lease at once instead of after its duration."""
        held, self._until = self.held, float("-inf")
        if not held:
            return
        try:
            async with asyncio.timeout(CALL_TIMEOUT):
                found = await self._api.get(LEASE, self._namespace, self._name)
                spec = (found or {}).get("spec") or {}
                if found is not None and spec.get("holderIdentity") == self.identity:
                    transitions = int(spec.get("leaseTransitions") or 0)
                    await self._api.replace(self._body(found, transitions, holder=""))
        except (KubeError, TimeoutError) as error:
            log.info("lease %s/%s was not released: %s", self._namespace, self._name, error)

    async def lead(self, work: Callable[[], Awaitable[None]]) -> None:
        """For ever: wait for the Lease, run ``work`` while it is held, cancel it in time if it is lost.

        Exceptions from ``work`` are raised; the Lease is released in any case.
        """
        try:
            while True:
                if await self.attempt():
                    await self._act(work)
                else:
                    await asyncio.sleep(RENEW * random.uniform(0.6, 1.0))
        finally:
            await asyncio.shield(self.release())

    async def _act(self, work: Callable[[], Awaitable[None]]) -> None:
        log.info("lease %s/%s is held by %s: acting", self._namespace, self._name, self.identity)
        acting = asyncio.ensure_future(work())
        try:
            pause = RENEW
            while self.held:
                done, _ = await asyncio.wait({acting}, timeout=min(pause, max(0.0, self.remaining)))
                if done:
                    return acting.result()
                until = self._until
                await self.attempt()
                pause = RENEW if self._until > until else RETRY
            log.error("lease %s/%s could not be renewed: no longer acting", self._namespace, self._name)
        finally:
            acting.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await acting
