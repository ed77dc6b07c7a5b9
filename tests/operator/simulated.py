"""A small cluster in memory: nodes, a scheduler, kubelets and agents, whose every step a test decides.

It keeps the rules of the real ones as far as the operator relies on them: names are unique, a deleted pod
with a running container stays until its grace period ends, a pod on a dead node changes no more, agents
forget that they drain when they restart. ``carry_out`` is the operator's hand, and checks every action
against what must never happen.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from blockyard.agent.protocol import AgentState, AgentStatus, TierStatus
from blockyard.operator import children, replicas, status
from blockyard.operator.api import LLMServiceSpec
from blockyard.operator.children import Defaults
from blockyard.operator.observed import Node, Observed, Pod, Report, Service
from blockyard.operator.replicas import Action, Create, Delete, Drain, Release

DEFAULTS = Defaults(image="agent:1", namespace="blockyard-system")
SPEC = {"model": {"hub": {"name": "SmolLM2-135M-Instruct"}}, "drain": {"timeoutSeconds": 100}}
STEP = 5.0  # seconds of one step of time
BLOCKS = 100


def agent_status(state: AgentState, *, running: int = 0, active: int = 0, cached: int = 0) -> AgentStatus:
    return AgentStatus(
        version=1,
        incarnation="i",
        state=state,
        model="m",
        running=running,
        device_tier=TierStatus(
            total=BLOCKS, free=BLOCKS - active - cached, active=active, cached=cached, block_bytes=1 << 20
        ),
    )


@dataclass
class SimPod:
    """A pod, its kubelet's part and its agent."""

    name: str
    uid: str
    revision: str
    created: float
    node: str = ""
    scheduled: float | None = None
    phase: str = "Pending"
    agent: AgentState | None = None  # None: no process
    reachable: bool = True  # by the operator
    requests: int = 0
    drain_deadline: float | None = None  # of the agent: when it cuts requests off
    undrained: bool = True
    draining_since: float | None = None
    drain_reason: str = ""
    deleted_at: float | None = None
    restarts: int = 0

    @property
    def answers(self) -> bool:
        return self.agent is not None and self.reachable


@dataclass
class SimNode:
    name: str
    gpus: int
    ready: bool = True
    cordoned: bool = False
    since: float = 0.0


@dataclass
class Simulated:
    """The cluster. ``spec`` is the LLMService's, as its manifest has it."""

    spec: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(SPEC))
    now: float = 1_000_000.0
    pods: dict[str, SimPod] = field(default_factory=dict)
    nodes: dict[str, SimNode] = field(default_factory=dict)
    deleting: bool = False
    paused: bool = False
    generation: int = 1
    status: dict[str, Any] = field(default_factory=dict)
    made: int = 0

    def add_node(self, name: str, gpus: int = 8) -> None:
        self.nodes.setdefault(name, SimNode(name, gpus, since=self.now))

    # ── What the operator sees ────────────────────────────────────────────────────────────────────

    @property
    def read_spec(self) -> LLMServiceSpec:
        return LLMServiceSpec.model_validate(self.spec)

    def observed(self, now: float | None = None) -> Observed:
        spec = self.read_spec
        service = Service(
            name="llm",
            namespace="default",
            uid="uid-of-llm",
            generation=self.generation,
            deleting=self.deleting,
            paused=self.paused,
            created=0.0,
            spec=spec,
            status=copy.deepcopy(self.status),
        )
        nodes = {
            node.name: Node(node.name, ready=node.ready, unschedulable=node.cordoned, since=node.since)
            for node in self.nodes.values()
        }
        return Observed(
            service=service,
            pods=tuple(self._pod(pod) for pod in self.pods.values()),
            nodes=nodes,
            revision=children.revision(spec, DEFAULTS),
            gateway_ready=1,
            now=self.now if now is None else now,
        )

    def _pod(self, pod: SimPod) -> Pod:
        report = None
        if pod.agent is not None:
            report = Report(None, "no route to host") if not pod.answers else Report(self._status(pod))
        return Pod(
            name=pod.name,
            uid=pod.uid,
            node=pod.node,
            ip="10.0.0.1" if pod.node else "",
            phase=pod.phase,
            ready=self.ready(pod),
            running=pod.agent is not None,
            revision=pod.revision,
            created=pod.created,
            scheduled=pod.scheduled,
            deleting=pod.deleted_at is not None,
            undrained=pod.undrained,
            draining_since=pod.draining_since,
            drain_reason=pod.drain_reason,
            restarts=pod.restarts,
            problem="" if pod.node else "Unschedulable",
            message="" if pod.node else "0/3 nodes are available",
            report=report,
        )

    def _status(self, pod: SimPod) -> AgentStatus:
        assert pod.agent is not None
        return agent_status(pod.agent, running=pod.requests, active=min(BLOCKS, pod.requests))

    def ready(self, pod: SimPod) -> bool:
        node = self.nodes.get(pod.node)
        return pod.agent == "ready" and pod.phase == "Running" and node is not None and node.ready

    # ── What the operator does ────────────────────────────────────────────────────────────────────

    def round(self, stop_after: int | None = None, *, twice: bool = False) -> list[Action]:
        """One round of the operator, killed after ``stop_after`` actions if that is given.

        ``twice``: the same plan is carried out again, as one does that has not seen yet what it did.
        """
        seen = self.observed()
        planned = replicas.plan(seen)
        assert planned == replicas.plan(seen), "the same state gives the same plan"
        if self.paused:
            assert planned == []
        done = planned[:stop_after]
        for action in done:
            self.carry_out(action)
        if twice:
            before = copy.deepcopy(self.pods)
            for action in done:
                self.carry_out(action)
            assert self.pods == before, "a plan that is carried out twice changes nothing more"
        if stop_after is None:  # else it did not come to writing the status
            self.status = status.compute(self.observed(), done, self.status)
        return planned

    def carry_out(self, action: Action) -> None:
        match action:
            case Create(name=name):
                if name in self.pods:
                    return
                revision = children.revision(self.read_spec, DEFAULTS)
                self.made += 1
                self.pods[name] = SimPod(name, f"{name}-{self.made}", revision, self.now)
                most = self.read_spec.replicas + self.read_spec.rollout.max_surge
                assert len(self.staying()) <= most, (
                    "never more than replicas and maxSurge, but for those that go"
                )
            case Drain(pod=seen, reason=reason, timeout_s=timeout_s):
                pod = self._same(seen)
                if pod is None:
                    return
                if pod.draining_since is None and pod.agent in ("ready", "starting") and not self.deleting:
                    self._check_capacity_without(pod)
                if pod.draining_since is None:
                    pod.draining_since = self.now
                pod.drain_reason = reason
                if pod.answers and pod.agent in ("ready", "starting"):
                    assert timeout_s <= self.read_spec.drain.timeout_seconds
                    pod.agent, pod.drain_deadline = "draining", self.now + timeout_s
            case Release(pod=seen):
                pod = self._same(seen)
                if pod is not None:
                    self._check_may_go(pod)
                    pod.undrained = False
            case Delete(pod=seen, force=force):
                pod = self._same(seen)
                if pod is None:
                    return
                if pod.undrained and pod.deleted_at is None:
                    self._check_may_go(pod)
                if force:
                    assert not pod.answers, "an agent that answers is not lost"
                    del self.pods[pod.name]
                elif pod.deleted_at is None:
                    pod.deleted_at = self.now
                    if pod.agent in ("ready", "starting"):
                        pod.agent, pod.drain_deadline = "draining", self.now

    def _same(self, seen: Pod) -> SimPod | None:
        """The pod of that name, if it is still the one that was meant."""
        pod = self.pods.get(seen.name)
        return pod if pod is not None and pod.uid == seen.uid else None

    def _check_may_go(self, pod: SimPod) -> None:
        """No undrained agent that can be reached is deleted before its deadline."""
        if not pod.answers or pod.agent in ("drained", "failed") or pod.phase == "Failed":
            return
        assert pod.draining_since is not None, f"{pod.name} is deleted undrained"
        assert self.now >= pod.draining_since + self.read_spec.drain.timeout_seconds, (
            f"{pod.name} is deleted before its deadline"
        )

    def _check_capacity_without(self, pod: SimPod) -> None:
        """The operator takes no ready agent away below the floor."""
        if not self.ready(pod):
            return
        spec = self.read_spec
        left = sum(self.ready(other) for other in self.staying() if other is not pod)
        assert left >= spec.replicas - spec.rollout.max_unavailable, (
            f"{pod.name} is drained while only {left} others serve"
        )

    def staying(self) -> list[SimPod]:
        return [pod for pod in self.pods.values() if not self._goes(pod)]

    def _goes(self, pod: SimPod) -> bool:
        seen = self._pod(pod)
        gone = seen.deleting or seen.finished or bool(replicas.lost(seen, self.observed()))
        return gone or replicas.leaving(seen)

    # ── What the cluster does ─────────────────────────────────────────────────────────────────────

    def step(self) -> None:
        """Time goes on: the scheduler, the kubelets and the agents do what they can."""
        self.now += STEP
        for pod in list(self.pods.values()):
            node = self.nodes.get(pod.node)
            if not pod.node:
                if pod.deleted_at is not None:
                    del self.pods[pod.name]
                else:
                    self._schedule(pod)
            elif node is not None and node.ready:
                self._kubelet(pod)

    def _schedule(self, pod: SimPod) -> None:
        for node in self.nodes.values():
            used = sum(other.node == node.name and other.phase != "Failed" for other in self.pods.values())
            if node.ready and not node.cordoned and used < node.gpus:
                pod.node, pod.scheduled = node.name, self.now
                return

    def _kubelet(self, pod: SimPod) -> None:
        if pod.deleted_at is not None and (pod.agent is None or self.now >= pod.deleted_at + 30):
            del self.pods[pod.name]
        elif pod.phase == "Failed":
            return
        elif pod.agent is None:
            pod.phase, pod.agent = "Running", "starting"
        elif pod.agent == "failed":
            self.crash(pod)  # by its liveness probe
        elif pod.agent == "starting":
            pod.agent = "ready"
        elif pod.agent == "draining":
            pod.requests = max(0, pod.requests - 1)
            if pod.requests == 0 or (pod.drain_deadline is not None and self.now >= pod.drain_deadline):
                pod.agent, pod.requests = "drained", 0
        elif pod.agent == "drained" and pod.deleted_at is not None:
            del self.pods[pod.name]

    def crash(self, pod: SimPod) -> None:
        """The agent's process ends; its kubelet starts another one later."""
        if pod.agent is not None:
            pod.agent, pod.requests, pod.drain_deadline = None, 0, None
            pod.restarts += 1

    def evict(self, pod: SimPod) -> None:
        """The kubelet gives the pod up."""
        if pod.phase == "Running":
            pod.phase, pod.agent = "Failed", None

    def lose_node(self, name: str) -> None:
        if self.nodes.pop(name, None) is not None:
            for pod in self.pods.values():
                if pod.node == name:
                    pod.agent = None

    def set_node(self, name: str, *, ready: bool) -> None:
        """Not ready: its kubelet is silent, and its agents are not to be reached."""
        node = self.nodes.get(name)
        if node is not None and node.ready != ready:
            node.ready, node.since = ready, self.now
            for pod in self.pods.values():
                if pod.node == name:
                    pod.reachable = ready

    # ── Peace ─────────────────────────────────────────────────────────────────────────────────────

    def heal(self) -> None:
        """The cluster becomes one in which everything that is wanted can be."""
        self.paused = False
        for number in range(3):
            self.add_node(f"healthy-{number}", gpus=16)
        for node in self.nodes.values():
            self.set_node(node.name, ready=True)
            node.cordoned = False
        for pod in self.pods.values():
            pod.reachable = True

    def settle(self, rounds: int = 400) -> None:
        """In a healthy cluster everything comes to rest as it is wanted."""
        self.heal()
        for _ in range(rounds):
            self.round()
            self.step()
            if self.at_rest():
                break
        seen = self.observed()
        assert replicas.plan(seen) == []
        if self.deleting:
            assert self.pods == {}
            return
        pods = list(self.pods.values())
        assert len(pods) == self.read_spec.replicas, f"{[pod.name for pod in pods]} after {rounds} rounds"
        assert all(self.ready(pod) and pod.revision == seen.revision for pod in pods)
        assert replicas.due(seen) is None, "time alone changes nothing at rest"

    def at_rest(self) -> bool:
        seen = self.observed()
        wanted = 0 if self.deleting else self.read_spec.replicas
        right = all(self.ready(pod) and pod.revision == seen.revision for pod in self.pods.values())
        return len(self.pods) == wanted and right and replicas.plan(seen) == []
