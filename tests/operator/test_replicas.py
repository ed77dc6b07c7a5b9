"""Which agents come and go, case by case."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest

from blockyard.operator import reasons, replicas
from blockyard.operator.api import LLMServiceSpec
from blockyard.operator.observed import Node, Observed, Pod, Report, Service, stamp
from blockyard.operator.replicas import Create, Delete, Drain, Release

from .simulated import agent_status

NOW = 1_000_000.0
NODE = Node("node")


def agent(name: str, **more: Any) -> Pod:
    """A pod whose agent serves, of the newest revision."""
    facts: dict[str, Any] = {
        "uid": f"uid-{name}",
        "node": "node",
        "phase": "Running",
        "ready": True,
        "running": True,
        "revision": "new",
        "created": NOW - 1000,
        "scheduled": NOW - 999,
        "report": Report(agent_status("ready")),
    }
    return Pod(name=name, **{**facts, **more})


def pending(name: str, **more: Any) -> Pod:
    facts: dict[str, Any] = {
        "node": "",
        "phase": "Pending",
        "ready": False,
        "running": False,
        "scheduled": None,
        "problem": "Unschedulable",
        "report": None,
    }
    return agent(name, **{**facts, **more})


def loaded(name: str, running: int, active: int, cached: int = 0, **more: Any) -> Pod:
    report = Report(agent_status("ready", running=running, active=active, cached=cached))
    return agent(name, report=report, **more)


def draining(name: str, since: float, **more: Any) -> Pod:
    facts: dict[str, Any] = {"ready": False, "draining_since": since, "drain_reason": reasons.SCALE_IN}
    return agent(name, **{**facts, "report": Report(agent_status("draining")), **more})


def seen(*pods: Pod, replicas: int = 1, nodes: tuple[Node, ...] = (NODE,), **more: Any) -> Observed:
    service = {key: more.pop(key) for key in ("deleting", "paused", "status", "spec") if key in more}
    spec = {
        "model": {"hub": {"name": "m"}},
        "replicas": replicas,
        "drain": {"timeoutSeconds": 100},
        "rollout": more.pop("rollout", {}),
    }
    facts: dict[str, Any] = {
        "name": "llm",
        "namespace": "default",
        "uid": "uid",
        "generation": 1,
        "deleting": False,
        "paused": False,
        "created": 0.0,
        "spec": LLMServiceSpec.model_validate(spec),
    }
    return Observed(
        service=Service(**{**facts, **service}),
        pods=pods,
        nodes={node.name: node for node in nodes},
        revision="new",
        gateway_ready=1,
        now=more.pop("now", NOW),
    )


def steps(observed: Observed) -> list[str]:
    """The plan in words: "create", "drain NAME", ..."""
    return [
        "create" if isinstance(action, Create) else f"{type(action).__name__.lower()} {action.pod.name}"
        for action in replicas.plan(observed)
    ]


CASES: dict[str, tuple[Observed, list[str]]] = {
    "a new service gets all its agents at once": (seen(replicas=3), ["create"] * 3),
    "what is as wanted is left alone": (seen(agent("a"), agent("b"), replicas=2), []),
    "scale-in takes the idlest": (
        seen(loaded("a", 5, 1), loaded("b", 1, 90), loaded("c", 7, 2), replicas=2),
        ["drain b"],
    ),
    "of equally idle ones scale-in takes the emptiest": (
        seen(loaded("a", 0, 5), loaded("b", 0, 3), loaded("c", 0, 9), replicas=2),
        ["drain b"],
    ),
    "of equally empty ones scale-in takes the one with the coldest cache": (
        seen(loaded("a", 0, 0, 50), loaded("b", 0, 0, 60), loaded("c", 0, 0, 10), replicas=2),
        ["drain c"],
    ),
    "of equal ones scale-in takes the youngest": (
        seen(agent("a", created=NOW - 9), agent("b", created=NOW - 3), replicas=1),
        ["drain b"],
    ),
    "scale-in takes one that does not serve before one that is idle": (
        seen(agent("a"), loaded("b", 9, 90, ready=False), pending("c"), replicas=1),
        ["delete c", "drain b"],
    ),
    "scale to zero drains all": (seen(agent("a"), agent("b"), replicas=0), ["drain a", "drain b"]),
    "an agent that was never started needs no drain": (seen(pending("a"), replicas=0), ["delete a"]),
    "a rollout begins with a new agent": (
        seen(agent("a", revision="old"), agent("b", revision="old"), replicas=2),
        ["create"],
    ),
    "a rollout with a surge of 2 begins with two": (
        seen(agent("a", revision="old"), agent("b", revision="old"), replicas=2, rollout={"maxSurge": 2}),
        ["create", "create"],
    ),
    "a rollout waits until the new agent is ready": (
        seen(agent("a", revision="old"), agent("b", ready=False, report=Report(agent_status("starting")))),
        [],
    ),
    "then it drains one old agent, the idlest": (
        seen(loaded("a", 3, 3, revision="old"), loaded("b", 1, 1, revision="old"), agent("c"), replicas=2),
        ["drain b"],
    ),
    "a rollout waits for a new agent that cannot be scheduled": (
        seen(agent("a", revision="old"), pending("b")),
        [],
    ),
    "without a spare GPU maxUnavailable lets an old agent go first": (
        seen(
            agent("a", revision="old"),
            agent("b", revision="old"),
            replicas=2,
            rollout={"maxSurge": 0, "maxUnavailable": 1},
        ),
        ["drain a"],
    ),
    "a newer revision replaces agents that never ran": (
        seen(pending("a", revision="old")),
        ["create", "delete a"],
    ),
    "old agents that serve stay when they fail a probe together": (
        seen(agent("a", revision="old", ready=False), agent("b", revision="old", ready=False), replicas=2),
        ["create"],
    ),
    "an agent on a cordoned node is replaced before it drains": (
        seen(agent("a"), nodes=(replace(NODE, unschedulable=True),)),
        ["create"],
    ),
    "and drains once the other one is ready": (
        seen(agent("a"), agent("b", node="other"), nodes=(replace(NODE, unschedulable=True), Node("other"))),
        ["drain a"],
    ),
    "an agent on a cordoned node goes before an old one": (
        seen(
            agent("a", revision="old"),
            agent("b", node="other"),
            agent("c"),
            replicas=2,
            nodes=(NODE, Node("other", unschedulable=True)),
        ),
        ["drain b"],
    ),
    "an agent that answers from a silent node is replaced, then drained": (
        seen(
            agent("a", ready=False),
            agent("b", node="other"),
            nodes=(Node("node", ready=False, since=NOW - 61), Node("other")),
        ),
        ["drain a"],
    ),
    "agents of a node that is gone are replaced at once": (
        seen(agent("a", ready=False, report=Report(None, "no route")), nodes=()),
        ["delete a", "create"],
    ),
    "a node that nobody has heard of yet is no node that is gone": (
        seen(pending("a", node="fresh", scheduled=NOW - 5, problem=""), nodes=()),
        [],
    ),
    "a terminating pod on a node that is gone is deleted by force": (
        seen(agent("a", deleting=True, report=None), agent("b", node="other"), nodes=(Node("other"),)),
        ["delete a"],
    ),
    "a node may be silent for a while": (
        seen(agent("a", ready=False, report=None), nodes=(Node("node", ready=False, since=NOW - 59),)),
        [],
    ),
    "a pod that somebody deleted is replaced at once": (seen(agent("a", deleting=True)), ["create"]),
    "an evicted pod is replaced at once": (
        seen(agent("a", phase="Failed", problem="Evicted", running=False, report=None)),
        ["delete a", "create"],
    ),
    "an agent that crashes is left to its kubelet": (
        seen(
            agent("a", ready=False, running=False, problem="CrashLoopBackOff", report=Report(None, "refused"))
        ),
        [],
    ),
    "an agent that somebody else drains is replaced, and its drain is ours": (
        seen(agent("a", ready=False, report=Report(agent_status("draining")))),
        ["drain a", "create"],
    ),
    "a drain is waited for": (seen(draining("a", NOW - 99), replicas=0), []),
    "a drained agent is released and deleted": (
        seen(draining("a", NOW - 9, report=Report(agent_status("drained"))), replicas=0),
        ["release a", "delete a"],
    ),
    "an operator that died between release and deletion deletes": (
        seen(draining("a", NOW - 9, undrained=False), replicas=0),
        ["delete a"],
    ),
    "an operator that died before it asked the agent asks": (
        seen(draining("a", NOW - 9, report=Report(agent_status("ready"))), replicas=0),
        ["drain a"],
    ),
    "an agent that cannot be reached gets its whole time": (
        seen(draining("a", NOW - 109, report=Report(None, "no route")), replicas=0),
        [],
    ),
    "a drain ends at its deadline": (
        seen(draining("a", NOW - 110, report=Report(None, "no route")), replicas=0),
        ["release a", "delete a"],
    ),
    "a drain ends when the agent's container does not run": (
        seen(draining("a", NOW - 1, running=False, report=Report(None, "refused")), replicas=0),
        ["release a", "delete a"],
    ),
    "a drain ends when the engine has failed": (
        seen(draining("a", NOW - 1, report=Report(agent_status("failed"))), replicas=0),
        ["release a", "delete a"],
    ),
    "deletion drains all, whether they serve or not": (
        seen(agent("a"), pending("b"), draining("c", NOW - 5), replicas=3, deleting=True),
        ["drain a", "delete b"],
    ),
    "a paused service is left alone": (
        seen(agent("a", revision="old"), draining("b", NOW - 999), replicas=5, paused=True),
        [],
    ),
    "a paused service is left alone even if it is deleted": (
        seen(agent("a"), paused=True, deleting=True),
        [],
    ),
    "a service whose spec cannot be read is left alone": (seen(agent("a", revision="old"), spec=None), []),
    "and drained all the same when it is deleted": (seen(agent("a"), spec=None, deleting=True), ["drain a"]),
}


@pytest.mark.parametrize("case", CASES)
def test_case(case: str) -> None:
    observed, wanted = CASES[case]
    assert steps(observed) == wanted


def failures(*ages: float) -> dict[str, Any]:
    return {
        "decisions": [
            {"time": stamp(NOW - age), "action": "Delete", "agent": "x", "reason": reasons.AGENT_FAILED}
            for age in ages
        ]
    }


@pytest.mark.parametrize(
    ("ages", "wait"),
    [((), 0), ((9,), 1), ((10,), 0), ((15, 40), 5), ((20, 40), 0), ((1,) * 9, 299), ((901,) * 9, 0)],
)
def test_failed_pods_are_replaced_after_a_growing_pause(ages: tuple[float, ...], wait: float) -> None:
    """10 s after the first failure, twice as long after each further one; 900 s are remembered."""
    failed = agent("a", phase="Failed", problem="UnexpectedAdmissionError", running=False, report=None)
    observed = seen(failed, status=failures(*ages))
    assert steps(observed) == ([] if wait else ["delete a", "create"])
    if wait:
        assert replicas.due(observed) == wait


def test_pods_that_wait_for_their_replacement_do_not_stop_the_rest() -> None:
    failed = agent("a", phase="Failed", running=False, report=None)
    assert steps(seen(failed, replicas=3, status=failures(1))) == ["create", "create"]


FULL = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
MISFIT = "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector."


OLD = agent("b", revision="old")


def squeezed(name: str, seconds: float, message: str = FULL) -> Pod:
    """A new pod for which the scheduler has found no node for so many seconds."""
    return pending(name, message=message, unschedulable_since=NOW - seconds)


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        (seen(agent("a", revision="old"), squeezed("b", 59)), []),
        (seen(agent("a", revision="old"), squeezed("b", 60)), ["drain a"]),
        (seen(agent("a", revision="old"), squeezed("b", 5), rollout={"patienceSeconds": 5}), ["drain a"]),
        (seen(agent("a", revision="old"), squeezed("b", 999), rollout={"whenFull": "Wait"}), []),
        (seen(agent("a", revision="old"), squeezed("b", 999, MISFIT)), []),
        # One at a time, the one with the least work first.
        (
            seen(loaded("a", 3, 9, revision="old"), replace(OLD, report=None), squeezed("c", 60), replicas=2),
            ["drain b"],
        ),
        # Its place is not free yet, or has just been taken: no other one goes.
        (seen(draining("a", NOW, revision="old"), OLD, squeezed("c", 99), replicas=2), ["create"]),
        (seen(agent("a", revision="old", deleting=True), OLD, squeezed("c", 99), replicas=2), ["create"]),
        (
            seen(
                OLD,
                agent("b2", ready=False, report=Report(agent_status("starting"))),
                squeezed("c", 99),
                replicas=2,
            ),
            [],
        ),
        # The new revision crashes where it got a place: nobody else goes.
        (
            seen(
                agent("a", revision="old"),
                agent("b", ready=False, report=None),
                squeezed("c", 99),
                replicas=2,
            ),
            [],
        ),
        # The old spec is wanted again: what waits goes, what serves stays.
        (seen(agent("a"), replace(squeezed("b", 99), revision="x")), ["delete b"]),
        # Not a rollout: an agent on a cordoned node stays until there is room.
        (seen(agent("a"), squeezed("b", 99), nodes=(Node("node", unschedulable=True),)), []),
    ],
)
def test_where_no_node_has_room_an_old_agent_gives_its_place(observed: Observed, expected: list[str]) -> None:
    assert steps(observed) == expected


def test_an_agent_that_gives_its_place_is_told_why_and_the_end_of_the_patience_is_waited_for() -> None:
    (action,) = replicas.plan(seen(agent("a", revision="old"), squeezed("b", 60)))
    assert isinstance(action, Drain) and action.reason == reasons.ROLLOUT
    assert "no node has room for one more agent, so this one gives its place" in action.message
    assert replicas.due(seen(agent("a", revision="old"), squeezed("b", 45))) == 15


def test_a_drain_says_how_long_it_may_take_and_why() -> None:
    (action,) = replicas.plan(seen(loaded("a", 2, 12), loaded("b", 3, 1)))
    assert isinstance(action, Drain)
    assert (action.timeout_s, action.reason) == (100, reasons.SCALE_IN)
    assert "agents wanted: 1, there: 2" in action.message
    assert "2 requests, 12 of 100 blocks" in action.message


def test_a_drain_that_is_asked_for_again_keeps_its_deadline() -> None:
    (action,) = replicas.plan(seen(draining("a", NOW - 30, report=Report(agent_status("ready"))), replicas=0))
    assert isinstance(action, Drain)
    assert (action.timeout_s, action.reason) == (70, reasons.SCALE_IN)


def test_only_pods_on_lost_nodes_are_deleted_by_force() -> None:
    gone = agent("a", ready=False, report=None, node="gone")
    drained = draining("b", NOW - 1, report=Report(agent_status("drained")))
    deletions = [a for a in replicas.plan(seen(gone, drained, replicas=0)) if isinstance(a, Delete)]
    assert [(action.pod.name, action.force) for action in deletions] == [("a", True), ("b", False)]


def test_a_release_comes_before_its_deletion() -> None:
    actions = replicas.plan(seen(draining("b", NOW - 1, report=Report(agent_status("drained"))), replicas=0))
    assert [type(action) for action in actions] == [Release, Delete]


def test_names_are_the_same_until_they_are_taken() -> None:
    """A plan from an old view makes no second pod: it comes to the same names."""
    first = [a.name for a in replicas.plan(seen(replicas=3)) if isinstance(a, Create)]
    assert first == [a.name for a in replicas.plan(seen(replicas=3)) if isinstance(a, Create)]
    assert len(set(first)) == 3
    rest = [a.name for a in replicas.plan(seen(agent(first[1]), replicas=3)) if isinstance(a, Create)]
    assert rest == [first[0], first[2]]
    assert all(len(name) == len("llm-") + 5 for name in first)


def test_names_differ_between_lives_of_a_service_and_between_revisions() -> None:
    observed = seen(replicas=1)
    again = replace(observed, service=replace(observed.service, uid="another"))
    newer = replace(observed, revision="newer")
    names = [a.name for o in (observed, again, newer) for a in replicas.plan(o) if isinstance(a, Create)]
    assert len(set(names)) == 3


@pytest.mark.parametrize(
    ("observed", "wanted"),
    [
        (seen(agent("a")), None),
        (seen(draining("a", NOW - 30), replicas=0), 100 - 30 + replicas.REPORT_SECONDS),
        (seen(agent("a", report=None), nodes=(Node("node", ready=False, since=NOW - 20),)), 40),
        (seen(pending("a", node="fresh", scheduled=NOW - 5), nodes=()), 10),
    ],
)
def test_time_that_changes_something_is_known(observed: Observed, wanted: float | None) -> None:
    assert replicas.due(observed) == wanted
    if wanted is not None:
        later = replace(observed, now=NOW + wanted)
        assert replicas.plan(later) != replicas.plan(replace(observed, now=NOW + wanted - 0.1))


def test_a_thousand_agents_are_planned_in_no_time_to_speak_of() -> None:
    """Counted in calls, not in seconds: the work grows with the agents, not with their square."""

    def calls(count: int) -> int:
        pods = [loaded(f"a{number}", number, number % 90, revision="old") for number in range(count)]
        observed, total = seen(*pods, replicas=count), 0

        def count_one(*_: Any) -> None:
            nonlocal total
            total += 1

        sys.setprofile(count_one)
        try:
            replicas.plan(observed)
        finally:
            sys.setprofile(None)
        return total

    assert calls(1000) < 15 * calls(100)
