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


def serve(queue: FairQueue[Job]) -> Job:
    job = queue.peek()
    assert job is not None
    queue.remove(job)
    queue.charge(job.tenant, job.cost)
    queue.settle(job)
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
        queue.push(Job("greedy", i, cost=cost))
    for i, modest in enumerate(costs):
        queue.push(Job("modest", greedy + i, cost=modest))
    served = {"greedy": 0, "modest": 0}
    while {job.tenant for job in queue} == {"greedy", "modest"}:
        job = serve(queue)
        served[job.tenant] += job.cost
        # Served token for token: never further apart than one request of each.
        assert abs(served["greedy"] - served["modest"]) <= max(cost, *costs)


@given(idle=st.integers(1, 1000))
def test_time_away_earns_no_credit(idle: int) -> None:
    queue: FairQueue[Job] = FairQueue()
    queue.push(Job("away", 0))
    serve(queue)
    queue.push(Job("here", 1, cost=idle))
    for arrival in (2, 3, 4):
        queue.push(Job("here", arrival, cost=10))
    assert serve(queue).arrival == 1
    for arrival in (5, 6, 7):
        queue.push(Job("away", arrival, cost=10))
    tenants = [serve(queue).tenant for _ in range(6)]
    assert sorted(tenants[:2]) == sorted(tenants[2:4]) == ["away", "here"], tenants


@given(alone=st.integers(1, 1000))
def test_what_nobody_else_wanted_is_no_debt(alone: int) -> None:
    queue: FairQueue[Job] = FairQueue()
    queue.push(Job("first", 0, cost=alone))
    serve(queue)
    for arrival in range(1, 7):
        queue.push(Job("first" if arrival % 2 else "second", arrival, cost=10))
    tenants = [serve(queue).tenant for _ in range(6)]
    assert all(sorted(tenants[i : i + 2]) == ["first", "second"] for i in (0, 2, 4)), tenants


def test_priority_then_fairness_then_age() -> None:
    queue: FairQueue[Job] = FairQueue()
    for job in (
        Job("a", 0),
        Job("a", 1, priority=-1),
        Job("a", 2, priority=-1),
        Job("b", 3),
        Job("b", 4, priority=1),
    ):
        queue.push(job)
    assert [serve(queue).arrival for _ in range(5)] == [1, 2, 3, 0, 4]
    assert queue.peek() is None


def test_counters_of_idle_tenants_age_out_but_never_those_of_present_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fair_queue, "MAX_IDLE_TENANTS", 10)
    queue: FairQueue[Job] = FairQueue()
    queue.push(Job("stays", 0))
    queue.charge("stays", 100)
    for i in range(1, 100):
        queue.push(Job(f"t{i}", i, priority=-1))
        assert serve(queue).tenant == f"t{i}"
        queue.check([])
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
        self.queue.push(job)
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
            self.queue.settle(job)

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0, 99))
    def abort(self, which: int) -> None:
        job = self.waiting.pop(which % len(self.waiting))
        self.queue.remove(job)
        self.queue.settle(job)

    @invariant()
    def sound(self) -> None:
        self.queue.check(self.running)
        assert sorted(self.queue, key=lambda j: j.arrival) == sorted(self.waiting, key=lambda j: j.arrival)
        assert len(self.queue) == len(self.waiting)
        assert (self.queue.peek() is None) == (not self.waiting)
        assert self.queue._waiting.keys() == {j.tenant for j in (*self.waiting, *self.running)}


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def _wrong_size(queue: FairQueue[Job]) -> None:
    queue._size += 1


def _empty_list(queue: FairQueue[Job]) -> None:
    queue._queued["nobody"] = []


def _out_of_order(queue: FairQueue[Job]) -> None:
    queue._queued["a"].reverse()


def _absent(queue: FairQueue[Job]) -> None:
    queue._waiting["a"].pop()


def _twice(queue: FairQueue[Job]) -> None:
    queue._queued["b"].append(Job("b", 3))
    queue._size += 1
    queue._waiting["b"].add(Job("b", 3))


def _left(queue: FairQueue[Job]) -> None:
    queue._waiting["b"].add(Job("b", 4))


def _nobody_waits(queue: FairQueue[Job]) -> None:
    queue._waiting["gone"] = set()


def _no_counter(queue: FairQueue[Job]) -> None:
    del queue._served["b"]


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (_wrong_size, "size is wrong"),
        (_empty_list, "empty queue is kept for tenant 'nobody'"),
        (_out_of_order, "'s queue is out of order"),
        (_absent, "'a' is queued but does not wait"),
        (_twice, "'b' has a request in two places"),
        (_left, "has left still waits"),
        (_nobody_waits, "waits without a request"),
        (_no_counter, "has no counter"),
    ],
)
def test_check_notices(corrupt: Callable[[FairQueue[Job]], None], message: str) -> None:
    queue: FairQueue[Job] = FairQueue()
    for job in (Job("a", 0), Job("a", 1), Job("b", 2), Job("b", 3)):
        queue.push(job)
    queue.remove(Job("b", 3))
    queue.check([Job("b", 3)])
    corrupt(queue)
    with pytest.raises(AssertionError, match=message):
        queue.check([Job("b", 3)])
