"""Follows the statuses of a service: each one that is written must be true of itself."""

from __future__ import annotations

from .api import Raw
from .cluster import Cluster


class Recorder:
    """Follows a service and checks each of its statuses."""

    def __init__(self, cluster: Cluster, name: str, namespace: str) -> None:
        self._cluster, self._name, self._namespace = cluster, name, namespace
        self.seen: list[Raw] = []
        self.problems: list[str] = []

    async def _follow(self) -> None:
        async for event, found in self._cluster.api.watch("LLMService", self._namespace):
            if event not in ("SYNCED", "DELETED") and found["metadata"]["name"] == self._name:
                self.seen.append(found)
                self.problems += untruths(found)

    def __enter__(self) -> Recorder:
        self._following = self._cluster.start(self._follow())
        return self

    def __exit__(self, *_: object) -> None:
        if self._following.done():
            self._following.result()  # raises the error that ended the watch
        self._following.cancel()
        self.check()

    def check(self) -> None:
        """All statuses until now were true."""
        assert not self.problems, self.problems
        assert self.seen, "no status was ever seen"


def untruths(found: Raw) -> list[str]:
    """Statements of a status that contradict each other or the spec."""
    status, generation = found.get("status") or {}, found["metadata"]["generation"]
    if not status:
        return []
    conditions = {one["type"]: one for one in status["conditions"]}
    wrong = {
        "a future generation": status["observedGeneration"] > generation,
        "a condition of another generation": any(
            one["observedGeneration"] != status["observedGeneration"] for one in conditions.values()
        ),
        "more ready than there are": status["readyReplicas"] > status["replicas"],
        "more updated than there are": status["updatedReplicas"] > status["replicas"],
        "ready without ready agents": conditions["Ready"]["status"] == "True"
        and status["readyReplicas"] == 0
        and conditions["Ready"]["reason"] != "ScaledToZero",
        "stable while agents are missing": conditions["Progressing"]["reason"] == "Stable"
        and status["observedGeneration"] == generation
        and status["replicas"] != found["spec"]["replicas"],
        "conditions missing": set(conditions) != {"Ready", "Progressing", "Degraded", "Balanced"},
    }
    return [f"{words}: {status}" for words, holds in wrong.items() if holds]
