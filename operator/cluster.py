"""Mirrors the cluster: copies of the objects that the operator watches, in memory, parsed once.

Three sources write here: kopf's watches, slow re-lists, and the answers to our own writes. Because of the
answers a round never acts on an outdated copy of what it has just changed itself: a pod that it created is
here before the watch reports it. The order of updates is decided by versions. An object's ``resourceVersion``
only grows, so the older of two updates is dropped, whichever source it came from, and a deletion is
remembered until a newer list has been read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .api import GROUP
from .kube import (
    DEPLOYMENT,
    FIELD_MANAGER,
    LLM_SERVICE,
    NODE,
    POD,
    Forbidden,
    Kind,
    Kube,
    Raw,
    controller,
    controller_uid,
    writers,
)
from .observed import SERVICE, Node, Pod, Service
from .refusals import Refusal, explain_gateway
from .workqueue import Key

log = logging.getLogger("blockyard.operator.cluster")

Value = TypeVar("Value")
MANAGED = "app.kubernetes.io/managed-by=blockyard-operator"  # label selector of what we make


def key_of(raw: Raw) -> Key:
    return raw["metadata"].get("namespace") or "", raw["metadata"]["name"]


def service_of(raw: Raw) -> Key:
    """The service that owns an object, or would by its label if nothing does; ("", "") if none.

    Owner references decide: labels are easily taken off, and a selector of somebody else may want them.
    """
    metadata, owner = raw["metadata"], controller(raw)
    if owner:
        name = str(owner.get("name", "")) if owner.get("kind") == LLM_SERVICE.name else ""
    else:
        name = (metadata.get("labels") or {}).get(SERVICE, "")
    return (metadata.get("namespace") or "", name) if name else ("", "")


def owned_by(raw: Raw, service: Service) -> bool:
    """Whether an object is the service's: nothing else may ever be written.

    It has the service as its controller; or it has no controller at all, names the service in its label and
    was made by this operator, so that only its owner reference was taken off, which is put back.
    """
    if owner := controller(raw):
        return owner.get("uid") == service.uid
    return FIELD_MANAGER in writers(raw) and service_of(raw) == (service.namespace, service.name)


@dataclass(frozen=True, slots=True)
class _Entry(Generic[Value]):
    version: int
    value: Value | None  # None: deleted


class Mirror(Generic[Value]):
    """The objects of one kind, as values that ``parse`` makes of raw objects; equal values mean no change.

    ``changed(before, after)`` is called for every change; None stands for "not there".
    """

    def __init__(
        self, parse: Callable[[Raw], Value], changed: Callable[[Value | None, Value | None], None]
    ) -> None:
        self._parse = parse
        self._changed = changed
        self._entries: dict[Key, _Entry[Value]] = {}
        self._settled: dict[str | None, int] = {}  # versions of the newest lists, by namespace; None: of all

    def get(self, key: Key) -> Value | None:
        entry = self._entries.get(key)
        return None if entry is None else entry.value

    def __iter__(self) -> Iterator[Value]:
        return (entry.value for entry in self._entries.values() if entry.value is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def put(self, raw: Raw) -> None:
        """Keep this state of the object, unless a newer one is known."""
        self._keep(key_of(raw), int(raw["metadata"]["resourceVersion"]), raw)

    def drop(self, raw: Raw) -> None:
        """The object was deleted; ``raw`` is its last state, with the version of the deletion."""
        self._keep(key_of(raw), int(raw["metadata"]["resourceVersion"]), None)

    def _keep(self, key: Key, version: int, raw: Raw | None) -> None:
        entry = self._entries.get(key)
        # An object that a list did not contain was gone at the list's version: older updates come late.
        known = (
            max(self._settled.get(None, 0), self._settled.get(key[0], 0)) if entry is None else entry.version
        )
        # The answer to a deletion that was carried out at once shows the object as it was, but has the
        # version of the deletion: of two updates with one version, the deletion is the later one.
        if version < known or (version == known and raw is not None):
            return
        before, after = None if entry is None else entry.value, None if raw is None else self._parse(raw)
        self._entries[key] = _Entry(version, after)
        if before != after:
            self._changed(before, after)

    def settle(self, listed: set[Key], version: int, namespace: str | None = None) -> None:
        """A list as of ``version`` contained these keys, each already ``put``; other objects that are older
        are gone.
        """
        self._settled[namespace] = max(version, self._settled.get(namespace, 0))
        for key, entry in list(self._entries.items()):
            if key in listed or entry.version > version or namespace not in (None, key[0]):
                continue
            del self._entries[key]
            if entry.value is not None:
                self._changed(entry.value, None)


@dataclass(frozen=True, slots=True)
class Custom:
    """An LLMService and what a write to it needs."""

    service: Service
    version: str
    finalizers: tuple[str, ...]

    @classmethod
    def of(cls, raw: Raw) -> Custom:
        metadata = raw["metadata"]
        return cls(Service.of(raw), metadata["resourceVersion"], tuple(metadata.get("finalizers") or ()))

    def __eq__(self, other: object) -> bool:
        """Compared without the version, which changes with every write, even if nothing that matters here
        does.
        """
        return (
            isinstance(other, Custom)
            and self.service == other.service
            and self.finalizers == other.finalizers
        )

    def __hash__(self) -> int:
        return hash(self.service.uid)


@dataclass(frozen=True, slots=True)
class Owned:
    """A pod of one of our services, and of its metadata what a meddler may have changed."""

    key: Key
    owner: str  # uid of the controller; "" if there is none
    pod: Pod
    labels: Mapping[str, str]
    made_here: bool  # by this operator, or by one before it

    @classmethod
    def of(cls, raw: Raw) -> Owned:
        metadata = raw["metadata"]
        return cls(
            service_of(raw),
            controller_uid(raw),
            Pod.of(raw),
            {name: value for name, value in (metadata.get("labels") or {}).items() if _is_ours(name)},
            FIELD_MANAGER in writers(raw),
        )


def _is_ours(label: str) -> bool:
    return label.startswith((f"{GROUP}/", "app.kubernetes.io/"))


@dataclass(frozen=True, slots=True)
class Gateway:
    """The Deployment of a service's gateway. ``refused`` is why its pods cannot be made, if that is so."""

    key: Key
    name: str
    ready: int
    generation: int
    refused: Refusal | None = None

    @classmethod
    def of(cls, raw: Raw) -> Gateway:
        metadata, status = raw["metadata"], raw.get("status") or {}
        return cls(
            service_of(raw),
            metadata["name"],
            int(status.get("readyReplicas") or 0),
            int(metadata.get("generation") or 0),
            _refused(raw),
        )


def _refused(deployment: Raw) -> Refusal | None:
    """Why pods of its newest template cannot be made. Whether older ones can be made does not matter."""
    status, wanted = deployment.get("status") or {}, (deployment.get("spec") or {}).get("replicas", 1)
    if int(status.get("updatedReplicas") or 0) >= wanted:
        return None
    for condition in status.get("conditions") or ():
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            return explain_gateway(deployment["metadata"]["name"], condition.get("message") or "")
    return None


class Cluster:
    """All mirrors, and pods by service. A change calls ``dirty`` with the key of each service it affects."""

    def __init__(self, dirty: Callable[[Key], None]) -> None:
        self._dirty = dirty
        self._pods_of: dict[Key, dict[str, Owned]] = {}
        self._vanished: dict[Key, set[str]] = {}  # names of pods that went without having been deleted
        self.nodes_by_name: dict[str, Node] = {}
        self.services: Mirror[Custom] = Mirror(Custom.of, self._service_changed)
        self.pods: Mirror[Owned] = Mirror(Owned.of, self._pod_changed)
        self.nodes: Mirror[Node] = Mirror(Node.of, self._node_changed)
        self.deployments: Mirror[Gateway] = Mirror(Gateway.of, self._gateway_changed)

    def pods_of(self, service: Service) -> dict[str, Pod]:
        """The pods that this very service owns, by uid."""
        return {owned.pod.uid: owned.pod for owned in self.owned_by(service) if owned.owner}

    def owned_by(self, service: Service) -> list[Owned]:
        """The same with those whose owner reference was taken off."""
        found: Mapping[str, Owned] = self._pods_of.get((service.namespace, service.name), {})
        return [
            each
            for each in found.values()
            if each.owner == service.uid or (not each.owner and each.made_here)
        ]

    def take_vanished(self, service: Service) -> set[str]:
        """Names of the service's pods that are gone from the watch although nobody deleted them.

        The watch is one by label, and tells of a pod that has lost the label what it tells of one that is
        gone: somebody has to look. Each name is given once.
        """
        return self._vanished.pop((service.namespace, service.name), set())

    def forget(self, key: Key) -> None:
        """The service is gone."""
        self._vanished.pop(key, None)

    async def relist(self, kube: Kube, namespaces: Sequence[str] = ()) -> None:
        """Read everything anew: at the start, and from time to time, because a watch that was restarted does
        not report what was deleted meanwhile. If a KubeError is raised, what was read so far is kept. A named
        namespace without rights stays as it was known; the others must not suffer from it.
        """
        await self._relist(kube, self.nodes, NODE, None, "")
        for namespace in namespaces or (None,):
            try:
                await self._relist(kube, self.pods, POD, namespace, MANAGED)
                await self._relist(kube, self.deployments, DEPLOYMENT, namespace, MANAGED)
            except Forbidden as error:
                if namespace is None:
                    raise
                log.warning("namespace %s is left out: %s", namespace, error)
            await self._relist(kube, self.services, LLM_SERVICE, namespace, "")

    async def _relist(
        self, kube: Kube, mirror: Mirror[Any], kind: Kind, namespace: str | None, labels: str
    ) -> None:
        listed: set[Key] = set()
        version = 0
        async for page in kube.pages(kind, namespace, labels):
            version = page.version
            for raw in page.items:
                listed.add(key_of(raw))
                mirror.put(raw)
        mirror.settle(listed, version, namespace)

    def _service_changed(self, before: Custom | None, after: Custom | None) -> None:
        found: Any = after or before
        self._dirty((found.service.namespace, found.service.name))

    def _pod_changed(self, before: Owned | None, after: Owned | None) -> None:
        if before is not None:
            left = self._pods_of.get(before.key, {})
            left.pop(before.pod.uid, None)
            if not left:
                self._pods_of.pop(before.key, None)
        if after is not None:
            self._pods_of.setdefault(after.key, {})[after.pod.uid] = after
        elif before is not None and not before.pod.deleting:
            self._vanished.setdefault(before.key, set()).add(before.pod.name)
        for owned in (before, after):
            if owned is not None and owned.key != ("", ""):
                self._dirty(owned.key)

    def _node_changed(self, before: Node | None, after: Node | None) -> None:
        found: Any = after or before
        if after is None:
            self.nodes_by_name.pop(found.name, None)
        else:
            self.nodes_by_name[after.name] = after
        for key, pods in self._pods_of.items():
            if any(owned.pod.node == found.name for owned in pods.values()):
                self._dirty(key)

    def _gateway_changed(self, before: Gateway | None, after: Gateway | None) -> None:
        for gateway in (before, after):
            if gateway is not None and gateway.key != ("", ""):
                self._dirty(gateway.key)
