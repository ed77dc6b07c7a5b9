"""FairQueue: nobody starves, nobody saves up credit, and every broken invariant is noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from blockyard.engine import fair_queue
from blockyard.engine.fair_queue import FairQueue


@dataclass(frozen=True)
class Job:
    tenant: str
    arrival: int
    priority: int = 0
    cost: int = 1


def enter(queue: FairQueue[Job], job: Job) -> None:
    queue.arrive(job.tenant)
    queue.push(job)


def serve(queue: FairQueue[Job]) -> Job:
    job = queue.peek()
    assert job is not None
    queue.remove(job)
    queue.charge(job.tenant, job.cost)
    queue.leave(job.tenant)
    return job


@given(
    greedy=st.integers(20, 60),
    costs=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    cost=st.integers(1, 50),
)
def test_a_greedy_tenant_cannot_starve_another(greedy: int, costs: list[int], cost: int) -> None:
    """However many requests came before, a newcomer waits for no more service than it gets itself."""
    queue: FairQueue[Job] = FairQueue()
    for i in range(greedy):
        enter(queue, Job("greedy", i, cost=cost))
    for i, modest in enumerate(costs):
        enter(queue, Job("modest", greedy + i, cost=modest))
    served = {"greedy": 0, "modest": 0}
    while {job.tenant for job in queue} == {"greedy", "modest"}:
        job = serve(queue)
        served[job.tenant] += job.cost
        # Served token for token: never further apart than one request of each.
        assert abs(served["greedy"] - served["modest"]) <= max(cost, *costs)


@given(idle=st.integers(1, 1000))
def test_time_away_earns_no_credit(idle: int) -> None:
    queue: FairQueue[Job] = FairQueue()
    enter(queue, Job("away", 0))
    serve(queue)
    enter(queue, Job("here", 1, cost=idle))
    enter(queue, Job("here", 2, cost=10))
    enter(queue, Job("here", 3, cost=10))
    enter(queue, Job("here", 4, cost=10))
    assert serve(queue).arrival == 1
    for arrival in (5, 6, 7):
        enter(queue, Job("away", arrival, cost=10))
    tenants = [serve(queue).tenant for _ in range(6)]
    assert sorted(tenants[:2]) == sorted(tenants[2:4]) == ["away", "here"], tenants


def test_priority_then_fairness_then_age() -> None:
    queue: FairQueue[Job] = FairQueue()
    for job in (
        Job("a", 0),
        Job("a", 1, priority=-1),
        Job("a", 2, priority=-1),
        Job("b", 3),
        Job("b", 4, priority=1),
    ):
        enter(queue, job)
    assert [serve(queue).arrival for _ in range(5)] == [1, 2, 3, 0, 4]
    assert queue.peek() is None


def test_counters_of_idle_tenants_age_out_but_never_those_of_present_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fair_queue, "MAX_IDLE_TENANTS", 10)
    queue: FairQueue[Job] = FairQueue()
    enter(queue, Job("stays", 0))
    queue.charge("stays", 100)
    for i in range(1, 100):
        enter(queue, Job(f"t{i}", i, priority=-1))
        assert serve(queue).tenant == f"t{i}"
        queue.check()
        assert len(queue._served) <= 11
    assert queue._served["stays"] == 100


class QueueMachine(RuleBasedStateMachine):
    """Against a plain list that is sorted anew each time."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[Job] = FairQueue()
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.count = 0

    @rule(tenant=st.sampled_from("abc"), priority=st.integers(-1, 1))
    def arrive(self, tenant: str, priority: int) -> None:
        job = Job(tenant, self.count, priority)
        self.count += 1
        enter(self.queue, job)
        self.waiting.append(job)

    @precondition(lambda self: self.waiting)
    @rule(tokens=st.integers(0, 9))
    def start(self, tokens: int) -> None:
        job = self.queue.peek()
        assert job == min(self.waiting, key=lambda j: (j.priority, self.queue._served[j.tenant], j.arrival))
        self.queue.remove(job)
        self.queue.charge(job.tenant, tokens)
        self.waiting.remove(job)
        self.running.append(job)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99), again=st.booleans())
    def stop(self, which: int, again: bool) -> None:
        job = self.running.pop(which % len(self.running))
        if again:
            self.queue.push(job)
            self.waiting.append(job)
        else:
            self.queue.leave(job.tenant)

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0, 99))
    def abort(self, which: int) -> None:
        job = self.waiting.pop(which % len(self.waiting))
        self.queue.remove(job)
        self.queue.leave(job.tenant)

    @invariant()
    def sound(self) -> None:
        self.queue.check()
        assert sorted(self.queue, key=lambda j: j.arrival) == sorted(self.waiting, key=lambda j: j.arrival)
        assert len(self.queue) == len(self.waiting)
        assert (self.queue.peek() is None) == (not self.waiting)
        assert self.queue._present.keys() == {j.tenant for j in (*self.waiting, *self.running)}


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def _wrong_size(queue: FairQueue[Job]) -> None:
    queue._size += 1


def _empty_list(queue: FairQueue[Job]) -> None:
    queue._waiting["nobody"] = []


def _out_of_order(queue: FairQueue[Job]) -> None:
    queue._waiting["a"].reverse()


def _absent(queue: FairQueue[Job]) -> None:
    queue._present["a"] = 1


def _nobody_present(queue: FairQueue[Job]) -> None:
    queue._present["gone"] = 0


def _no_counter(queue: FairQueue[Job]) -> None:
    del queue._served["b"]


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (_wrong_size, "size is wrong"),
        (_empty_list, "empty queue is kept for tenant 'nobody'"),
        (_out_of_order, "'s queue is out of order"),
        (_absent, "'a' waits but is not present"),
        (_nobody_present, "present without a request"),
        (_no_counter, "has no counter"),
    ],
)
def test_check_notices(corrupt: Callable[[FairQueue[Job]], None], message: str) -> None:
    queue: FairQueue[Job] = FairQueue()
    for job in (Job("a", 0), Job("a", 1), Job("b", 2)):
        enter(queue, job)
    queue.check()
    corrupt(queue)
    with pytest.raises(AssertionError, match=message):
        queue.check()
