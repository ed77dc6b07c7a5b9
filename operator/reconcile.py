"""One round for one service: observe, decide with the pure functions, carry out, write the status if it
differs.

Level-triggered: a round looks at the present state and not at what changed, so it may run at any time, twice,
or after a restart in the middle of another one. What must survive a restart is in the cluster (a begun drain
in the pod's annotations, decisions in the status); what is kept here only saves work. Services do not wait
for each other: when a round fails, the status of its service tells why, and it is tried again after a growing
pause.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from . import autoscale, children, refusals, replicas, status
from .autoscale import Scale
from .children import Defaults, TemplateError
from .cluster import MANAGED, Cluster, Custom, Owned, owned_by
from .companions import Companions, Name, name_of
from .events import Recorder
from .fleet import Fleet
from .internal_secret import OVERLAP, InternalSecrets
from .kube import (
    COMPANIONS,
    LLM_SERVICE,
    POD,
    ApiError,
    Conflict,
    Forbidden,
    Kube,
    KubeError,
    NotFound,
    NotLeading,
    Raw,
)
from .metrics import Metrics
from .observed import (
    DRAIN_REASON,
    DRAINING_SINCE,
    FINALIZER,
    RELEASED,
    UNDRAINED,
    Observed,
    Pod,
    Service,
    stamp,
)
from .refusals import Refusal
from .replicas import Action, Create, Delete, Drain, Release
from .workqueue import Key, WorkQueue

log = logging.getLogger("blockyard.operator.reconcile")

ROUND_TIMEOUT = 120.0  # seconds for one round
LOAD_INTERVAL = 30.0  # seconds between two writes of a status in which only load has changed
RESYNC_SPREAD = 30.0  # seconds over which a re-list's rounds are spread
RESYNC_RETRY = 5.0
SECRET_INTERVAL = 10.0  # seconds after which a service's Secret is looked at again
SECRETS_PER_SECOND = 20.0  # at most, in all services
RESTORED_REPEAT = 10.0  # seconds between two posts of the same event about a change that was undone
NAMESPACE_INTERVAL = 15.0  # seconds between two looks at the namespaces that are named
TAKEN_RETRY = 15.0  # seconds after which a name that others had is tried again
DRAIN_RETRY = 2.0  # seconds after an agent could not be asked to drain; until the drain's deadline

# The service that the running task works for; log lines carry it.
current_service: ContextVar[str] = ContextVar("current_service", default="")


class Reconciler:
    """Brings services to the state that their specs ask for, a few at a time."""

    def __init__(
        self,
        kube: Kube,
        cluster: Cluster,
        fleet: Fleet,
        queue: WorkQueue,
        recorder: Recorder,
        metrics: Metrics,
        defaults: Defaults,
        clock: Callable[[], float] = time.time,
        token_overlap: float = OVERLAP,
        restart: Callable[[str], None] = log.error,
    ) -> None:
        self._kube = kube
        self._cluster = cluster
        self._fleet = fleet
        self._queue = queue
        self._recorder = recorder
        self._metrics = metrics
        self._defaults = defaults
        self._clock = clock
        self._companions = Companions(kube, cluster, queue.add)
        self._secrets = InternalSecrets(kube, token_overlap)
        self._restart = restart
        self._blind: set[str] = set()  # served namespaces in which the operator has no rights at the moment
        self._taken: dict[Key, tuple[str, ...]] = {}  # names that others have, in words
        self._occupied: dict[Key, set[str]] = {}  # names that no pod of the service can have
        self._uids: dict[Key, str] = {}  # the services that have been seen
        self._refused: dict[Key, Refusal] = {}  # the last refusal of a write, until a round goes through
        self._load_written: dict[Key, float] = {}  # when a status was last written

    async def run(self, workers: int, namespaces: Sequence[str], resync_seconds: float) -> None:
        """List everything, then work until cancelled. It may be called again, when other processes may have
        acted meanwhile.
        """
        self._secrets.doubt()
        self._refused.clear()
        await self._resync(namespaces)
        for custom in self._cluster.services:
            self._queue.add((custom.service.namespace, custom.service.name))
        async with asyncio.TaskGroup() as tasks:
            for number in range(workers):
                tasks.create_task(self._work(), name=f"worker {number}")
            tasks.create_task(self._resync_often(namespaces, resync_seconds), name="resync")
            tasks.create_task(self._look_at_secrets(), name="secrets")
            if namespaces:
                tasks.create_task(self._look_at_namespaces(namespaces), name="namespaces")
            for kind, namespace in itertools.product(COMPANIONS, namespaces or (None,)):
                tasks.create_task(self._companions.watch(kind, namespace), name=f"watch {kind.plural}")

    async def _work(self) -> None:
        while True:
            key, waited = await self._queue.take()
            self._metrics.waits.observe(waited)
            try:
                await self._guarded(key)
            finally:
                self._queue.done(key)

    async def _guarded(self, key: Key) -> None:
        """One round; whatever goes wrong in it concerns this service alone."""
        current_service.set("/".join(key))
        begin, result = time.perf_counter(), "error"
        try:
            async with asyncio.timeout(ROUND_TIMEOUT):
                await self.reconcile(key)
            self._queue.succeeded(key)
            result = "ok"
        except NotLeading as error:
            log.warning("round ended: %s", error)
            self._queue.failed(key)
        except (KubeError, TimeoutError) as error:
            words = str(error) or f"not done within {ROUND_TIMEOUT:g} s"
            log.warning("round failed, again in %.1f s: %s", self._queue.failed(key), words)
        except Exception:  # a defect in one round must not stop the other services
            log.exception("round failed, again in %.1f s", self._queue.failed(key))
        finally:
            self._metrics.reconciles.labels(result).observe(time.perf_counter() - begin)

    # ── Re-lists ──────────────────────────────────────────────────────────────────────────────────

    async def _resync_often(self, namespaces: Sequence[str], seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds * random.uniform(0.9, 1.1))
            await self._resync(namespaces)
            for custom in self._cluster.services:
                key = (custom.service.namespace, custom.service.name)
                self._queue.add_after(key, random.uniform(0.0, min(RESYNC_SPREAD, seconds)))

    async def _resync(self, namespaces: Sequence[str]) -> None:
        """Re-list until that succeeds: then the mirrors are right, and companions that others changed are
        known.
        """
        while True:
            try:
                await self._cluster.relist(self._kube, namespaces)
                await self._companions.relist(namespaces, self._wanted)
                return
            except KubeError as error:
                log.warning("re-list failed, again in %g s: %s", RESYNC_RETRY, error)
                await asyncio.sleep(RESYNC_RETRY)

    async def _look_at_namespaces(self, namespaces: Sequence[str]) -> None:
        """Notice served namespaces that are gone, with the operator's rights there, or are back.

        A watch that was refused once is never begun again by kopf, so for one that is back the process is
        started anew.
        """
        while True:
            for namespace in namespaces:
                was_blind = namespace in self._blind
                with contextlib.suppress(KubeError):
                    if not await self._is_blind(namespace) and was_blind:
                        self._restart(f"namespace {namespace} can be served again")
            await asyncio.sleep(NAMESPACE_INTERVAL)

    async def _is_blind(self, namespace: str) -> bool:
        """Whether the operator may not see the pods of a namespace. KubeError if that cannot be told."""
        try:
            async for _ in self._kube.pages(POD, namespace, MANAGED):
                break
        except (Forbidden, NotFound):
            if namespace not in self._blind:
                log.warning("namespace %s cannot be served: the operator has no rights there", namespace)
            self._blind.add(namespace)
        else:
            self._blind.discard(namespace)
        return namespace in self._blind

    async def _look_at_secrets(self) -> None:
        """Read the services' Secrets one after another, for ever; those that somebody has changed are due."""
        while True:
            services = [custom.service for custom in self._cluster.services]
            pause = max(SECRET_INTERVAL / max(1, len(services)), 1 / SECRETS_PER_SECOND)
            await asyncio.sleep(pause)
            for service in services:
                key = service.namespace, service.name
                if not (service.deleting or service.paused) and self._uids.get(key) == service.uid:
                    with contextlib.suppress(KubeError):
                        if await self._secrets.changed(service):
                            self._queue.add(key)
                await asyncio.sleep(pause)

    def _wanted(self, key: Key) -> tuple[Service | None, Mapping[Name, Raw]]:
        """A service, and what should stand beside its agents."""
        custom = self._cluster.services.get(key)
        if custom is None:
            return None, {}
        service = custom.service
        try:
            bodies = [] if service.spec is None else children.companions(service, self._defaults)
        except TemplateError:
            bodies = []
        return service, {name_of(body): body for body in bodies}

    # ── One round ─────────────────────────────────────────────────────────────────────────────────

    async def reconcile(self, key: Key) -> None:
        """One round. KubeError if the API server refused something or could not be reached."""
        custom = self._cluster.services.get(key)
        if (before := self._uids.get(key)) is not None and (custom is None or custom.service.uid != before):
            self._forget(key, before)
        if custom is None:
            return
        self._uids[key] = custom.service.uid
        service, revision, wanted = self._read(custom.service)
        done: list[Action | Scale] = []
        problem: Exception | None = None
        try:
            await self._prepare(custom, service, wanted)
            if (patience := self._fleet.unheard(key)) > 0:
                self._queue.add_after(key, patience)
                return
            await self._converge(custom, service, revision, done)
            self._refused.pop(key, None)
        except (KubeError, TimeoutError) as error:
            problem = error
            if isinstance(error, Forbidden) and service.deleting and await self._is_blind(service.namespace):
                await self._let_go(custom)
                return
            if isinstance(error, ApiError) and not isinstance(error, Conflict):
                self._refused[key] = refusals.explain(error)
        except Exception as error:  # noqa: BLE001 -- raised below, after the status was written
            problem = error
            self._refused[key] = refusals.of_defect(error)
        current = self._cluster.services.get(key)
        if current is not None and current.service.uid == service.uid:
            # The status describes the spec that this round worked on, not one that was written meanwhile.
            missing = () if service.deleting else self._companions.missing(service, wanted)
            observed = self._observe(replace(service, status=current.service.status), revision, missing)
            await self._write_status(key, observed, done)
            # After a failure the queue's back-off decides: a scaling that is due must not shorten it.
            for seconds in (replicas.due(observed), None if problem else autoscale.due(observed)):
                if seconds is not None:
                    self._queue.add_after(key, max(0.1, seconds))
        if problem is not None:
            raise problem

    def _read(self, service: Service) -> tuple[Service, str, list[Raw]]:
        """The service, its revision, its companions. A template that cannot be merged makes the spec
        unreadable.
        """
        if service.spec is None:
            return service, "", []
        try:
            revision = children.revision(service.spec, self._defaults)
            children.agent_pod(service, "check", revision, self._defaults)
            return service, revision, children.companions(service, self._defaults)
        except TemplateError as error:
            return replace(service, spec=None, problem=str(error)), "", []

    def _observe(self, service: Service, revision: str, missing: tuple[str, ...] = ()) -> Observed:
        key = service.namespace, service.name
        gateway = self._cluster.deployments.get((service.namespace, f"{service.name}-gateway"))
        return Observed(
            service=service,
            pods=tuple(
                replace(pod, report=self._fleet.report(uid))
                for uid, pod in self._cluster.pods_of(service).items()
            ),
            nodes=self._cluster.nodes_by_name,
            revision=revision,
            gateway_ready=0 if gateway is None else gateway.ready,
            now=self._clock(),
            refused=self._refused.get(key),
            gateway_refused=None if gateway is None else gateway.refused,
            taken=self._taken.get(key, ()),
            missing=missing,
            occupied=frozenset(self._occupied.get(key, ())),
        )

    async def _prepare(self, custom: Custom, service: Service, wanted: list[Raw]) -> None:
        """Make the companions that agents need, and poll the agents that exist."""
        key = service.namespace, service.name
        acts = not service.deleting and service.spec is not None and not service.paused
        if acts:
            await self._hold(custom)
        if not service.paused:
            await self._repair_pods(service)
        secret = await self._secrets.ensure(service, write=acts)
        taken = [secret.taken] if secret.taken else []
        mended = [secret.mended] if secret.mended else []
        waits = [secret.again]
        if acts:
            kept = await self._companions.ensure(service, wanted, children.retired(service, self._defaults))
            taken += kept.taken
            mended += kept.mended
            waits.append(kept.again)
        if taken:
            waits.append(TAKEN_RETRY)  # what is not ours is not watched
        self._taken[key] = tuple(taken)
        for seconds in waits:
            if seconds is not None:
                self._queue.add_after(key, seconds)
        for message in mended:
            await self._tell_restored(service, message)
        if secret.tokens:
            scaled = service.spec is not None and service.spec.autoscaling is not None
            self._fleet.follow(key, self._cluster.pods_of(service), secret.tokens, scaled=scaled)

    async def _repair_pods(self, service: Service) -> None:
        """Put back labels and owner references of the service's pods that somebody has changed."""
        for name in self._cluster.take_vanished(service):
            found = await self._kube.get(POD, service.namespace, name)
            if found is not None and owned_by(found, service):
                await self._repair_pod(service, Owned.of(found))
        for owned in self._cluster.owned_by(service):
            await self._repair_pod(service, owned)

    async def _repair_pod(self, service: Service, owned: Owned) -> None:
        pod = owned.pod
        labels: dict[str, str | None] = {**children.agent_labels(service, pod.revision)}
        if not pod.undrained:
            labels[UNDRAINED] = None
        if pod.deleting or (owned.owner and all(owned.labels.get(name) == labels[name] for name in labels)):
            return
        metadata: dict[str, Any] = {"labels": labels}
        if not owned.owner:
            metadata["ownerReferences"] = [children.owner_reference(service)]
        await self._annotate(service, pod, metadata)
        message = f"labels or owner of pod {pod.name} were changed by somebody else and have been put back"
        await self._tell_restored(service, message)

    async def _tell_restored(self, service: Service, message: str) -> None:
        """Tell whoever changed an object of ours that this was undone, and how often."""
        log.warning("%s", message)
        await self._recorder.emit(service, "Warning", "Restored", "Restore", message, RESTORED_REPEAT)

    async def _converge(
        self, custom: Custom, service: Service, revision: str, done: list[Action | Scale]
    ) -> None:
        """Carry out all that is due now; ``done`` gets each action when it was carried out, also if a later
        one fails.
        """
        # Without rights nothing can be done for the pods: their namespace is being deleted, and they with it,
        # which drains their agents within the pods' grace period.
        if service.deleting and (not self._cluster.pods_of(service) or service.namespace in self._blind):
            await self._let_go(custom)
            return
        observed = self._observe(service, revision)
        refusal: ApiError | None = None
        if (scale := autoscale.plan(observed)) is not None:
            try:
                await self._scale(service, scale)
            except ApiError as error:  # the agents are still attended to
                refusal = error
            else:  # the write makes another round due, which uses the new number
                done.append(scale)
                return
        actions = replicas.plan(observed)
        if self._taken.get((service.namespace, service.name)):
            # New agents would be reached by whoever has the name, or could not start.
            actions = [action for action in actions if not isinstance(action, Create)]
        if any(isinstance(action, Create) for action in actions):
            # A Secret that somebody deleted would keep new agents from starting.
            await self._secrets.ensure(service, write=True, look=True)
        for action in actions:
            await self._carry_out(service, revision, action)
            done.append(action)
        if actions:
            await self._tell(service, actions)
        if refusal is not None:
            raise refusal

    async def _scale(self, service: Service, scale: Scale) -> None:
        """Change the spec's replicas; the answer is in the mirror before this returns."""
        patch = {"metadata": {"uid": service.uid}, "spec": {"replicas": scale.replicas}}
        self._cluster.services.put(
            await self._kube.merge(LLM_SERVICE, service.namespace, service.name, patch)
        )
        await self._recorder.emit(
            service, "Normal", "Scaled", Scale.__name__, f"{scale.reason}: {scale.message}"
        )

    async def _hold(self, custom: Custom) -> None:
        """Add the finalizer, so that a deletion waits until the agents have drained."""
        if FINALIZER not in custom.finalizers:
            await self._set_finalizers(custom, [*custom.finalizers, FINALIZER])

    async def _let_go(self, custom: Custom) -> None:
        if FINALIZER in custom.finalizers:
            await self._set_finalizers(custom, [name for name in custom.finalizers if name != FINALIZER])

    async def _set_finalizers(self, custom: Custom, names: list[str]) -> None:
        service = custom.service
        patch = {"metadata": {"resourceVersion": custom.version, "finalizers": names}}
        self._cluster.services.put(
            await self._kube.merge(LLM_SERVICE, service.namespace, service.name, patch)
        )

    # ── Actions ───────────────────────────────────────────────────────────────────────────────────

    async def _carry_out(self, service: Service, revision: str, action: Action) -> None:
        """Carry out one action; the mirror has the pod's new state before this returns."""
        match action:
            case Create(name=name):
                body = children.agent_pod(service, name, revision, self._defaults)
                try:
                    self._cluster.pods.put(await self._kube.create(body))
                except Conflict:  # something that is not ours has this name
                    self._occupied.setdefault((service.namespace, service.name), set()).add(name)
                    self._queue.add((service.namespace, service.name))
            case Drain(pod=pod, reason=reason, timeout_s=timeout_s):
                if pod.draining_since is None or pod.drain_reason != reason:
                    since = pod.draining_since if pod.draining_since is not None else self._clock()
                    notes = {DRAINING_SINCE: stamp(since), DRAIN_REASON: reason}
                    await self._annotate(service, pod, {"annotations": notes})
                if problem := await self._fleet.drain(pod.uid, timeout_s):
                    log.info("%s; again in %g s", problem, DRAIN_RETRY)
                    self._queue.add_after((service.namespace, service.name), DRAIN_RETRY)
            case Release(pod=pod):
                await self._annotate(
                    service, pod, {"labels": {UNDRAINED: None}, "annotations": {RELEASED: "true"}}
                )
            case Delete(pod=pod, force=force):
                grace = 0 if force else None
                left = await self._kube.delete(POD, service.namespace, pod.name, pod.uid, grace)
                if left is not None:
                    self._cluster.pods.put(left)

    async def _annotate(self, service: Service, pod: Pod, metadata: dict[str, Any]) -> None:
        patch = {"metadata": {"uid": pod.uid, **metadata}}
        self._cluster.pods.put(await self._kube.merge(POD, service.namespace, pod.name, patch))

    async def _tell(self, service: Service, done: Sequence[Action]) -> None:
        """Post one event per kind of action and reason, however many agents it concerns."""
        words = {Create: "AgentCreated", Drain: "AgentDraining", Delete: "AgentDeleted"}
        groups: dict[tuple[type[Action], str], list[str]] = {}
        for action in done:
            if isinstance(action, Create | Drain | Delete):
                name = action.name if isinstance(action, Create) else action.pod.name
                groups.setdefault((type(action), action.reason), []).append(f"{name}: {action.message}")
        for (kind, reason), messages in groups.items():
            more = f" (and {len(messages) - 3} more)" if len(messages) > 3 else ""
            text = f"{reason}: {'; '.join(messages[:3])}{more}"
            await self._recorder.emit(service, "Normal", words[kind], kind.__name__, text)

    # ── Status ────────────────────────────────────────────────────────────────────────────────────

    async def _write_status(self, key: Key, observed: Observed, done: Sequence[Action | Scale]) -> None:
        """Write the status if it differs; if only load differs, not more often than LOAD_INTERVAL."""
        service, before = observed.service, observed.service.status
        after = status.compute(observed, done, before)
        if after == before:
            return
        now = time.monotonic()
        if not status.urgent(after, before):
            wait = self._load_written.get(key, float("-inf")) + LOAD_INTERVAL - now
            if wait > 0:
                self._queue.add_after(key, wait)
                return
        self._load_written[key] = now
        made = await self._kube.set_status(LLM_SERVICE, service.namespace, service.name, service.uid, after)
        self._cluster.services.put(made)
        await self._tell_conditions(service, before, after)

    async def _tell_conditions(
        self, service: Service, before: Mapping[str, Any], after: Mapping[str, Any]
    ) -> None:
        """Events for what a person wants to know: the service became ready, is no longer ready, or is
        degraded.
        """
        old, new = _conditions(before), _conditions(after)
        for kind, bad in (("Ready", "False"), ("Degraded", "True")):
            now, then = new.get(kind, {}), old.get(kind, {})
            said = (now.get("status"), now.get("reason"))
            if said == (then.get("status"), then.get("reason")):
                continue
            if now.get("status") == bad and (kind == "Degraded" or then.get("status") == "True"):
                await self._recorder.emit(
                    service, "Warning", now["reason"], "Observe", now.get("message", "")
                )
            elif kind == "Ready" and now.get("status") == "True":
                await self._recorder.emit(service, "Normal", "Ready", "Observe", now.get("message", ""))

    def _forget(self, key: Key, uid: str) -> None:
        """The LLMService with this uid is gone."""
        self._fleet.follow(key, {}, ())
        self._companions.forget(key)
        self._cluster.forget(key)
        self._recorder.forget(uid)
        self._secrets.forget(uid)
        self._taken.pop(key, None)
        self._occupied.pop(key, None)
        self._uids.pop(key, None)
        self._refused.pop(key, None)
        self._load_written.pop(key, None)


def _conditions(found: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {condition["type"]: condition for condition in found.get("conditions") or ()}
