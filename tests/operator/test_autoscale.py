"""How many agents a load asks for, and when their number changes: case by case, and what always holds."""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import ceil
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from blockyard.operator import autoscale, reasons, status
from blockyard.operator.api import LLMServiceSpec
from blockyard.operator.autoscale import Scale
from blockyard.operator.observed import Observed, Pod, Report, stamp
from blockyard.operator.replicas import Create
from blockyard.operator.view import overview

from .simulated import BLOCKS, agent_status
from .test_replicas import NOW, agent, draining, pending, seen

SLOTS = 10
BUSY = (4, 90, 6)  # running, active, waiting: 225 blocks in all


def report(running: int = 0, active: int = 0, waiting: int = 0, cached: int = 0) -> Report:
    found = agent_status("ready", running=running, active=active, cached=cached)
    return Report(found.model_copy(update={"waiting": waiting, "max_num_seqs": SLOTS}))


def serving(name: str, *load: int, **more: Any) -> Pod:
    return agent(name, report=report(*load), **more)


def asked(*pods: Pod, replicas: int = 1, remembered: dict[str, Any] | None = None, **more: Any) -> Observed:
    """What is there, of a service of 1 to 8 agents that are to be used at 50 %, unless ``more`` says else."""
    service = {key: more.pop(key) for key in ("deleting", "paused", "now") if key in more}
    scaling = {"maxReplicas": 8, "targetUsedPercent": 50, "scaleInDelaySeconds": 100, **more}
    spec = {"model": {"hub": {"name": "m"}}, "replicas": replicas, "autoscaling": scaling}
    found = {} if remembered is None else {"autoscaling": remembered}
    return seen(*pods, spec=LLMServiceSpec.model_validate(spec), status=found, **service)


def remembered(wanted: int, since: float) -> dict[str, Any]:
    return {"wanted": wanted, "reason": reasons.KV_LOAD, "since": stamp(since)}


# load -> (what is there, agents wanted, reason)
CASES: dict[str, tuple[Observed, int, str]] = {
    "nothing to do": (asked(serving("a")), 1, reasons.MIN_REPLICAS),
    "nothing to do, but two at least": (asked(serving("a"), minReplicas=2), 2, reasons.MIN_REPLICAS),
    "as much as is right": (asked(serving("a", 5, 50)), 1, reasons.KV_LOAD),
    "one block more": (asked(serving("a", 5, 51)), 2, reasons.KV_LOAD),
    "one request more": (asked(serving("a", 6, 12)), 2, reasons.REQUEST_LOAD),
    "few requests with long contexts": (asked(serving("a", 2, 80)), 2, reasons.KV_LOAD),
    "those that wait are as large as those that run": (asked(serving("a", *BUSY)), 5, reasons.KV_LOAD),
    "many short ones that wait": (asked(serving("a", 10, 10, 15)), 5, reasons.REQUEST_LOAD),
    "they wait and none runs": (asked(serving("a", 0, 0, 6)), 2, reasons.REQUEST_LOAD),
    "more than there may be": (asked(serving("a", *BUSY), maxReplicas=3), 3, reasons.MAX_REPLICAS),
    "cached blocks are no load": (asked(serving("a", 1, 10, 0, 90)), 1, reasons.KV_LOAD),
    "one is full and one is idle": (
        asked(serving("a", 5, 100), serving("b"), replicas=2),
        2,
        reasons.KV_LOAD,
    ),
    "those that start have been asked for already": (
        asked(serving("a", *BUSY), *(pending(name) for name in "bcde"), replicas=5),
        5,
        reasons.KV_LOAD,
    ),
    "those that drain carry nothing": (
        asked(serving("a", 5, 50), draining("b", NOW, report=report(9, 90, 90))),
        1,
        reasons.KV_LOAD,
    ),
    "one has not reported": (
        asked(serving("a"), agent("b", report=None), replicas=2),
        2,
        reasons.NO_REPORTS,
    ),
    "one cannot be reached, and the others ask for more all the same": (
        asked(serving("a", *BUSY), agent("b", report=Report(None, "no route")), replicas=2),
        5,
        reasons.KV_LOAD,
    ),
    "none is there": (asked(replicas=3), 3, reasons.NO_REPORTS),
    "one serves, whatever its pod says at the moment": (
        asked(serving("a"), serving("b", *BUSY, ready=False), replicas=2),
        5,
        reasons.KV_LOAD,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_load_asks_for(case: str) -> None:
    observed, wanted, reason = CASES[case]
    found, scale, spec = autoscale.state(observed), autoscale.plan(observed), observed.service.spec
    assert found is not None and (found.wanted, found.reason, found.since) == (wanted, reason, None)
    assert spec is not None and wanted == (spec.replicas if scale is None else scale.replicas)


def test_a_scaling_says_what_led_to_it() -> None:
    scale = autoscale.plan(asked(serving("a", *BUSY)))
    assert scale == Scale(
        5,
        reasons.KV_LOAD,
        "replicas from 1 to 5: blocks ask for 5 (90 of 100 are active), slots for 2 (10 requests on "
        "10, 6 of them waiting); agents that serve: 1, target: 50 %, between 1 and 8",
    )


@pytest.mark.parametrize(("replicas", "right", "reason"), [(9, 8, "MaxReplicas"), (1, 2, "MinReplicas")])
def test_bounds_hold_at_once_and_without_reports(replicas: int, right: int, reason: str) -> None:
    for pods in ((), (serving("a"),)):
        scale = autoscale.plan(asked(*pods, replicas=replicas, minReplicas=2))
        assert scale is not None and (scale.replicas, scale.reason) == (right, reason)


PAUSED = asked(serving("a", *BUSY), paused=True)
NOT_SCALED = {
    "paused": PAUSED,
    "deleted": asked(serving("a", *BUSY), deleting=True),
    "scaled to zero by a person": asked(draining("a", NOW), replicas=0),
    "a spec that cannot be read": replace(PAUSED, service=replace(PAUSED.service, spec=None, paused=False)),
    "no autoscaling": seen(serving("a", *BUSY)),
}


@pytest.mark.parametrize("case", NOT_SCALED)
def test_what_is_not_scaled(case: str) -> None:
    observed = NOT_SCALED[case]
    assert (autoscale.plan(observed), autoscale.state(observed), autoscale.due(observed)) == (
        None,
        None,
        None,
    )
    assert "autoscaling" not in status.compute(observed, [], {})


# ── Scaling in ────────────────────────────────────────────────────────────────────────────────────────────

IDLE = [serving(name) for name in "abc"]


def test_fewer_are_first_remembered_and_then_asked_for() -> None:
    first = asked(*IDLE, replicas=3)
    assert autoscale.plan(first) is None and autoscale.due(first) == 100
    found = autoscale.state(first)
    assert found is not None and (found.wanted, found.since) == (1, stamp(NOW))
    late = asked(*IDLE, replicas=3, remembered=remembered(1, NOW - 99))
    assert autoscale.plan(late) is None and autoscale.due(late) == 1
    over = asked(*IDLE, replicas=3, remembered=remembered(1, NOW - 100))
    scale = autoscale.plan(over)
    assert scale is not None and scale.replicas == 1 and scale.message.startswith("replicas from 3 to 1")
    assert autoscale.due(over) == 0


def test_as_many_stay_as_were_wanted_at_most_meanwhile() -> None:
    busier = [serving("a", 5, 100), *IDLE[1:]]
    found = autoscale.state(asked(*busier, replicas=3, remembered=remembered(1, NOW - 50)))
    assert found is not None and (found.wanted, found.since) == (2, stamp(NOW - 50))
    scale = autoscale.plan(asked(*IDLE, replicas=3, remembered=remembered(2, NOW - 100)))
    assert scale is not None and (scale.replicas, scale.reason) == (2, reasons.KV_LOAD)
    # And then the next delay begins.
    found = autoscale.state(asked(*IDLE[1:], replicas=2, remembered=remembered(2, NOW - 100)))
    assert found is not None and (found.wanted, found.since) == (1, stamp(NOW))


@pytest.mark.parametrize(
    "interruption",
    {
        "load": [serving("a", 5, 100), serving("b", 2, 50), IDLE[2]],
        "a report that is missing": [agent("a", report=None), *IDLE[1:]],
    }.values(),
)
def test_an_interruption_is_remembered_at_once(interruption: list[Pod]) -> None:
    before = status.compute(asked(*IDLE, replicas=3, remembered=remembered(1, NOW - 99)), [], {})
    after = status.compute(asked(*interruption, replicas=3, remembered=before["autoscaling"]), [], before)
    assert "since" in before["autoscaling"] and "since" not in after["autoscaling"]
    assert status.urgent(after, before)
    # That fewer are enough again may be told with the load: it only makes the delay longer.
    again = status.compute(asked(*IDLE, replicas=3, remembered=after["autoscaling"]), [], after)
    assert again["autoscaling"]["since"] == stamp(NOW)
    assert not status.urgent({**after, "autoscaling": again["autoscaling"]}, after)


def test_without_a_delay_agents_go_at_once() -> None:
    scale = autoscale.plan(asked(*IDLE, replicas=3, scaleInDelaySeconds=0))
    assert scale is not None and scale.replicas == 1


# ── What a person sees ────────────────────────────────────────────────────────────────────────────────────


def test_each_scaling_is_a_decision_of_its_own() -> None:
    observed = asked(serving("a"))
    out = Scale(2, reasons.KV_LOAD, "replicas from 1 to 2")
    first = status.compute(observed, [out], {})
    second = status.compute(observed, [replace(out, replicas=3, message="from 2 to 3"), out], first)
    assert [(each["action"], each["agent"]) for each in second["decisions"]] == [("Scale", "")] * 3
    third = status.compute(observed, [Create("b", "ScaleOut", "")], second)
    assert [each["agent"] for each in third["decisions"]] == ["b", "", "", ""]


def test_the_view_shows_what_is_wanted_and_since_when() -> None:
    observed = asked(*IDLE, replicas=3, remembered=remembered(2, NOW - 50))
    found = status.compute(observed, [Scale(2, reasons.KV_LOAD, "replicas from 3 to 2")], {})
    spec = {"replicas": 3, "autoscaling": {"minReplicas": 1, "maxReplicas": 8}}
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(overview([{"metadata": {"name": "llm"}, "spec": spec, "status": found}]))
    text = console.export_text()
    assert f"1 to 8 agents, 2 wanted: KVLoad; so few are enough since {stamp(NOW - 50)[11:19]}" in text
    assert "Scale: KVLoad, replicas from 3 to 2" in text


# ── What always holds ─────────────────────────────────────────────────────────────────────────────────────

on_any_machine = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
loads = st.tuples(st.integers(0, SLOTS), st.integers(0, BLOCKS), st.integers(0, 50))
fleets = st.lists(st.none() | loads, max_size=5)
scalings = st.tuples(st.integers(1, 6), st.integers(0, 6), st.integers(1, 100)).map(
    lambda drawn: {"minReplicas": drawn[0], "maxReplicas": drawn[0] + drawn[1], "targetUsedPercent": drawn[2]}
)


def pods_of(fleet: list[tuple[int, int, int] | None]) -> list[Pod]:
    return [
        agent(f"a{number}", report=None if load is None else report(*load))
        for number, load in enumerate(fleet)
    ]


@on_any_machine
@given(fleets, scalings, st.integers(1, 12), st.integers(0, 12), st.integers(0, 200))
def test_the_number_is_always_within_its_bounds(
    fleet: list[Any], scaling: dict[str, int], replicas: int, before: int, ago: int
) -> None:
    past = remembered(before, NOW - ago)
    scale = autoscale.plan(asked(*pods_of(fleet), replicas=replicas, remembered=past, **scaling))
    number = replicas if scale is None else scale.replicas
    assert scaling["minReplicas"] <= number <= scaling["maxReplicas"]
    if any(load is None for load in fleet):
        assert number >= min(replicas, scaling["maxReplicas"]), "nothing goes while something is not known"


@on_any_machine
@given(st.lists(loads, min_size=1, max_size=4), st.data(), scalings)
def test_more_load_never_asks_for_fewer(
    fleet: list[Any], data: st.DataObject, scaling: dict[str, int]
) -> None:
    """More active blocks, more waiting requests, or more running ones that are no smaller than the others."""
    at = data.draw(st.integers(0, len(fleet) - 1))
    running, active, waiting = fleet[at]
    mean = ceil(sum(load[1] for load in fleet) / max(1, sum(load[0] for load in fleet)))
    more = data.draw(
        st.sampled_from([(0, 1, 0), (0, 0, 1), (0, 5, 5), (1, mean, 0)] if any(fleet[at]) else [(0, 1, 0)])
    )
    busier = [*fleet]
    busier[at] = (running + more[0], active + more[1], waiting + more[2])
    if more[0] and not sum(load[0] for load in fleet):
        return  # with the first one that runs the size of those that wait becomes known

    def wanted(loads: list[Any]) -> int:
        found = autoscale.state(asked(*pods_of(loads), scaleInDelaySeconds=0, **scaling))
        assert found is not None
        return found.wanted

    assert wanted(busier) >= wanted(fleet)


@dataclass
class World:
    """Equal requests on agents that take their time to start, and an operator that knows the status alone."""

    scaling: dict[str, int]
    replicas: int
    ready: int
    now: float = NOW
    status: dict[str, Any] = field(default_factory=dict)
    changes: list[int] = field(default_factory=list)

    def observed(self, requests: int, size: int) -> Observed:
        """``requests`` of ``size`` blocks each: what finds no place waits at the first agent."""
        room = min(SLOTS, BLOCKS // size)
        pods, left = [], requests
        for _ in range(self.ready):
            running = min(room, left)
            left -= running
            pods.append((running, running * size, 0))
        if pods:
            pods[0] = (*pods[0][:2], left)
        found = asked(*pods_of(list(pods)), replicas=self.replicas, now=self.now, **self.scaling)
        return replace(found, service=replace(found.service, status=self.status))

    def round(self, requests: int, size: int, *, told: bool = True, killed: bool = False) -> None:
        """One round. Not ``told``: the status is written if that is urgent. ``killed``: right before that."""
        observed = self.observed(requests, size)
        if (scale := autoscale.plan(observed)) is not None:
            self.replicas = scale.replicas
            self.changes.append(scale.replicas)
        state = autoscale.state(observed)
        assert state is not None
        after = {"autoscaling": state.model_dump(mode="json", by_alias=True, exclude_none=True)}
        if not killed and (told or status.urgent(after, self.status)):
            self.status = after

    def wanted(self, requests: int, size: int) -> int:
        share = self.scaling["targetUsedPercent"] / 100
        load = max(requests * size / BLOCKS, requests / SLOTS) / share
        number = ceil(round(load, 9))
        return min(self.scaling["maxReplicas"], max(self.scaling["minReplicas"], number))


sizes = st.integers(1, BLOCKS)


@on_any_machine
@given(st.data(), scalings, st.integers(0, 60), sizes)
def test_a_constant_load_changes_the_number_once_at_most(
    data: st.DataObject, scaling: dict[str, int], requests: int, size: int
) -> None:
    begin = data.draw(st.integers(scaling["minReplicas"], scaling["maxReplicas"]))
    world = World(scaling, begin, ready=begin)
    for _ in range(30):
        world.now += data.draw(st.integers(1, 30))
        world.round(requests, size, told=data.draw(st.booleans()), killed=data.draw(st.booleans()))
        world.ready = data.draw(st.integers(min(world.ready, world.replicas), world.replicas))
    for _ in range(2):  # undisturbed at last
        world.round(requests, size)
        world.now += 101
    world.round(requests, size)
    assert world.replicas == world.wanted(requests, size), "whatever was killed on the way"
    assert len(world.changes) <= 1, world.changes


@on_any_machine
@given(st.data(), scalings, sizes)
def test_nothing_goes_that_was_wanted_within_the_delay(
    data: st.DataObject, scaling: dict[str, int], size: int
) -> None:
    """Under any load and any kills; and what a round has seen to be wanted is there after it."""
    begin = scaling["maxReplicas"]
    world = World(scaling, begin, ready=begin)
    rounds: list[tuple[float, int, int]] = []
    for _ in range(40):
        world.now += data.draw(st.integers(1, 60))
        requests = data.draw(st.integers(0, 40))
        world.round(requests, size, told=data.draw(st.booleans()))
        world.ready = world.replicas
        rounds.append((world.now, world.wanted(requests, size), world.replicas))
        assert world.replicas >= rounds[-1][1]
    for (_, _, before), (time, _, number) in pairwise(rounds):
        if number < before:
            recent = [wanted for then, wanted, _ in rounds if time - 100 <= then <= time]
            assert number >= max(recent), "it was wanted a moment ago"
