"""Keeps a service's objects other than agents (Services, gateway, budget, policy) as ``children`` has them.

An object is written when what is wanted of it changes, when it is missing, or when somebody else has changed
it, and never otherwise. For that the metadata of all companions is watched, and what each was last found or
made as is remembered as a digest and a few numbers: bodies are not kept, so that memory stays flat. When the
metadata says that an object may have changed, the object alone is read and compared.

Only what belongs to the service (``cluster.owned_by``) is ever written. An object of somebody else that has
the name of one of these is reported and left alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .children import digest_of
from .cluster import MANAGED, Cluster, owned_by, service_of
from .kube import (
    COMPANIONS,
    DEPLOYMENT,
    DISRUPTION_BUDGET,
    FIELD_MANAGER,
    NETWORK_POLICY,
    SERVICE,
    SERVICE_ACCOUNT,
    Forbidden,
    Gone,
    Kind,
    Kube,
    KubeError,
    NotFound,
    Raw,
    controller,
    kind_of,
    writers,
)
from .observed import Service
from .workqueue import Key

log = logging.getLogger("blockyard.operator.companions")

Name = tuple[str, str, str]  # apiVersion, kind, name

ACCOUNT = "serving.blockyard.dev/account-uid"  # annotation of pods: of their ServiceAccount
MEND_PAUSE = 2.0  # seconds between two repairs of one object: another controller may want it otherwise
WATCH_PAUSE, LONGEST_WATCH_PAUSE = 1.0, 60.0  # seconds before a watch that failed is begun anew; doubling
ABSENT_PAUSE = 300.0  # the same for a kind that the cluster does not have

# What it means that one of these is missing, while the service seems to be well.
PROTECTIONS = {
    DISRUPTION_BUDGET: "agents can be evicted before they are drained",
    NETWORK_POLICY: "agents can be reached from everywhere",
    SERVICE: "clients or gateways do not find what they look for",
}
# Maps that are one value: a key more is another meaning.
_ATOMIC = {"selector", "matchLabels", "podSelector", "namespaceSelector", "roleRef"}


@dataclass(frozen=True, slots=True)
class _Standing:
    """An object of a service that exists. ``digest`` is that of the body it agrees with ("": with none)."""

    digest: str
    uid: str
    version: int
    mark: str  # changes with everything but the object's status

    @classmethod
    def of(cls, raw: Raw, digest: str) -> _Standing:
        metadata = raw["metadata"]
        return cls(digest, metadata["uid"], int(metadata["resourceVersion"]), _mark(metadata))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one look at a service's companions.

    ``taken``: names that others have, each with its owner and a remedy. ``mended``: what others did and this
    has undone. ``again``: seconds after which another look is due, if one is.
    """

    taken: tuple[str, ...] = ()
    mended: tuple[str, ...] = ()
    again: float | None = None


class Companions:
    """What is known of all services' companions. ``dirty`` is told the services that need a look."""

    def __init__(
        self,
        kube: Kube,
        cluster: Cluster,
        dirty: Callable[[Key], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kube = kube
        self._cluster = cluster
        self._dirty = dirty
        self._clock = clock
        self._standing: dict[Key, dict[Name, _Standing]] = {}
        self._mended: dict[tuple[Key, Name], float] = {}  # when an object was last put back
        self._lost: dict[Key, set[Name]] = {}  # objects that were deleted by others, until they are back

    # ── One service ───────────────────────────────────────────────────────────────────────────────

    async def ensure(self, service: Service, wanted: Iterable[Raw], retired: Iterable[Name]) -> Outcome:
        """Write what differs, in the given order, and delete what is not wanted any more."""
        key = service.namespace, service.name
        standing = self._standing.setdefault(key, {})
        taken: list[str] = []
        mended: list[str] = []
        again: float | None = None
        bodies = {name_of(body): body for body in wanted}
        for name in bodies:
            if (body := _bound(name, bodies, standing)) is None:
                continue  # its account comes back first
            digest = digest_of(body)
            known = standing.get(name)
            if known is not None and known.digest == digest:
                continue
            if (wait := self._mended.get((key, name), -MEND_PAUSE) + MEND_PAUSE - self._clock()) > 0:
                again = wait if again is None else min(wait, again)
                continue
            found = await self._kube.get(kind_of(body), service.namespace, name[2])
            if found is not None and not owned_by(found, service):
                standing.pop(name, None)
                taken.append(taken_words(found, service))
                continue
            made = await self._write(body, found)
            if words := self._meddled(key, name, known, found, made):
                mended.append(words)
                self._mended[key, name] = self._clock()
            standing[name] = _Standing.of(made, digest)
            if kind_of(body) is DEPLOYMENT:
                self._cluster.deployments.put(made)
        for name in retired:
            if name in standing:
                await self._kube.delete(_kind(name), service.namespace, name[2], standing[name].uid)
                standing.pop(name, None)
        return Outcome(tuple(taken), tuple(mended), again)

    async def _write(self, body: Raw, found: Raw | None) -> Raw:
        """The object as it is when it agrees with ``body``; written only if it does not."""
        if found is None:
            # Not by force: if somebody makes an object of this name just now, theirs is not overwritten.
            return await self._kube.apply(body, force=False)
        if covers(found, body):
            return found
        metadata = body["metadata"] | {"uid": found["metadata"]["uid"]}
        return await self._kube.apply(body | {"metadata": metadata}, force=True)

    def _meddled(self, key: Key, name: Name, known: _Standing | None, found: Raw | None, made: Raw) -> str:
        """What somebody else did and this has undone; "" if it was a change of the spec, or nothing."""
        what = f"{name[1]} {name[2]}"
        lost = self._lost.get(key, set())
        was_lost = name in lost  # or has lost the label by which it is watched
        lost.discard(name)
        if found is None:
            return f"{what} was deleted by somebody else and has been made again" if was_lost else ""
        changed = made["metadata"]["resourceVersion"] != found["metadata"]["resourceVersion"]
        unexpected = was_lost if known is None else not known.digest
        if not (unexpected and changed):
            return ""
        who = next((manager for manager in writers(found) if manager != FIELD_MANAGER), "somebody else")
        return f"{what} was changed by {who} and has been put back"

    def missing(self, service: Service, wanted: Iterable[Raw]) -> tuple[str, ...]:
        """Which protections are not there, or not as wanted, and what that means."""
        standing = self._standing.get((service.namespace, service.name), {})
        found = []
        for body in wanted:
            name, meaning = name_of(body), PROTECTIONS.get(kind_of(body))
            known = standing.get(name)
            if meaning is not None and (known is None or not known.digest):
                state = "is missing" if known is None else "is not as it should be"
                found.append(f"{name[1]} {name[2]} {state}: {meaning}")
        return tuple(found)

    def forget(self, key: Key) -> None:
        self._standing.pop(key, None)
        self._lost.pop(key, None)
        self._mended = {each: when for each, when in self._mended.items() if each[0] != key}

    # ── All of them ───────────────────────────────────────────────────────────────────────────────

    async def relist(
        self, namespaces: Sequence[str], wanted_of: Callable[[Key], tuple[Service | None, Mapping[Name, Raw]]]
    ) -> None:
        """Compare all that is there with what ``wanted_of(key)`` wants: the service and bodies by name.

        A kind that the cluster does not have, such as ServiceMonitor, counts as empty.
        """
        for kind in COMPANIONS:
            found: dict[Key, dict[Name, _Standing]] = {}
            blind: set[str] = set()  # named namespaces without rights: what is known of them stays
            for namespace in namespaces or (None,):
                try:
                    async for page in self._kube.pages(kind, namespace, MANAGED):
                        for item in page.items:
                            # Items of a list have no apiVersion and no kind.
                            raw = {**item, "apiVersion": kind.api, "kind": kind.name}
                            key = service_of(raw)
                            if (standing := self._look(key, raw, wanted_of)) is not None:
                                found.setdefault(key, {})[name_of(raw)] = standing
                        await asyncio.sleep(0)
                except NotFound:
                    pass
                except Forbidden:
                    if namespace is None:
                        raise
                    blind.add(namespace)
            for key in found.keys() | self._standing.keys():
                if key[0] in blind:
                    continue
                standing_now = self._standing.setdefault(key, {})
                for name in [name for name in standing_now if name[:2] == (kind.api, kind.name)]:
                    if name not in found.get(key, {}):
                        self._lost.setdefault(key, set()).add(name)
                    del standing_now[name]
                standing_now.update(found.get(key, {}))
                if not standing_now:
                    del self._standing[key]

    def _look(
        self,
        key: Key,
        raw: Raw,
        wanted_of: Callable[[Key], tuple[Service | None, Mapping[Name, Raw]]],
    ) -> _Standing | None:
        """None if the object is not the service's."""
        known = self._standing.get(key, {}).get(name_of(raw))
        if known is not None and known.version == int(raw["metadata"]["resourceVersion"]):
            return known
        service, bodies = wanted_of(key)
        if service is None or not owned_by(raw, service):
            return None
        body = _bound(name_of(raw), bodies, self._standing.get(key, {}))
        return _Standing.of(raw, digest_of(body) if body is not None and covers(raw, body) else "")

    async def watch(self, kind: Kind, namespace: str | None) -> None:
        """Follow the metadata of one kind for ever. What changes or goes makes its service dirty."""
        pause = WATCH_PAUSE
        while True:
            try:
                version = await self._list_metadata(kind, namespace)
                while True:
                    async for change in self._kube.watch_metadata(kind, namespace, MANAGED, version):
                        pause = WATCH_PAUSE
                        version = max(version, int(change.object["metadata"]["resourceVersion"]))
                        if "uid" in change.object["metadata"]:  # else it is a bookmark
                            self._told(kind, change.object, deleted=change.deleted)
            except Gone:
                continue
            except NotFound:  # ServiceMonitors, where there is no Prometheus operator
                await asyncio.sleep(ABSENT_PAUSE)
            except KubeError as error:
                log.warning("watch of %s failed, again in %g s: %s", kind.plural, pause, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_WATCH_PAUSE)

    async def _list_metadata(self, kind: Kind, namespace: str | None) -> int:
        """Compare with all that is there now -> the version from which to watch."""
        there: set[tuple[Key, str]] = set()
        version = 0
        async for page in self._kube.pages(kind, namespace, MANAGED, metadata_only=True):
            version = page.version
            for item in page.items:
                there.add((service_of(item), item["metadata"]["name"]))
                self._told(kind, item, deleted=False)
        for key, standing in list(self._standing.items()):
            if namespace not in (None, key[0]):
                continue
            for name, known in list(standing.items()):
                of_kind = name[:2] == (kind.api, kind.name)
                if of_kind and (key, name[2]) not in there and known.version <= version:
                    self._gone(key, name)
        return version

    def _told(self, kind: Kind, raw: Raw, *, deleted: bool) -> None:
        metadata = raw["metadata"]
        key, name = service_of(raw), (kind.api, kind.name, str(metadata["name"]))
        known = self._standing.get(key, {}).get(name)
        if known is None or int(metadata["resourceVersion"]) <= known.version:
            return
        if deleted:
            if known.uid == metadata["uid"]:
                self._gone(key, name)
        elif known.mark == _mark(metadata):  # its status
            self._standing[key][name] = replace(known, version=int(metadata["resourceVersion"]))
        else:
            self._standing[key][name] = replace(
                known, digest="", version=int(metadata["resourceVersion"]), mark=_mark(metadata)
            )
            self._dirty(key)

    def _gone(self, key: Key, name: Name) -> None:
        self._standing[key].pop(name)
        self._lost.setdefault(key, set()).add(name)
        self._dirty(key)


def taken_words(found: Raw, service: Service) -> str:
    """Whose object has the name, and what can be done about it."""
    metadata, owner = found["metadata"], controller(found)
    if owner:
        whose = f"belongs to {owner.get('kind')} {owner.get('name')}"
    elif who := next(iter(writers(found)), ""):
        whose = f"is not this service's (it was last written by {who})"
    else:
        whose = "is not this service's"
    return (
        f"{found['kind']} {metadata['name']} {whose}, and {service.name} needs that name: "
        "delete it, or give the LLMService another name"
    )


def _bound(name: Name, bodies: Mapping[Name, Raw], standing: Mapping[Name, _Standing]) -> Raw | None:
    """What is wanted of an object. A Deployment gets the uid of its pods' ServiceAccount, if that is ours.

    Pods have a token of the account with which they began. If that is deleted, the API server refuses them
    for as long as they run, although an account of its name is there again; another uid replaces them. None
    if the object is not wanted, or not before there is an account.
    """
    body = bodies.get(name)
    if body is None or kind_of(body) is not DEPLOYMENT:
        return body
    template = body["spec"]["template"]
    account = SERVICE_ACCOUNT.api, SERVICE_ACCOUNT.name, template["spec"].get("serviceAccountName", "")
    if account not in bodies:
        return body
    if account not in standing:
        return None
    annotations = template["metadata"].get("annotations", {}) | {ACCOUNT: standing[account].uid}
    template = template | {"metadata": template["metadata"] | {"annotations": annotations}}
    return body | {"spec": body["spec"] | {"template": template}}


def _mark(metadata: Raw) -> str:
    """What tells a change of an object from one of its status, of which the generation does not tell."""
    labels, owners = metadata.get("labels") or {}, metadata.get("ownerReferences") or []
    change = metadata.get("generation") or metadata["resourceVersion"]
    return digest_of({"uid": metadata["uid"], "change": change, "labels": labels, "owners": owners})


def covers(there: Any, wanted: Any, *, exactly: bool = False) -> bool:
    """Is all that is wanted there, whatever else is? Lists agree item by item; empty is as good as absent.

    ``exactly``: a map may have no other keys. Selectors are like that.
    """
    if isinstance(wanted, dict):
        there = {} if there is None else there
        if not isinstance(there, dict) or (exactly and there.keys() - wanted.keys()):
            return False
        return all(
            covers(there.get(name), value, exactly=exactly or name in _ATOMIC)
            for name, value in wanted.items()
        )
    if isinstance(wanted, list):
        there = [] if there is None else there
        if not isinstance(there, list) or len(there) != len(wanted):
            return False
        return all(covers(*pair, exactly=exactly) for pair in zip(there, wanted, strict=True))
    return bool(there == wanted or (there is None and not wanted))


def name_of(body: Raw) -> Name:
    return body["apiVersion"], body["kind"], body["metadata"]["name"]


def _kind(name: Name) -> Kind:
    return next(kind for kind in COMPANIONS if (kind.api, kind.name) == name[:2])
