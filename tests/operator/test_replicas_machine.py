"""Whatever happens in whatever order, the operator's plans keep their promises; see also simulated.py."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from blockyard.operator import replicas, status
from blockyard.operator.api import LLMServiceStatus
from blockyard.operator.replicas import Action, Create, Drain

from .simulated import SimPod, Simulated

NODES = ("node-0", "node-1", "node-2")


def shape(actions: list[Action]) -> list[tuple[str, str]]:
    """Actions without what merely counts time."""
    return [(type(a).__name__, a.name if isinstance(a, Create) else a.pod.name) for a in actions]


class AnythingHappens(RuleBasedStateMachine):
    """Events of a cluster in any order, with an operator that may be killed after any action."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Simulated()

    @initialize(
        wanted=st.integers(0, 4),
        surge=st.integers(0, 2),
        unavailable=st.integers(0, 2),
        gpus=st.integers(1, 4),
    )
    def begin(self, wanted: int, surge: int, unavailable: int, gpus: int) -> None:
        self.cluster.spec["replicas"] = wanted
        self.cluster.spec["rollout"] = {
            "maxSurge": surge or int(not unavailable),
            "maxUnavailable": unavailable,
        }
        for name in NODES:
            self.cluster.add_node(name, gpus)

    def pick(self, number: int) -> SimPod | None:
        pods = list(self.cluster.pods.values())
        return pods[number % len(pods)] if pods else None

    @rule(count=st.integers(1, 12))
    def all_goes_on(self, count: int) -> None:
        for _ in range(count):
            self.cluster.round()
            self.cluster.step()

    @rule(count=st.integers(1, 6))
    def time_passes(self, count: int) -> None:
        for _ in range(count):
            self.cluster.step()

    @rule(stop_after=st.none() | st.integers(0, 4), twice=st.booleans())
    def operator_works(self, stop_after: int | None, twice: bool) -> None:
        self.cluster.round(stop_after, twice=twice)

    @rule(wanted=st.integers(0, 5))
    def replicas_change(self, wanted: int) -> None:
        self.cluster.spec["replicas"] = wanted
        self.cluster.generation += 1

    @rule(length=st.integers(1, 4))
    def revision_changes(self, length: int) -> None:
        self.cluster.spec["engine"] = {"maxModelLen": 1024 * length}
        self.cluster.generation += 1

    @rule(seconds=st.integers(0, 100))
    def drain_timeout_changes(self, seconds: int) -> None:
        self.cluster.spec["drain"] = {"timeoutSeconds": seconds}
        self.cluster.generation += 1

    @rule(paused=st.booleans())
    def annotation_changes(self, paused: bool) -> None:
        self.cluster.paused = paused

    @rule(number=st.integers(0, 9), requests=st.integers(0, 50))
    def load_changes(self, number: int, requests: int) -> None:
        pod = self.pick(number)
        if pod is not None and pod.agent == "ready":
            pod.requests = requests

    @rule(number=st.integers(0, 9))
    def agent_crashes(self, number: int) -> None:
        if pod := self.pick(number):
            self.cluster.crash(pod)

    @rule(number=st.integers(0, 9))
    def engine_fails(self, number: int) -> None:
        pod = self.pick(number)
        if pod is not None and pod.agent is not None:
            pod.agent = "failed"

    @rule(number=st.integers(0, 9))
    def somebody_else_drains_an_agent(self, number: int) -> None:
        pod = self.pick(number)
        if pod is not None and pod.agent == "ready":
            pod.agent, pod.drain_deadline = "draining", self.cluster.now + 20

    @rule(number=st.integers(0, 9), reachable=st.booleans())
    def network_changes(self, number: int, reachable: bool) -> None:
        if pod := self.pick(number):
            pod.reachable = reachable

    @rule(number=st.integers(0, 9))
    def kubelet_gives_a_pod_up(self, number: int) -> None:
        if pod := self.pick(number):
            self.cluster.evict(pod)

    @rule(number=st.integers(0, 9))
    def person_deletes_a_pod(self, number: int) -> None:
        pod = self.pick(number)
        if pod is not None and pod.deleted_at is None:
            pod.deleted_at = self.cluster.now
            if pod.agent is not None:
                pod.agent, pod.drain_deadline = "draining", self.cluster.now + 10

    @rule(name=st.sampled_from(NODES), cordoned=st.booleans())
    def node_is_cordoned_or_not(self, name: str, cordoned: bool) -> None:
        if node := self.cluster.nodes.get(name):
            node.cordoned = cordoned

    @rule(name=st.sampled_from(NODES), ready=st.booleans())
    def kubelet_falls_silent_or_returns(self, name: str, ready: bool) -> None:
        self.cluster.set_node(name, ready=ready)

    @rule(name=st.sampled_from(NODES))
    def node_goes(self, name: str) -> None:
        self.cluster.lose_node(name)

    @rule(name=st.sampled_from(NODES))
    def node_comes(self, name: str) -> None:
        self.cluster.add_node(name)

    @rule(sure=st.integers(0, 5))
    def service_is_deleted(self, sure: int) -> None:
        if sure == 5:  # else nearly every run would soon be about deletion
            self.cluster.deleting = True

    @rule()
    def all_comes_to_rest(self) -> None:
        self.cluster.settle()

    @invariant()
    def time_alone_changes_a_plan_only_when_it_is_due(self) -> None:
        seen = self.cluster.observed()
        due = replicas.due(seen)
        assert due is None or due > 0
        now = shape(replicas.plan(seen))
        later = seen.now + (1e7 if due is None else due * 0.99)
        assert shape(replicas.plan(replace(seen, now=later))) == now

    @invariant()
    def the_status_is_true_and_rests(self) -> None:
        seen = self.cluster.observed()
        found = status.compute(seen, [], self.cluster.status)
        assert found["observedGeneration"] == self.cluster.generation
        assert found["replicas"] == len(self.cluster.staying())
        assert found["readyReplicas"] == sum(map(self.cluster.ready, self.cluster.staying()))
        later = replace(seen, now=seen.now + 1)
        if shape(replicas.plan(later)) == shape(replicas.plan(seen)):
            assert status.compute(later, [], found) == found, "the same state gives the same status"
        LLMServiceStatus.model_validate(found)

    def teardown(self) -> None:
        if self.cluster.nodes or self.cluster.pods:
            self.cluster.settle()


TestAnythingHappens = AnythingHappens.TestCase
TestAnythingHappens.settings = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def test_a_drain_is_asked_for_with_what_is_left_of_its_time() -> None:
    """The agent restarts in the middle of a drain: the deadline stays."""
    cluster = Simulated()
    cluster.add_node("node")
    cluster.settle()
    pod = next(iter(cluster.pods.values()))
    pod.requests = 50
    cluster.spec["replicas"] = 0
    cluster.round()
    cluster.step()
    cluster.crash(pod)
    cluster.step()
    cluster.step()
    (action,) = replicas.plan(cluster.observed())
    assert isinstance(action, Drain)
    assert action.timeout_s == 100 - 15
