"""Posts the Kubernetes Events of LLMServices: few, and only one object for a repeated event.

An Event's name is a digest of its text, so a repetition increases the count of the Event that is there, also
after a restart of the operator. Each service may post a burst and then one a minute; more are dropped,
because the status has the same information. An Event that cannot be posted never makes a round fail.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .api import GROUP, VERSION
from .kube import EVENT, FIELD_MANAGER, Conflict, Kube, KubeError, NotFound, Raw
from .observed import Service, stamp

log = logging.getLogger("blockyard.operator.events")

BURST = 20  # events of one service at once
REFILL = 60.0  # seconds until the service may post one more
REPEAT = 300.0  # seconds in which the same event is not posted again
KEEP = 10_000  # posted events that are remembered
LONGEST_MESSAGE = 1024


@dataclass(slots=True)
class _Budget:
    tokens: float = BURST
    at: float = 0.0

    def take(self, now: float) -> bool:
        self.tokens = min(BURST, self.tokens + (now - self.at) / REFILL)
        self.at = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


class Recorder:
    """Posts the events of one operator."""

    def __init__(self, kube: Kube, instance: str, clock: Callable[[], float] = time.time) -> None:
        self._kube = kube
        self._instance = instance
        self._clock = clock
        self._posted: dict[str, float] = {}  # when each name was last posted; oldest first
        self._unposted: dict[str, int] = {}  # repetitions since then, which the next post counts too
        self._budgets: dict[str, _Budget] = {}  # by uid of the service

    async def emit(
        self,
        service: Service,
        kind: Literal["Normal", "Warning"],
        reason: str,
        action: str,
        message: str,
        repeat: float = REPEAT,
    ) -> None:
        """Say what was done (``action``, one CamelCase verb) or what is wrong, and why.

        The same event is posted again after ``repeat`` seconds at the earliest; what comes before is counted.
        """
        message = message[:LONGEST_MESSAGE]
        digest = hashlib.sha256(f"{service.uid}\0{kind}\0{reason}\0{message}".encode()).hexdigest()[:16]
        name, now = f"{service.name}.{digest}", self._clock()
        times = self._unposted.pop(name, 0) + 1
        early = now - self._posted.get(name, float("-inf")) < repeat
        if early or not self._budgets.setdefault(service.uid, _Budget(at=now)).take(now):
            if name in self._posted:
                self._unposted[name] = times
            return
        self._posted.pop(name, None)
        self._posted[name] = now
        while len(self._posted) > KEEP:
            oldest = next(iter(self._posted))
            del self._posted[oldest]
            self._unposted.pop(oldest, None)
        try:
            await self._post(self._body(service, name, kind, reason, action, message, stamp(now)), times)
        except KubeError as error:
            log.warning("event %s (%s) was not posted: %s", reason, message, error)

    def forget(self, uid: str) -> None:
        """The service is gone."""
        self._budgets.pop(uid, None)

    async def _post(self, body: Raw, times: int) -> None:
        namespace, name = body["metadata"]["namespace"], body["metadata"]["name"]
        found = await self._kube.get(EVENT, namespace, name)
        if found is None:
            try:
                await self._kube.create(body)
            except Conflict:
                log.debug("event %s was posted by another operator", name)
            return
        count = int(found.get("count") or 1) + times
        try:
            await self._kube.merge(
                EVENT, namespace, name, {"count": count, "lastTimestamp": body["lastTimestamp"]}
            )
        except NotFound:  # it expired between the two calls
            await self._kube.create(body)

    def _body(
        self, service: Service, name: str, kind: str, reason: str, action: str, message: str, time: str
    ) -> Raw:
        return {
            "apiVersion": EVENT.api,
            "kind": EVENT.name,
            "metadata": {"name": name, "namespace": service.namespace},
            "involvedObject": {
                "apiVersion": f"{GROUP}/{VERSION}",
                "kind": "LLMService",
                "name": service.name,
                "namespace": service.namespace,
                "uid": service.uid,
            },
            "type": kind,
            "reason": reason,
            "action": action,
            "message": message,
            "count": 1,
            "firstTimestamp": time,
            "lastTimestamp": time,
            "source": {"component": FIELD_MANAGER},
            "reportingComponent": f"{GROUP}/operator",
            "reportingInstance": self._instance[:128],
        }
