"""What a person and a script are told of a service."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from blockyard.operator import reasons, status
from blockyard.operator.api import LLMServiceSpec
from blockyard.operator.observed import Node, Observed, Pod, Report, stamp
from blockyard.operator.refusals import Refusal
from blockyard.operator.replicas import Create, Delete, Drain, Release

from .simulated import agent_status
from .test_replicas import FULL, MISFIT, NOW, agent, draining, loaded, pending, seen

SCHEDULER = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."


def conditions(observed: Observed, previous: dict[str, Any] | None = None) -> dict[str, tuple[str, str, str]]:
    found = status.compute(observed, [], previous or {})["conditions"]
    return {each["type"]: (each["status"], each["reason"], each["message"]) for each in found}


def crashing(name: str) -> Pod:
    words = "back-off 10s; container agent Error with exit code 2; no such model"
    return agent(
        name, ready=False, running=False, problem="CrashLoopBackOff", message=words, restarts=3, report=None
    )


UNSCHEDULABLE = pending("a", message=SCHEDULER)
QUOTA = Refusal(reasons.QUOTA_EXCEEDED, "pod a cannot be created: it exceeds ResourceQuota team")
GATEWAY_DOWN = replace(seen(agent("a")), gateway_ready=0)
NO_GATEWAY = LLMServiceSpec.model_validate({"model": {"hub": {"name": "m"}}, "gateway": {"replicas": 0}})

# case -> (what is there, condition, status, reason, words)
CASES: dict[str, tuple[Observed, str, str, str, str]] = {
    "all is well": (seen(agent("a")), "Ready", "True", reasons.ALL_READY, "1 of 1"),
    "no agent yet": (seen(), "Ready", "False", reasons.AGENTS_NOT_READY, "0 of 1"),
    "no room for an agent": (seen(UNSCHEDULABLE), "Ready", "False", "Unschedulable", SCHEDULER),
    "an agent that crashes": (seen(crashing("a")), "Ready", "False", "CrashLoopBackOff", "no such model"),
    "the gateway is down": (GATEWAY_DOWN, "Ready", "False", reasons.GATEWAY_NOT_READY, "llm-gateway"),
    "no gateway is wanted": (
        replace(GATEWAY_DOWN, service=replace(GATEWAY_DOWN.service, spec=NO_GATEWAY)),
        "Ready",
        "True",
        reasons.ALL_READY,
        "",
    ),
    "none is wanted": (seen(replicas=0), "Ready", "True", reasons.SCALED_TO_ZERO, ""),
    "the spec cannot be read": (
        replace(seen(), service=replace(seen().service, spec=None, problem="spec.kv: wrong")),
        "Ready",
        "False",
        reasons.INVALID_SPEC,
        "spec.kv: wrong",
    ),
    "it is deleted": (seen(agent("a"), deleting=True), "Ready", "False", reasons.DELETING, ""),
    "the API server refuses a pod": (
        replace(seen(), refused=QUOTA),
        "Ready",
        "False",
        reasons.QUOTA_EXCEEDED,
        "0 of 1 agents are ready; pod a cannot be created",
    ),
    "the API server refuses a pod while enough are ready": (
        replace(seen(agent("a")), refused=QUOTA),
        "Ready",
        "True",
        reasons.ALL_READY,
        "",
    ),
    "then a person should look": (
        replace(seen(agent("a")), refused=QUOTA),
        "Degraded",
        "True",
        reasons.QUOTA_EXCEEDED,
        "pod a cannot be created",
    ),
    "the API server refuses the gateway's pods": (
        replace(GATEWAY_DOWN, gateway_refused=QUOTA),
        "Ready",
        "False",
        reasons.QUOTA_EXCEEDED,
        "no pod of Deployment llm-gateway is; pod a cannot be created",
    ),
    "the API server refuses a gateway's new pods, and old ones serve": (
        replace(seen(agent("a")), gateway_refused=QUOTA),
        "Degraded",
        "True",
        reasons.QUOTA_EXCEEDED,
        "pod a cannot be created",
    ),
    "one may be missing": (
        seen(agent("a"), replicas=2, rollout={"maxUnavailable": 1}),
        "Ready",
        "True",
        reasons.ALL_READY,
        "1 of 2",
    ),
    "an old agent serves on while a new one starts": (
        seen(agent("a", revision="old"), pending("b", message=SCHEDULER)),
        "Ready",
        "True",
        reasons.ALL_READY,
        "",
    ),
    "nothing moves": (seen(agent("a")), "Progressing", "False", reasons.STABLE, ""),
    "paused": (
        seen(agent("a", revision="old"), paused=True),
        "Progressing",
        "False",
        reasons.PAUSED,
        "paused",
    ),
    "deleting": (seen(agent("a"), deleting=True), "Progressing", "True", reasons.DELETING, "agents left: 1"),
    "rolling out": (
        seen(agent("a", revision="old"), pending("b", message=SCHEDULER)),
        "Progressing",
        "True",
        reasons.ROLLING_OUT,
        SCHEDULER,
    ),
    "rolling out where there is no room": (
        seen(agent("a", revision="old"), pending("b", message=FULL, unschedulable_since=NOW)),
        "Progressing",
        "True",
        reasons.ROLLING_OUT,
        "0 of 1 agents run revision new; no node has room for one more agent, so old ones are drained",
    ),
    "rolling out where there is no room, and one gives its place": (
        seen(draining("a", NOW, revision="old"), pending("b", message=FULL, unschedulable_since=NOW)),
        "Progressing",
        "True",
        reasons.ROLLING_OUT,
        "so this one gives its place: a",
    ),
    "rolling out where there is no room, and waiting for it": (
        seen(
            agent("a", revision="old"),
            pending("b", message=FULL, unschedulable_since=NOW),
            rollout={"whenFull": "Wait"},
        ),
        "Progressing",
        "True",
        reasons.ROLLING_OUT,
        "free a GPU, or set rollout.whenFull to Drain or rollout.maxUnavailable to 1",
    ),
    "rolling out what fits no node": (
        seen(agent("a", revision="old"), pending("b", message=MISFIT, unschedulable_since=NOW)),
        "Progressing",
        "True",
        reasons.ROLLING_OUT,
        "look at spec.template",
    ),
    "off a node": (
        seen(agent("a"), nodes=(Node("node", unschedulable=True),)),
        "Progressing",
        "True",
        reasons.REPLACING,
        "node node is cordoned",
    ),
    "scaling": (
        seen(agent("a"), replicas=3),
        "Progressing",
        "True",
        reasons.SCALING,
        "wanted: 3, running: 1",
    ),
    "draining": (seen(agent("a"), draining("b", NOW)), "Progressing", "True", reasons.DRAINING, "b"),
    "healthy": (seen(agent("a")), "Degraded", "False", reasons.HEALTHY, ""),
    "starting is no problem": (
        seen(agent("a", ready=False, report=Report(agent_status("starting")))),
        "Degraded",
        "False",
        reasons.HEALTHY,
        "",
    ),
    "draining is no problem": (
        seen(agent("a"), draining("b", NOW, problem="X")),
        "Degraded",
        "False",
        reasons.HEALTHY,
        "",
    ),
    "a lost node": (
        seen(agent("a", report=None), nodes=()),
        "Degraded",
        "True",
        reasons.NODE_LOST,
        "is gone",
    ),
    "an evicted pod": (
        seen(agent("a", phase="Failed", problem="Evicted", message="low on memory")),
        "Degraded",
        "True",
        reasons.AGENT_FAILED,
        "Evicted: low on memory",
    ),
    "a failed engine": (
        seen(agent("a", ready=False, report=Report(agent_status("failed")))),
        "Degraded",
        "True",
        reasons.AGENT_FAILED,
        "engine",
    ),
    "many of one kind": (
        seen(*(pending(name, message=SCHEDULER) for name in "abc"), replicas=3),
        "Degraded",
        "True",
        "Unschedulable",
        "agent a and 2 more",
    ),
    "in balance": (
        seen(loaded("a", 1, 90), loaded("b", 1, 60), replicas=2),
        "Balanced",
        "True",
        reasons.IN_BALANCE,
        "",
    ),
    "out of balance": (
        seen(loaded("a", 1, 90), loaded("b", 1, 10), replicas=2),
        "Balanced",
        "False",
        reasons.OUT_OF_BALANCE,
        "a uses 90 % of its blocks (above 85 %) while b uses 10 % (below 50 %)",
    ),
    "nobody has spoken": (seen(agent("a", report=None)), "Balanced", "Unknown", reasons.NO_REPORTS, ""),
}


@pytest.mark.parametrize("case", CASES)
def test_condition(case: str) -> None:
    observed, kind, truth, reason, words = CASES[case]
    found = conditions(observed)
    assert found.keys() == {"Ready", "Progressing", "Degraded", "Balanced"}
    assert found[kind][:2] == (truth, reason)
    assert words in found[kind][2]


def test_a_transition_has_its_time_and_all_else_leaves_it() -> None:
    first = status.compute(seen(), [], {})
    later = status.compute(replace(seen(UNSCHEDULABLE), now=NOW + 60), [], first)
    ready = status.compute(replace(seen(agent("a")), now=NOW + 120), [], later)
    times = [found["conditions"][0]["lastTransitionTime"] for found in (first, later, ready)]
    assert times == [stamp(NOW), stamp(NOW), stamp(NOW + 120)]


def test_every_condition_says_which_generation_it_is_about() -> None:
    observed = seen(agent("a"))
    observed = replace(observed, service=replace(observed.service, generation=7))
    found = status.compute(observed, [], status.compute(seen(agent("a")), [], {}))
    assert found["observedGeneration"] == 7
    assert {each["observedGeneration"] for each in found["conditions"]} == {7}


def test_numbers_are_those_of_the_agents() -> None:
    observed = seen(
        loaded("a", 2, 50, 10),
        loaded("b", 1, 10, 20, revision="old"),
        draining("c", NOW),
        pending("d"),
        agent("e", deleting=True, report=Report(agent_status("drained"))),
        replicas=3,
    )
    found = status.compute(observed, [], {})
    assert (found["replicas"], found["readyReplicas"], found["updatedReplicas"]) == (3, 2, 2)
    assert found["running"] == 3
    device = found["pool"]["device"]
    assert (device["total"], device["active"], device["cached"]) == (300, 60, 30)
    assert device["free"] + device["cached"] + device["active"] == device["total"]
    assert (device["size"], found["usedPercent"]) == ("300Mi", 20)
    assert found["selector"] == "serving.blockyard.dev/service=llm,app.kubernetes.io/component=agent"
    assert found["url"] == "http://llm.default.svc"
    lines = {line["name"]: line for line in found["agents"]}
    assert [lines[name]["state"] for name in "abcde"] == [
        "Ready", "Ready", "Draining", "Pending", "Terminating",
    ]  # fmt: skip
    assert (lines["a"]["usedPercent"], lines["a"]["cachedPercent"], lines["a"]["running"]) == (50, 10, 2)
    assert "Unschedulable" in lines["d"]["message"]
    assert lines["c"]["message"] == "leaves: ScaleIn"


@pytest.mark.parametrize(
    ("pod", "state"),
    [
        (agent("a"), "Ready"),
        (pending("a"), "Pending"),
        (agent("a", ready=False, report=None), "Starting"),
        (agent("a", ready=False), "Unknown"),
        (agent("a", phase="Failed"), "Failed"),
        (agent("a", report=Report(agent_status("failed"))), "Failed"),
        (draining("a", NOW, report=Report(None, "no route")), "Draining"),
        (draining("a", NOW, report=Report(agent_status("drained"))), "Drained"),
        (agent("a", deleting=True), "Terminating"),
        (agent("a", report=None, node="gone"), "Unknown"),
    ],
)
def test_the_state_of_an_agent_is_one_word(pod: Pod, state: str) -> None:
    (line,) = status.compute(seen(pod), [], {})["agents"]
    assert line["state"] == state


def test_of_many_agents_those_with_something_to_say_are_shown() -> None:
    pods = [agent(f"a{number:03}") for number in range(100)]
    pods[97] = crashing("a097")
    pods[98] = loaded("a098", 1, 99)
    found = status.compute(seen(*pods, replicas=100), [], {})
    names = [line["name"] for line in found["agents"]]
    assert len(names) == status.MOST_AGENTS
    assert {"a097", "a098"} <= set(names)
    assert names == sorted(names)
    assert found["replicas"] == 100, "all are counted"


def test_a_spec_that_cannot_be_read_leaves_what_was_known() -> None:
    before = status.compute(seen(agent("a")), [], {})
    broken = seen(agent("a"))
    broken = replace(broken, service=replace(broken.service, spec=None, problem="spec: no"), revision="")
    found = status.compute(broken, [], before)
    assert (found["revision"], found["url"]) == (before["revision"], before["url"])
    assert found["readyReplicas"] == 1


@pytest.mark.parametrize(
    ("restarts", "words"), [(0, ""), (1, "was restarted once"), (2, "was restarted 2 times")]
)
def test_restarts_are_told_in_words(restarts: int, words: str) -> None:
    (line,) = status.compute(seen(agent("a", restarts=restarts)), [], {})["agents"]
    assert line["message"] == words


# ── Decisions ─────────────────────────────────────────────────────────────────────────────────────────────


def test_decisions_are_the_newest_first_and_bounded() -> None:
    pod = agent("a")
    found: dict[str, Any] = {}
    for number in range(20):
        action = Create(f"n{number}", reasons.SCALE_OUT, "more")
        found = status.compute(replace(seen(pod), now=NOW + number), [action], found)
    assert [each["agent"] for each in found["decisions"]] == [f"n{number}" for number in range(19, 3, -1)]
    newest = found["decisions"][0]
    assert newest == {
        "time": stamp(NOW + 19), "action": "Create", "agent": "n19", "reason": "ScaleOut", "message": "more",
    }  # fmt: skip


def test_a_step_that_is_only_tried_again_is_no_new_decision() -> None:
    pod = agent("a")
    drain = Drain(pod, reasons.SCALE_IN, "too many", 100)
    first = status.compute(seen(pod), [drain], {})
    again = status.compute(seen(pod), [replace(drain, message="again", timeout_s=50)], first)
    assert again["decisions"] == first["decisions"]
    gone = status.compute(seen(pod), [Release(pod), Delete(pod, reasons.SCALE_IN, "drained")], again)
    assert [each["action"] for each in gone["decisions"]] == ["Delete", "Drain"]
    back = status.compute(seen(pod), [Create("a", reasons.SCALE_OUT, "more")], gone)
    assert [each["action"] for each in back["decisions"]] == ["Create", "Delete", "Drain"]


def test_long_words_of_the_cluster_are_cut() -> None:
    found = status.compute(seen(pending("a", message="x" * 5000)), [], {})
    assert all(len(each["message"]) <= status.LONGEST_MESSAGE for each in found["conditions"])
    assert len(found["agents"][0]["message"]) == status.LONGEST_MESSAGE


# ── Writing ───────────────────────────────────────────────────────────────────────────────────────────────


def test_time_alone_changes_no_status() -> None:
    observed = seen(loaded("a", 3, 5), pending("b"), draining("c", NOW), replicas=2)
    first = status.compute(observed, [], {})
    assert status.compute(replace(observed, now=NOW + 30), [], first) == first


@pytest.mark.parametrize(
    ("before", "after", "urgent"),
    [
        (seen(loaded("a", 1, 1)), seen(loaded("a", 90, 90, 5)), False),
        (seen(loaded("a", 1, 90), loaded("b", 1, 90), replicas=2),
         seen(loaded("a", 1, 90), loaded("b", 1, 1), replicas=2), False),
        (seen(agent("a")), seen(agent("a", ready=False)), True),
        (seen(agent("a")), seen(agent("a"), pending("b")), True),
        (seen(agent("a", report=None)), seen(agent("a")), True),
        (seen(UNSCHEDULABLE), seen(replace(UNSCHEDULABLE, message="0/4 nodes are available")), True),
    ],
    ids=["load", "balance", "readiness", "another agent", "a pool is known", "the scheduler's words"],
)  # fmt: skip
def test_only_load_may_wait(before: Observed, after: Observed, urgent: bool) -> None:
    old = status.compute(before, [], {})
    new = status.compute(after, [], old)
    assert new != old
    assert status.urgent(new, old) is urgent
