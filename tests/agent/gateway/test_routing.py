"""Where requests go, as properties: of the choice, and of the sketches that it compares."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from blockyard.agent.gateway.prefix_mirror import PrefixMirror
from blockyard.agent.gateway.routing import OVER_MEAN, SLACK, AgentView, Choice, choose
from blockyard.agent.prefix_log import PrefixLog
from blockyard.agent.prefix_sketch import (
    BOUNDARIES,
    FIRST_STEP,
    MAX_ENTRIES,
    Prefix,
    chat_parts,
    prompt_parts,
    sketch,
)

# ── The choice ────────────────────────────────────────────────────────────────────────────────────

TEXT = "The quick brown fox jumps over the lazy dog, and then over the cat, who does not care. " * 40


@st.composite
def fleets(draw: st.DrawFn) -> list[AgentView]:
    def agent(number: int) -> AgentView:
        known = draw(st.integers(0, len(TEXT)))
        return AgentView(
            name=f"agent-{number}",
            incarnation=draw(st.sampled_from(["a", "b"])),
            ready=draw(st.booleans()),
            in_flight=draw(st.integers(0, 30)),
            waiting=draw(st.integers(0, 10)),
            capacity=draw(st.sampled_from([0, 8, 1000])),
            used=draw(st.sampled_from([0.0, 0.5, 1.0])),
            prefixes=frozenset(sketch([TEXT[:known]], "").hashes),
        )

    return [agent(number) for number in range(draw(st.integers(0, 6)))]


prompts = st.builds(lambda end: sketch([TEXT[:end]], ""), st.integers(0, len(TEXT)))


def place(ranked: list[Choice], name: str) -> int:
    return [choice.agent.name for choice in ranked].index(name)


@given(prompts, fleets(), st.data())
def test_everyone_who_may_be_asked_is_and_nobody_else(
    prefix: Prefix, fleet: list[AgentView], data: st.DataObject
) -> None:
    excluded = data.draw(st.sets(st.sampled_from([agent.key for agent in fleet]))) if fleet else set()
    ranked = choose(prefix, fleet, excluded)
    assert {choice.agent.key for choice in ranked} == {
        agent.key for agent in fleet if agent.ready and agent.key not in excluded
    }
    for choice in ranked:
        assert choice.why.isascii() and choice.why.isprintable()


@given(prompts, fleets(), st.randoms(use_true_random=False))
def test_the_choice_depends_on_nothing_but_its_arguments(
    prefix: Prefix, fleet: list[AgentView], random
) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(fleet)
    random.shuffle(shuffled)
    assert [c.agent for c in choose(prefix, fleet)] == [c.agent for c in choose(prefix, shuffled)]


@given(prompts, fleets(), st.data())
def test_more_load_never_makes_an_agent_more_wanted(
    prefix: Prefix, fleet: list[AgentView], data: st.DataObject
) -> None:
    able = [number for number, agent in enumerate(fleet) if agent.ready]
    if not able:
        return
    number = data.draw(st.sampled_from(able))
    before = place(choose(prefix, fleet), fleet[number].name)
    extra = data.draw(st.integers(1, 20))
    busier = replace(fleet[number], in_flight=fleet[number].in_flight + extra)
    fleet[number] = replace(busier, used=max(busier.used, data.draw(st.sampled_from([0.0, 1.0]))))
    assert place(choose(prefix, fleet), fleet[number].name) >= before


@given(prompts, fleets(), st.data())
def test_a_longer_shared_prefix_never_makes_an_agent_less_wanted(
    prefix: Prefix, fleet: list[AgentView], data: st.DataObject
) -> None:
    able = [number for number, agent in enumerate(fleet) if agent.ready]
    if not able:
        return
    number = data.draw(st.sampled_from(able))
    before = place(choose(prefix, fleet), fleet[number].name)
    fleet[number] = replace(fleet[number], prefixes=frozenset(sketch([TEXT], "").hashes))
    assert place(choose(prefix, fleet), fleet[number].name) <= before


@given(prompts, fleets())
def test_the_first_is_full_or_over_the_bound_only_if_all_are(prefix: Prefix, fleet: list[AgentView]) -> None:
    ranked = choose(prefix, fleet)
    standings = [choice.standing for choice in ranked]
    assert standings == sorted(standings, key=["open", "over_bound", "full"].index)
    for choice in ranked:
        assert (choice.agent.in_flight >= choice.agent.capacity) == (choice.standing == "full")


@settings(max_examples=30)
@given(st.integers(2, 6), st.integers(1, 120))
def test_a_prefix_that_everybody_uses_spreads_over_all_agents(agents: int, requests: int) -> None:
    """All requests begin alike and none ends: nobody gets much more than the mean, whoever began."""
    prefix = sketch([TEXT], "")
    held = [0] * agents
    served: list[frozenset[int]] = [frozenset()] * agents
    for _ in range(requests):
        fleet = [
            AgentView(str(number), in_flight=held[number], prefixes=served[number])
            for number in range(agents)
        ]
        chosen = int(choose(prefix, fleet)[0].agent.name)
        held[chosen] += 1
        served[chosen] = frozenset(prefix.hashes)
        assert held[chosen] <= OVER_MEAN * sum(held) / agents + SLACK + 1
    if requests == 1:
        assert max(held) == 1


def test_an_idle_fleet_follows_the_prefix_and_new_prefixes_are_spread() -> None:
    fleet = [AgentView(f"agent-{number}") for number in range(4)]
    mine = sketch([TEXT], "")
    for number in range(4):
        knows = [replace(a, prefixes=frozenset(mine.hashes)) if a is fleet[number] else a for a in fleet]
        assert choose(mine, knows)[0].agent.name == f"agent-{number}"
    first = {choose(sketch([f"{number}: {TEXT}"], ""), fleet)[0].agent.name for number in range(100)}
    assert len(first) == 4
    # What users write below a common system prompt does not matter, as long as nobody has served it.
    beginnings = {choose(sketch([TEXT, str(number)], ""), fleet)[0].agent.name for number in range(20)}
    assert len(beginnings) == 1


def test_a_restarted_agent_is_another_one_for_exclusion_and_the_same_for_ties() -> None:
    old, new = AgentView("a", "1"), AgentView("a", "2")
    assert choose(Prefix(), [old], {old.key}) == []
    assert choose(Prefix(), [new], {old.key})[0].agent is new
    prefix = sketch([TEXT], "")
    others = [AgentView(str(number)) for number in range(9)]
    assert place(choose(prefix, [old, *others]), "a") == place(choose(prefix, [new, *others]), "a")


# ── The sketches ──────────────────────────────────────────────────────────────────────────────────


@given(st.text(max_size=600), st.text(max_size=600), st.text(max_size=600))
def test_prompts_share_what_they_begin_with(common: str, one: str, other: str) -> None:
    left, right = sketch([common, one], "t"), sketch([common + other], "t")
    shared = left.shared_with(frozenset(right.hashes))
    same = next(
        (i for i, (a, b) in enumerate(zip(common + one, common + other, strict=False)) if a != b),
        min(len(common + one), len(common + other)),
    )
    assert shared == max([end for end in BOUNDARIES if end <= same], default=0)
    assert sketch([common, one], "u").shared_with(frozenset(left.hashes)) == 0  # another tenant


def test_boundaries_are_dense_at_first_and_few_in_all() -> None:
    assert BOUNDARIES[:16] == [FIRST_STEP * (n + 1) for n in range(16)]
    assert len(BOUNDARIES) < 200
    assert all(b > a and b - a <= max(FIRST_STEP, a // 16) for a, b in itertools.pairwise(BOUNDARIES))


def test_a_conversation_begins_with_the_one_before() -> None:
    turns = [
        ("system", "Be brief. " * 20),
        ("user", "Hello " * 20),
        ("assistant", "Hi " * 30),
        ("user", "Bye"),
    ]
    earlier, later = sketch(chat_parts(turns[:2]), ""), sketch(chat_parts(turns), "")
    assert later.shared_with(frozenset(earlier.hashes)) == BOUNDARIES[len(earlier.hashes) - 1]
    assert sketch(prompt_parts([1, 2, 3] * 40), "").hashes != sketch(prompt_parts("1 2 3 " * 40), "").hashes


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2000)), max_size=30), st.data())
def test_a_mirror_knows_what_the_log_knows(prompts: list[tuple[int, int]], data: st.DataObject) -> None:
    """Brought up to date at any times, and although the log forgets all the time."""
    log, mirror, expects = PrefixLog("one"), PrefixMirror(), data.draw(st.booleans())
    log.resize(data.draw(st.sampled_from([100, 1000, 10**6])))
    for kind, end in prompts:
        log.record(sketch([str(kind), TEXT[:end]], ""))
        if data.draw(st.booleans()):
            if expects:
                mirror.expect(sketch([TEXT[:end]], "never sent"))
            mirror.update(log.report(mirror.version if mirror.incarnation else 0))
            assert set(log) <= set(mirror)
    mirror.update(log.report(mirror.version if mirror.incarnation else 0))
    assert expects or set(log) == set(mirror)
    again = PrefixMirror()
    again.update(log.report())
    assert set(again) == set(log)
    assert set(log) <= set(mirror)
    for kind, end in prompts:  # the known prefixes have no gaps, which the bisection in shared_with relies on
        known = [entry in log for entry in sketch([str(kind), TEXT[:end]], "").hashes]
        assert known == sorted(known, reverse=True)


def test_a_log_forgets_what_was_used_longest_ago() -> None:
    log = PrefixLog("one")
    log.resize(pool_tokens=1000)  # about 4000 characters
    prompts = [sketch([str(number), TEXT[:1000]], "") for number in range(5)]
    for prompt in prompts[:3]:
        log.record(prompt)
    log.record(prompts[0])  # used again
    log.record(prompts[3])
    log.record(prompts[4])
    assert [bool(prompt.shared_with(log)) for prompt in prompts] == [True, False, True, True, True]
    log.resize(pool_tokens=10**9)
    for number in range(MAX_ENTRIES // 10):
        log.record(sketch([f"{number} " + TEXT[:1000]], ""))
    assert len(log) <= MAX_ENTRIES


def test_what_was_expected_and_never_came_is_forgotten_with_its_time() -> None:
    log, mirror = PrefixLog("one"), PrefixMirror()
    log.resize(pool_tokens=100)
    mirror.update(log.report())
    lost = sketch(["lost on the way " * 20], "")
    mirror.expect(lost)
    assert lost.shared_with(mirror) > 0
    for number in range(3):
        log.record(sketch([str(number), TEXT[:1000]], ""))
    mirror.update(log.report(mirror.version))
    assert lost.shared_with(mirror) == 0


def test_a_mirror_begins_anew_with_another_life() -> None:
    old, new, mirror = PrefixLog("old"), PrefixLog("new"), PrefixMirror()
    mine = sketch([TEXT], "")
    old.record(mine)
    old.record(mine)
    mirror.update(old.report())
    assert mine.shared_with(mirror) == BOUNDARIES[len(mine.hashes) - 1]
    other = sketch(["other " * 100], "")
    new.record(other)

    async def run() -> None:
        # Its version is older than the one asked for: it must not be waited for.
        report = await new.newer_than(mirror.version, mirror.incarnation, seconds=60)
        mirror.update(report)

    asyncio.run(asyncio.wait_for(run(), 30))
    assert mine.shared_with(mirror) == 0
    assert other.shared_with(mirror) > 0


def test_a_long_poll_ends_with_the_next_prompt() -> None:
    log = PrefixLog("one")

    async def run() -> None:
        waiting = asyncio.create_task(log.newer_than(0, "one", seconds=60))
        await asyncio.sleep(0)
        assert not waiting.done()
        log.record(sketch([TEXT], ""))
        report = await waiting
        assert report.version == 1
        assert len(report.uses) == 1
        assert (await log.newer_than(1, "one", seconds=0)).uses == []

    asyncio.run(asyncio.wait_for(run(), 30))
