"""Keeps a service's objects other than agents (Services, gateway, budget, policy) as ``children`` has them.

An object is applied only when its definition changes, or when a slow re-list finds it missing or changed by
others. The digest and resourceVersion of what was last found or made are kept, so that a round in which
nothing differs makes no call.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .cluster import MANAGED, Cluster, key_of, service_of
from .kube import COMPANIONS, DEPLOYMENT, Kind, Kube, NotFound, Raw, kind_of
from .observed import Service
from .workqueue import Key

Name = tuple[str, str, str]  # apiVersion, kind, name


@dataclass(frozen=True, slots=True)
class _Standing:
    """An object that exists: its version, and the digest of the definition that it meets ("": of none)."""

    digest: str
    version: str


class Companions:
    """What is known of all services' companions."""

    def __init__(self, kube: Kube, cluster: Cluster) -> None:
        self._kube = kube
        self._cluster = cluster
        self._standing: dict[Key, dict[Name, _Standing]] = {}

    async def ensure(self, service: Service, wanted: Iterable[Raw], retired: Iterable[Name]) -> None:
        """Apply what differs, in the given order, and delete what is ``retired``."""
        standing = self._standing.setdefault((service.namespace, service.name), {})
        for body in wanted:
            name = name_of(body)
            digest = _digest(body)
            known = standing.get(name)
            if known is not None and known.digest == digest and self._still_there(body):
                continue
            made = await self._kube.apply(body)
            if kind_of(body) is DEPLOYMENT:
                self._cluster.deployments.put(made)
            standing[name] = _Standing(digest, made["metadata"]["resourceVersion"])
        for name in retired:
            if name in standing:
                await self._kube.delete(_kind(name), service.namespace, name[2])
                del standing[name]

    def _still_there(self, body: Raw) -> bool:
        """Deployments are watched, so a deleted one is made again at once, not after the next re-list."""
        return kind_of(body) is not DEPLOYMENT or self._cluster.deployments.get(key_of(body)) is not None

    def forget(self, key: Key) -> None:
        self._standing.pop(key, None)

    async def relist(self, namespaces: Sequence[str], wanted_of: Callable[[Key], Mapping[Name, Raw]]) -> None:
        """Compare all objects with their definitions, ``wanted_of(key)``: by name, {} if there is no service.

        A kind that the cluster does not have, such as ServiceMonitor, counts as empty.
        """
        for kind in COMPANIONS:
            found: dict[Key, dict[Name, _Standing]] = {}
            try:
                for namespace in namespaces or (None,):
                    async for page in self._kube.pages(kind, namespace, MANAGED):
                        for item in page.items:
                            # Items of a list have no apiVersion and no kind.
                            raw = {**item, "apiVersion": kind.api, "kind": kind.name}
                            found.setdefault(service_of(raw), {})[name_of(raw)] = self._look(raw, wanted_of)
                        await asyncio.sleep(0)
            except NotFound:
                pass
            for key in found.keys() | self._standing.keys():
                standing = self._standing.setdefault(key, {})
                for name in [name for name in standing if name[:2] == (kind.api, kind.name)]:
                    del standing[name]
                standing.update(found.get(key, {}))
                if not standing:
                    del self._standing[key]

    def _look(self, raw: Raw, wanted_of: Callable[[Key], Mapping[Name, Raw]]) -> _Standing:
        key, name, version = service_of(raw), name_of(raw), raw["metadata"]["resourceVersion"]
        known = self._standing.get(key, {}).get(name)
        if known is not None and known.version == version:
            return known
        body = wanted_of(key).get(name)
        return _Standing(_digest(body) if body is not None and covers(raw, body) else "", version)


def covers(there: Any, wanted: Any) -> bool:
    """Does ``there`` have every field of ``wanted``? Further fields do no harm.

    Lists must agree item by item. An empty value counts as absent.
    """
    if isinstance(wanted, dict):
        there = {} if there is None else there
        return isinstance(there, dict) and all(
            covers(there.get(name), value) for name, value in wanted.items()
        )
    if isinstance(wanted, list):
        there = [] if there is None else there
        return isinstance(there, list) and len(there) == len(wanted) and all(map(covers, there, wanted))
    return bool(there == wanted or (there is None and not wanted))


def _digest(body: Raw) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def name_of(body: Raw) -> Name:
    return body["apiVersion"], body["kind"], body["metadata"]["name"]


def _kind(name: Name) -> Kind:
    return next(kind for kind in COMPANIONS if (kind.api, kind.name) == name[:2])
