"""The fleet: long polls that see every change soon, cost little, and survive whatever an agent does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from blockyard.operator import fleet as fleet_module
from blockyard.operator.fleet import Fleet
from blockyard.operator.observed import Pod, Report
from blockyard.operator.workqueue import WorkQueue

from .agents import Agents

KEY = ("default", "s")


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 90))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "SHORTEST_PAUSE", 0.001)
    monkeypatch.setattr(fleet_module, "FIRST_BACKOFF", 0.01)
    monkeypatch.setattr(fleet_module, "LOAD_DELAY", 0.01)


async def until(holds: Callable[[], bool]) -> None:
    """For what nobody tells of."""
    for _ in range(3000):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")


class Fixture:
    def __init__(self, agents: Agents) -> None:
        self.agents = agents
        self.queue = WorkQueue()
        self.fleet = Fleet(self.queue, polls_per_second=1e6)

    def follow(self, *ips: str, token: str = "t", scaled: bool = False, **more: Any) -> None:
        pods = {
            f"uid-{ip}": Pod(f"pod-{ip}", f"uid-{ip}", ip=ip, port=self.agents.port, running=True, **more)
            for ip in ips
        }
        self.fleet.follow(KEY, pods, (token,), scaled=scaled)

    async def marked(self) -> None:
        """Until the service is dirty; it is not afterwards."""
        key, _ = await asyncio.wait_for(self.queue.take(), 30)
        assert key == KEY
        self.queue.done(key)

    def report(self, ip: str) -> Report:
        found = self.fleet.report(f"uid-{ip}")
        assert found is not None
        return found


@asynccontextmanager
async def following(count: int = 1, **options: Any) -> AsyncIterator[tuple[Fixture, list[str]]]:
    async with Agents() as agents:
        ips = [await agents.add(**options) for _ in range(count)]
        fixture = Fixture(agents)
        yield fixture, ips
        await fixture.fleet.close()
        left = [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("agent ")]
        assert not left and len(fixture.fleet) == 0
        fixture.queue.check()


def test_the_first_report_comes_at_once_with_the_token_and_marks_the_service() -> None:
    async def scenario() -> None:
        async with following(token="t") as (fixture, (ip,)):
            fixture.follow(ip)
            await fixture.marked()
            report = fixture.report(ip)
            assert report.status == fixture.agents.of[ip].status and not report.error
            await fixture.agents.of[ip].polled(2)
            assert fixture.agents.of[ip].polls[:2] == [{}, {"since": "1", "wait": "20"}]

    run(scenario())


@pytest.mark.parametrize(
    "change", [{"state": "draining"}, {"incarnation": "another"}, {"layout_digest": "x"}]
)
def test_what_decisions_rest_on_marks_the_service_at_once(
    change: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(fleet_module, "LOAD_DELAY", 3600.0)
        async with following() as (fixture, (ip,)):
            fixture.follow(ip)
            await fixture.marked()
            await fixture.agents.of[ip].set(**change)
            await fixture.marked()
            status = fixture.report(ip).status
            assert status is not None and status.model_dump().items() >= change.items()

    run(scenario())


def test_load_alone_marks_the_service_only_when_it_has_moved_by_a_step() -> None:
    async def scenario() -> None:
        async with following() as (fixture, (ip,)):
            agent = fixture.agents.of[ip]
            fixture.follow(ip)
            await fixture.marked()
            for number in range(1, fleet_module.LOAD_STEP):
                await agent.used(number)
                await agent.polled(number + 2)
            assert len(fixture.queue) == 0 and not fixture.queue._later, "a few blocks are not worth a round"
            await agent.used(fleet_module.LOAD_STEP)
            await fixture.marked()

    run(scenario())


def test_a_queue_that_rises_is_told_soon_where_it_decides_and_not_too_often_in_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(fleet_module, "LOAD_DELAY", 3600.0)
        monkeypatch.setattr(fleet_module, "SCALED_DELAY", 0.01)
        async with following() as (fixture, (ip,)):
            agent = fixture.agents.of[ip]
            fixture.follow(ip, scaled=True)
            await fixture.marked()
            await agent.set(waiting=1)
            await fixture.marked()
            monkeypatch.setattr(fleet_module, "SCALED_ROUNDS", 1 / 3600)
            await agent.set(waiting=2)
            await until(lambda: KEY in fixture.queue._later)
            assert fixture.queue._later[KEY].when() > asyncio.get_running_loop().time() + 1800
            fixture.queue.close()

    run(scenario())


def test_counters_that_grow_with_every_token_never_mark_the_service() -> None:
    async def scenario() -> None:
        async with following() as (fixture, (ip,)):
            agent = fixture.agents.of[ip]
            fixture.follow(ip)
            await fixture.marked()
            for number in range(20):
                await agent.set(steps=number + 1, generated_tokens=number, mean_step_ms=float(number))
                await agent.polled(number + 3)
            assert len(fixture.queue) == 0 and not fixture.queue._later
            report = fixture.report(ip).status
            assert report is not None and report.steps >= 19, "the report itself is fresh"

    run(scenario())


def test_a_busy_agent_is_asked_no_more_often_than_the_fleet_may() -> None:
    async def scenario() -> None:
        async with following(2) as (fixture, ips):
            fixture.fleet._rate = 2 / 3600  # polls per second, for the two together
            fixture.follow(*ips)
            await fixture.marked()
            agent = fixture.agents.of[ips[0]]
            await agent.polled(1)
            for number in range(50):
                await agent.set(steps=number)
            with pytest.raises(TimeoutError):
                await agent.polled(2, limit=0.2)

    run(scenario())


def test_an_agent_that_drains_is_asked_often_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(fleet_module, "DRAINING_PAUSE", 0.001)
        async with following() as (fixture, (ip,)):
            fixture.fleet._rate = 1 / 3600
            fixture.follow(ip, draining_since=1.0)
            await fixture.marked()
            await fixture.agents.of[ip].set(state="drained")
            await fixture.marked()
            report = fixture.report(ip).status
            assert report is not None and report.state == "drained"

    run(scenario())


def test_a_dead_agent_becomes_an_error_once_and_another_life_is_seen() -> None:
    async def scenario() -> None:
        async with following() as (fixture, (ip,)):
            fixture.follow(ip)
            await fixture.marked()
            first = fixture.report(ip).status
            await fixture.agents.stop(ip)
            await fixture.marked()
            assert fixture.report(ip).status is None and "onnect" in fixture.report(ip).error
            await until(lambda errors=fixture.fleet.errors: fixture.fleet.errors >= errors + 2)
            assert len(fixture.queue) == 0
            await fixture.agents.restart(ip)
            await fixture.marked()
            second = fixture.report(ip).status
            assert first is not None and second is not None and first.incarnation != second.incarnation
            assert "since" not in fixture.agents.of[ip].polls[-1] or second.version == 1

    run(scenario())


def test_a_pod_that_becomes_ready_ends_the_pause_after_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(fleet_module, "FIRST_BACKOFF", 3600.0)
        async with following() as (fixture, (ip,)):
            await fixture.agents.stop(ip)
            fixture.follow(ip, ready=False)
            await fixture.marked()
            await fixture.agents.restart(ip)
            fixture.follow(ip, ready=True)
            await fixture.marked()
            assert fixture.report(ip).status is not None

    run(scenario())


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda: web.Response(text="<html>"), "no status of an agent"),
        (lambda: web.json_response({"version": 1}), "no status of an agent"),
        (lambda: web.Response(status=503, text="later"), "HTTP status 503: later"),
        (lambda: web.Response(text="x" * (fleet_module.LARGEST_ANSWER + 1)), "longer than"),
    ],
)
def test_an_answer_that_is_no_status_is_an_error_in_words(answer: Any, error: str) -> None:
    async def scenario() -> None:
        async with following() as (fixture, (ip,)):
            fixture.agents.of[ip].answer = answer
            fixture.follow(ip)
            await fixture.marked()
            assert error in fixture.report(ip).error
            fixture.agents.of[ip].answer = None
            await fixture.marked()
            assert not fixture.report(ip).error

    run(scenario())


def test_the_wrong_token_is_an_error_and_the_right_one_ends_it() -> None:
    async def scenario() -> None:
        async with following(token="right") as (fixture, (ip,)):
            fixture.follow(ip, token="wrong")
            await fixture.marked()
            assert "401" in fixture.report(ip).error
            fixture.follow(ip, token="right")
            await fixture.marked()
            assert fixture.report(ip).status is not None

    run(scenario())


def test_reports_go_with_their_pods_and_come_back_for_no_other() -> None:
    async def scenario() -> None:
        async with following(3) as (fixture, ips):
            fixture.follow(*ips)
            for ip in ips:
                await fixture.agents.of[ip].polled(2)
            fixture.follow(ips[0])
            assert fixture.fleet.report(f"uid-{ips[1]}") is None and len(fixture.fleet) == 1
            assert fixture.report(ips[0]).status is not None, "the one that stays keeps its report"
            polls = [len(fixture.agents.of[ip].polls) for ip in ips[1:]]
            await fixture.agents.of[ips[1]].set(state="drained")
            await fixture.agents.of[ips[0]].set(state="draining")
            await fixture.marked()
            assert [len(fixture.agents.of[ip].polls) for ip in ips[1:]] == polls
            # The address comes back with another pod: nothing of the first one is believed.
            other = Pod("other", "uid-other", ip=ips[1], port=fixture.agents.port)
            fixture.fleet.follow(("default", "other"), {"uid-other": other}, "t")
            assert fixture.fleet.report("uid-other") is None
            fixture.fleet.follow(KEY, {}, "")
            assert len(fixture.fleet) == 1

    run(scenario())


def test_pods_without_an_address_and_finished_ones_are_not_asked() -> None:
    async def scenario() -> None:
        async with following() as (fixture, (ip,)):
            fixture.follow("")
            assert len(fixture.fleet) == 0
            fixture.follow(ip)
            assert len(fixture.fleet) == 1
            fixture.follow(ip, phase="Failed")
            assert len(fixture.fleet) == 0

    run(scenario())


def test_draining_is_asked_for_with_the_time_that_is_given_and_its_answer_is_a_report() -> None:
    async def scenario() -> None:
        async with following() as (fixture, (ip,)):
            fixture.follow(ip)
            await fixture.marked()
            assert await fixture.fleet.drain(f"uid-{ip}", 12.5) == ""
            assert fixture.agents.of[ip].drains == [12.5]
            status = fixture.report(ip).status
            assert status is not None and status.state == "draining"
            fixture.agents.of[ip].refuse_drain = 1
            assert "HTTP status 500" in await fixture.fleet.drain(f"uid-{ip}", 1)
            assert await fixture.fleet.drain("unknown", 1) == "the agent has no address yet"
            await fixture.agents.stop(ip)
            assert "POST /drain" in await fixture.fleet.drain(f"uid-{ip}", 1)

    run(scenario())


def test_only_a_few_agents_are_connected_to_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(fleet_module, "CONNECTING", 3)
        async with following(12) as (fixture, ips):
            answering = asyncio.Event()
            busy: list[int] = []

            for agent in fixture.agents.of.values():
                original = agent._status

                async def slow(request: web.Request, original: Any = original) -> web.Response:
                    if "since" not in request.query:
                        busy.append(1)
                        await answering.wait()
                    found: web.Response = await original(request)
                    return found

                agent._status = slow  # type: ignore[method-assign]  # that is the test
            for ip in ips:
                await fixture.agents.stop(ip)
                await fixture.agents.restart(ip)
            fixture.follow(*ips)
            await until(lambda: len(busy) >= 3)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(until(lambda: len(busy) > 3), 0.3)
            answering.set()
            for ip in ips:
                await fixture.agents.of[ip].polled(2)

    run(scenario())
