"""The cluster's objects and the agents' reports as plain values, which are the input of every decision.

The API server's raw dictionaries are read here and nowhere else, and reading never fails: a field that cannot
be read ends up in ``Service.problem`` or keeps its default. Times are seconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Self

from pydantic import ValidationError

from ..agent.protocol import AgentStatus
from .api import GROUP, LLMServiceSpec
from .refusals import Refusal

FINALIZER = f"{GROUP}/drain"
PAUSED = f"{GROUP}/paused"  # annotation of an LLMService: "true" stops every change
ROTATE = f"{GROUP}/rotate-token"  # annotation of an LLMService: a new value asks for a new internal token
SERVICE = f"{GROUP}/service"  # label of every child
REVISION = f"{GROUP}/revision"  # label of agent pods
REVISION_ENV = "BLOCKYARD_POD_REVISION"  # the same in the container, where nobody can change it
UNDRAINED = (
    f"{GROUP}/undrained"  # label of agent pods until they are drained; the PodDisruptionBudget selects it
)
DRAINING_SINCE = f"{GROUP}/draining-since"  # annotation of agent pods: a drain has begun, and when
DRAIN_REASON = f"{GROUP}/drain-reason"  # annotation of agent pods: why
RELEASED = f"{GROUP}/released"  # annotation of agent pods: UNDRAINED was taken off on purpose
AGENT = "agent"  # the container in an agent's pod
AGENT_PORT = 8000  # every pod has an address of its own
UNREADABLE_AFTER = 15.0  # seconds without a report after which a working agent no longer counts as ready

# Reasons of a pod's problem that come from its phase or conditions; the others are the kubelet's own.
UNSCHEDULABLE = "Unschedulable"
FAILED = "Failed"

AgentPhase = Literal[
    "Pending", "Starting", "Ready", "Draining", "Drained", "Failed", "Unknown", "Terminating"
]


def seconds(stamp: object) -> float | None:
    """An RFC 3339 time as seconds since the epoch; None if it is not one."""
    if not isinstance(stamp, str):
        return None
    try:
        time = datetime.fromisoformat(stamp)
    except ValueError:
        return None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def stamp(time: float) -> str:
    """Seconds since the epoch as Kubernetes writes times: RFC 3339, UTC, whole seconds."""
    return datetime.fromtimestamp(int(time), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, slots=True)
class Service:
    """An LLMService. If its spec cannot be read, ``spec`` is None and ``problem`` says why."""

    name: str
    namespace: str
    uid: str
    generation: int
    deleting: bool
    paused: bool
    created: float
    spec: LLMServiceSpec | None
    problem: str = ""
    status: Mapping[str, Any] = field(default_factory=dict)
    rotate: str = ""  # what the annotation ROTATE says

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Self:
        metadata = raw["metadata"]
        annotations = metadata.get("annotations") or {}
        spec, problem = _read_spec(raw.get("spec"))
        return cls(
            name=metadata["name"],
            namespace=metadata["namespace"],
            uid=metadata["uid"],
            generation=metadata.get("generation", 0),
            deleting="deletionTimestamp" in metadata,
            paused=annotations.get(PAUSED) == "true",
            created=seconds(metadata.get("creationTimestamp")) or 0.0,
            spec=spec,
            problem=problem,
            status=raw.get("status") or {},
            rotate=annotations.get(ROTATE, ""),
        )


def _read_spec(raw: object) -> tuple[LLMServiceSpec | None, str]:
    """The spec, or every field of it that cannot be read and why."""
    try:
        return LLMServiceSpec.model_validate(raw), ""
    except ValidationError as error:
        return None, "; ".join(
            f"{'.'.join(map(str, ('spec', *each['loc'])))}: {each['msg']}"
            for each in error.errors(include_url=False)
        )


@dataclass(frozen=True, slots=True)
class Node:
    """A node; ``since`` is when ``ready`` last changed."""

    name: str
    ready: bool = True
    unschedulable: bool = False
    since: float = 0.0

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Self:
        condition = _condition(raw.get("status") or {}, "Ready")
        return cls(
            name=raw["metadata"]["name"],
            ready=condition.get("status") == "True",
            unschedulable=bool((raw.get("spec") or {}).get("unschedulable")),
            since=seconds(condition.get("lastTransitionTime")) or 0.0,
        )


@dataclass(frozen=True, slots=True)
class Report:
    """What an agent answered when it was last asked: its status, or why there is none.

    ``failing_since`` is when the first of the attempts that have failed since the last status was made.
    """

    status: AgentStatus | None
    error: str = ""
    at: float = 0.0
    failing_since: float | None = None


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod with an agent.

    ``running`` is the state of the container ``agent``, ``problem`` a CamelCase reason why the pod does not
    become ready (UNSCHEDULABLE, FAILED, or the kubelet's, such as ImagePullBackOff and CrashLoopBackOff) with
    ``message`` in the cluster's own words. ``scheduled`` is when the pod was bound to ``node``,
    ``unschedulable_since`` since when the scheduler finds no node for it.
    """

    name: str
    uid: str
    node: str = ""
    ip: str = ""
    port: int = AGENT_PORT
    phase: str = "Pending"
    ready: bool = False
    running: bool = False
    revision: str = ""
    created: float = 0.0
    scheduled: float | None = None
    deleting: bool = False
    undrained: bool = True
    draining_since: float | None = None
    drain_reason: str = ""
    restarts: int = 0
    problem: str = ""
    message: str = ""
    unschedulable_since: float | None = None
    report: Report | None = None

    @classmethod
    def of(cls, raw: Mapping[str, Any], report: Report | None = None) -> Self:
        """``report`` must be of this very pod: match it by uid, because names are used again."""
        metadata, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
        labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
        container: Mapping[str, Any] = next(
            (c for c in status.get("containerStatuses") or () if c.get("name") == AGENT), {}
        )
        scheduled = _condition(status, "PodScheduled")
        problem, message = _problem(status)
        return cls(
            name=metadata["name"],
            uid=metadata["uid"],
            node=spec.get("nodeName") or "",
            ip=status.get("podIP") or "",
            phase=status.get("phase") or "Pending",
            ready=_condition(status, "Ready").get("status") == "True",
            running="running" in (container.get("state") or {}),
            revision=_revision(spec) or labels.get(REVISION, ""),
            created=seconds(metadata.get("creationTimestamp")) or 0.0,
            scheduled=seconds(scheduled.get("lastTransitionTime")) if spec.get("nodeName") else None,
            deleting="deletionTimestamp" in metadata,
            # Somebody else may have taken the label off: that alone does not mean that the agent is drained.
            undrained=UNDRAINED in labels or RELEASED not in annotations,
            draining_since=seconds(annotations.get(DRAINING_SINCE)),
            drain_reason=annotations.get(DRAIN_REASON, ""),
            restarts=container.get("restartCount", 0),
            problem=problem,
            message=message,
            unschedulable_since=(
                seconds(scheduled.get("lastTransitionTime")) if problem == UNSCHEDULABLE else None
            ),
            report=report,
        )

    @property
    def agent(self) -> AgentStatus | None:
        """The agent's status, if it answered when it was last asked."""
        return self.report.status if self.report is not None and not self.report.error else None

    @property
    def unreadable_since(self) -> float | None:
        """Since when the report of an agent that runs cannot be read; None if it can, or does not run."""
        return self.report.failing_since if self.running and self.report is not None else None

    @property
    def finished(self) -> bool:
        """Its containers will not run again: evicted or refused by the kubelet, or ended with its node."""
        return self.phase in ("Failed", "Succeeded")

    @property
    def started(self) -> bool:
        """An agent runs in it and may have work: its container runs, or the agent answers."""
        return not self.finished and (self.running or self.agent is not None)

    @property
    def state(self) -> AgentPhase:
        """The agent's state in one word for a person; as it reports it itself, where it does."""
        if self.deleting:
            return "Terminating"
        if self.finished:
            return "Failed"
        if self.agent is not None and self.agent.state in ("draining", "drained", "failed"):
            return _PHASES[self.agent.state]
        if self.draining_since is not None:
            return "Draining"
        if self.ready:
            return "Ready"
        if self.running:
            return "Starting" if self.agent is None or self.agent.state == "starting" else "Unknown"
        return "Pending"


_PHASES: dict[str, AgentPhase] = {"draining": "Draining", "drained": "Drained", "failed": "Failed"}


@dataclass(frozen=True, slots=True)
class Observed:
    """All that is known of one service at one moment.

    ``pods`` are its agents' pods, terminating ones included; ``nodes`` all nodes by name. ``revision`` is
    what ``children.revision`` says of the spec ("" without one). ``refused`` is why the API server refused
    the last write that it refused, until one goes through; ``gateway_refused`` is the same for the pods of
    the gateway's Deployment. ``taken`` says which objects that it needs have names that others took,
    ``missing`` which of its protections are not there, both in words. ``occupied`` are names that its pods
    cannot have.
    """

    service: Service
    pods: tuple[Pod, ...]
    nodes: Mapping[str, Node]
    revision: str
    gateway_ready: int
    now: float
    refused: Refusal | None = None
    gateway_refused: Refusal | None = None
    taken: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    occupied: frozenset[str] = frozenset()


def _revision(spec: Mapping[str, Any]) -> str:
    """What the pod was made from, from its container's environment, which cannot be changed."""
    container: Mapping[str, Any] = next(
        (c for c in spec.get("containers") or () if c.get("name") == AGENT), {}
    )
    return next(
        (str(e.get("value")) for e in container.get("env") or () if e.get("name") == REVISION_ENV), ""
    )


def _condition(status: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return next((c for c in status.get("conditions") or () if c.get("type") == kind), {})


def _problem(status: Mapping[str, Any]) -> tuple[str, str]:
    """Why a pod does not come up: (reason, message); ("", "") if nothing is known to be wrong."""
    if status.get("phase") == "Failed":
        return status.get("reason") or FAILED, status.get("message") or "the pod has failed"
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") == "False":
        return scheduled.get("reason") or UNSCHEDULABLE, scheduled.get("message") or ""
    for container in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())):
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason = waiting.get("reason") or ""
        if reason and reason not in ("ContainerCreating", "PodInitializing"):
            return reason, _words(container, waiting.get("message") or "")
    return "", ""


def _words(container: Mapping[str, Any], message: str) -> str:
    """The kubelet's message, and how the container ended the last time, which explains a crash loop."""
    ended = (container.get("lastState") or {}).get("terminated") or {}
    if not ended:
        return message
    how = f"{ended.get('reason') or 'ended'} with exit code {ended.get('exitCode')}"
    said = (ended.get("message") or "").strip()
    return "; ".join(filter(None, (message, f"container {container.get('name')} {how}", said)))
