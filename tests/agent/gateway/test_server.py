"""The gateway as a process, before agents that fail in every way an agent can."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from blockyard.agent.gateway.routing import OVER_MEAN, SLACK
from blockyard.agent.prefix_sketch import BOUNDARIES, prompt_parts, sketch

from ..load import events, session
from .process import GatewayProcess, ScriptedAgent, agents_when, all_ready, gateway_status

GREEDY = {"model": "m", "prompt": "Once upon a time", "temperature": 0}
EXIT_TIMEOUT = 30.0


@dataclass
class Scene:
    """A gateway, the agents a, b, ... behind it, and a client."""

    gateway: GatewayProcess
    agents: list[ScriptedAgent]
    client: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return self.gateway.url

    def post(self, body: Any, path: str = "/v1/completions", **headers: str) -> Any:
        return self.client.post(self.url + path, json=body, headers=headers)

    async def ask(
        self, body: Any = GREEDY, path: str = "/v1/completions", **headers: str
    ) -> tuple[int, Any, Any]:
        """(status, answer, headers)."""
        async with self.post(body, path, **headers) as response:
            return response.status, await response.json(), response.headers

    async def stream(self, **more: Any) -> tuple[list[Any], Any]:
        """(the events, the headers) of a stream that is read to its end."""
        async with self.post({**GREEDY, "stream": True, **more}) as response:
            assert response.status == 200, await response.text()
            return await events(response), response.headers

    async def metrics(self) -> dict[str, float]:
        async with self.client.get(f"{self.url}/metrics") as response:
            lines = [line for line in (await response.text()).splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    async def code(self, path: str) -> int:
        """The status of a GET; 0 if nobody listens."""
        try:
            async with self.client.get(self.url + path) as response:
                return response.status
        except aiohttp.ClientConnectorError:
            return 0

    async def first_is(self, agent: ScriptedAgent) -> None:
        """Report more load for the other agents, so that this one is asked first."""
        others = [other for other in self.agents if other is not agent]
        for other in others:
            other.change(in_flight=2)
        await agents_when(
            self.client,
            self.url,
            lambda agents: all(agents[other.name]["status"]["in_flight"] == 2 for other in others),
        )


@contextlib.asynccontextmanager
async def scene(folder: Path, count: int, *flags: str, **environment: str) -> AsyncIterator[Scene]:
    async with contextlib.AsyncExitStack() as stack:
        agents = [await stack.enter_async_context(ScriptedAgent(name)) for name in "abcdefgh"[:count]]
        listed = {agent.name: agent.url for agent in agents}
        gateway = await asyncio.to_thread(GatewayProcess, folder, listed, *flags, **environment)
        client = await stack.enter_async_context(session())
        try:
            await all_ready(client, gateway.url, *listed)
            yield Scene(gateway, agents, client)
        finally:
            for agent in agents:
                agent.released.set()
            await asyncio.to_thread(gateway.stop)
        assert "Traceback" not in gateway.errors(), gateway.errors()


def go(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 120))


async def poll(work: Callable[[], Awaitable[Any]], holds: Callable[[Any], bool]) -> Any:
    """Call ``work`` until ``holds`` of its result: for state that has no event to wait for."""
    async with asyncio.timeout(60):
        while True:
            got = await work()
            if holds(got):
                return got
            await asyncio.sleep(0.02)


def text_of(stream: list[Any]) -> str:
    return "".join(c["text"] for event in stream if "choices" in event for c in event["choices"])


# ── Attempts that fail before there is a token ────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_has_no_token_yet_goes_to_another_agent(tmp_path: Path, stream: bool) -> None:
    async def half(request: web.Request) -> web.StreamResponse:
        """The connection breaks in the middle of the answer."""
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b'{"half":')
        assert request.transport is not None
        request.transport.abort()
        return response

    async def run() -> None:
        async with scene(tmp_path, 2) as s:
            bad, good = s.agents
            await s.first_is(bad)
            faults = {
                "reset": bad.reset,
                "503": bad.refuse(503, "server_draining", **{"Retry-After": "5"}),
                "429": bad.refuse(429, "queue_full", **{"Retry-After": "60"}),
                "401": bad.refuse(401, "invalid_token"),
                "half": bad.stream(then="abort") if stream else half,
            }
            good.respond = good.stream("x", "y") if stream else good.answer
            for number, respond in enumerate(faults.values(), 1):
                bad.respond = respond
                if stream:
                    got, headers = await s.stream()
                    assert text_of(got) == "xy" and got[-1] == "[DONE]"
                else:
                    status, answer, headers = await s.ask()
                    assert (status, answer) == (200, {"from": "b"})
                assert headers["x-blockyard-agent"] == "b"
                assert headers["x-blockyard-why"].startswith("attempt 2, prefix 0/16, load 2")
                assert [len(agent.requests) for agent in s.agents] == [number, number]
            retries = {
                name: count
                for name, count in (await s.metrics()).items()
                if name.startswith("blockyard_gateway_retries_total")
            }
            assert sum(retries.values()) == 5, retries

    go(run())


def test_retry_after_is_waited_for_when_nobody_else_is_there(tmp_path: Path) -> None:
    async def run() -> None:
        async with scene(tmp_path, 2) as s:
            times: list[float] = []

            def busy_once(agent: ScriptedAgent) -> Callable[[web.Request], Any]:
                async def respond(request: web.Request) -> web.StreamResponse:
                    times.append(asyncio.get_running_loop().time())
                    agent.respond = agent.answer
                    return await agent.refuse(429, "queue_full", **{"Retry-After": "1"})(request)

                return respond

            for agent in s.agents:
                agent.respond = busy_once(agent)
            status, _, headers = await s.ask()
            assert status == 200
            assert headers["x-blockyard-why"].startswith("attempt 3")
            assert asyncio.get_running_loop().time() - times[0] >= 1.0

    go(run())


def test_what_nobody_can_serve_is_refused_within_bounds(tmp_path: Path) -> None:
    async def run() -> None:
        async with scene(tmp_path, 2, "--patience", "5", "--max-attempts", "4") as s:
            for agent in s.agents:
                agent.respond = agent.refuse(429, "queue_full", **{"Retry-After": "77"})
            status, answer, headers = await s.ask()
            assert (status, answer["error"]["code"], headers["Retry-After"]) == (429, "queue_full", "77")
            assert answer["error"]["type"] == "rate_limit_error"
            assert [len(agent.requests) for agent in s.agents] == [1, 1]
            for agent in s.agents:
                agent.respond = agent.refuse(503, "engine_failed")
            status, answer, headers = await s.ask({**GREEDY, "stream": True})
            assert (status, answer["error"]["code"]) == (503, "agents_failed")
            assert "says engine_failed" in answer["error"]["message"]
            assert int(headers["Retry-After"]) > 0
            assert sum(len(agent.requests) for agent in s.agents) == 2 + 4

    go(run())


def test_a_clients_mistake_is_the_agents_to_explain(tmp_path: Path) -> None:
    async def run() -> None:
        async with scene(tmp_path, 2, "--max-body-bytes", "2000") as s:
            for agent in s.agents:
                agent.respond = agent.refuse(404, "model_not_found")
            for body in (GREEDY, {**GREEDY, "stream": True}):
                status, answer, _ = await s.ask(body)
                assert (status, answer["error"]["code"]) == (404, "model_not_found")
                assert set(answer["error"]) == {"message", "type", "param", "code"}
            assert sum(len(agent.requests) for agent in s.agents) == 2
            async with s.client.post(f"{s.url}/v1/completions", data=b"{no json") as response:
                answer = await response.json()
                assert (response.status, answer["error"]["code"]) == (400, "invalid_json")
            status, answer, _ = await s.ask({**GREEDY, "prompt": "x" * 3000})
            assert (status, answer["error"]["code"]) == (413, "body_too_large")
            status, answer, _ = await s.ask(path="/v1/nothing")
            assert status == 404 and answer["error"]["message"]
            assert sum(len(agent.requests) for agent in s.agents) == 2

    go(run())


# ── Agents that are lost after a token ────────────────────────────────────────────────────────────


def test_a_stream_goes_on_elsewhere_when_its_agent_is_lost(tmp_path: Path) -> None:
    async def run() -> None:
        async with scene(tmp_path, 2) as s:
            a, b = s.agents
            await s.first_is(a)
            b.respond = b.stream("Hell", "o wor", "ld")
            for number, then in enumerate(["abort", "engine_failed", "server_shutdown"], 1):
                a.respond = a.stream("Hel", "lo", then=then)
                got, headers = await s.stream()
                assert text_of(got) == "Hello world"
                assert got[-1] == "[DONE]"
                assert {event["id"] for event in got[:-1]} == {"a"}  # the client sees one stream
                assert headers["x-blockyard-agent"] == "a"
                assert a.requests[-1][1] == b.requests[-1][1]
                metrics = await s.metrics()
                assert metrics['blockyard_gateway_replays_total{outcome="begun"}'] == number
                assert metrics['blockyard_gateway_replays_total{outcome="gone_on"}'] == number

    go(run())


def test_a_stream_that_cannot_go_on_says_so_and_sends_nothing_wrong(tmp_path: Path) -> None:
    async def run() -> None:
        async with scene(tmp_path, 2) as s:
            a, b = s.agents
            await s.first_is(a)
            a.respond = a.stream("Hel", "lo", then="abort")
            several = {"prompt": ["p", "p"], "temperature": 1}
            refusal = b.refuse(400, "too_long")
            for more, respond, code in [
                ({}, b.stream("Hell", "a"), "replay_diverged"),
                ({}, b.stream("Hel"), "replay_diverged"),
                ({}, refusal, "replay_refused"),
                (several, b.stream("Hello"), "agent_lost"),
            ]:
                b.respond = respond
                got, _ = await s.stream(**more)
                assert text_of(got) == "Hello"
                assert got[-1]["error"]["code"] == code
                assert "[DONE]" not in got

    go(run())


def test_an_error_that_is_the_requests_own_is_not_tried_on_everybody(tmp_path: Path) -> None:
    async def run() -> None:
        async with scene(tmp_path, 2) as s:
            for agent in s.agents:
                agent.respond = agent.stream("Hel", then="internal_error")
            got, _ = await s.stream()
            assert text_of(got) == "Hel"
            assert got[-1]["error"]["code"] == "internal_error"
            assert sum(len(agent.requests) for agent in s.agents) == 1

    go(run())


def test_sampled_requests_are_replayed_with_the_seed_that_they_were_given(tmp_path: Path) -> None:
    async def run() -> None:
        async with scene(tmp_path, 2) as s:
            a, b = s.agents
            a.respond, b.respond = a.stream("x", then="abort"), b.stream("x", "y")
            await s.first_is(a)
            got, _ = await s.stream(temperature=1)
            assert text_of(got) == "xy"
            assert a.requests[0][1]["seed"] == b.requests[0][1]["seed"] is not None

    go(run())


def test_what_waits_for_a_former_life_of_an_agent_goes_elsewhere(tmp_path: Path) -> None:
    """The connection is still there: only the report tells that nobody computes the answer any more."""

    async def run() -> None:
        async with scene(tmp_path, 2) as s:
            a, b = s.agents
            a.respond, b.respond = a.stream("Hel", then="hold"), b.stream("Hel", "lo")
            await s.first_is(a)
            async with s.post({**GREEDY, "stream": True}) as response:
                await response.content.readuntil(b"\n\n")
                assert response.headers["x-blockyard-agent"] == "a"
                a.change(incarnation="f" * 32)
                rest = await events(response)
            assert text_of(rest) == "lo"
            assert rest[-1] == "[DONE]"

    go(run())


def test_an_agent_that_falls_silent_is_not_chosen_not_forgotten_and_not_waited_for(tmp_path: Path) -> None:
    """As when its machine is gone: connections stay open and nothing comes."""

    async def run() -> None:
        async with scene(tmp_path, 2) as s:
            a = s.agents[0]
            a.respond = a.hold
            await s.first_is(a)
            waiting = asyncio.create_task(s.ask())
            await agents_when(s.client, s.url, lambda agents: agents["a"]["requests_from_here"] == 1)
            a.silent = True
            silent = await agents_when(s.client, s.url, lambda agents: not agents["a"]["ready"])
            assert silent["a"]["status"]["state"] == "ready"  # what it said last
            assert silent["a"]["stale"] and silent["a"]["error"] == ""  # before its answer is overdue
            status, answer, _ = await waiting
            assert (status, answer) == (200, {"from": "b"})
            assert (await s.ask())[1] == {"from": "b"}
            a.silent = False
            await all_ready(s.client, s.url, "a", "b")

    go(run())


# ── Which agent ───────────────────────────────────────────────────────────────────────────────────


def test_two_gateways_choose_alike(tmp_path: Path) -> None:
    async def run() -> None:
        async with scene(tmp_path / "1", 4) as s:
            listed = {agent.name: agent.url for agent in s.agents}
            other = await asyncio.to_thread(GatewayProcess, tmp_path / "2", listed)
            try:
                await all_ready(s.client, other.url, *listed)
                chosen = []
                for number in range(24):
                    body = {**GREEDY, "prompt": f"{number} tells a story " * 20}
                    names = []
                    for url in (s.url, other.url):
                        async with s.client.post(f"{url}/v1/completions", json=body) as response:
                            names.append(response.headers["x-blockyard-agent"])
                    assert names[0] == names[1]
                    chosen.append(names[0])
                assert len(set(chosen)) > 1
            finally:
                await asyncio.to_thread(other.stop)

    go(run())


def test_a_prefix_that_everybody_uses_spills_over(tmp_path: Path) -> None:
    async def run() -> None:
        async with scene(tmp_path, 3) as s:
            for agent in s.agents:
                agent.respond = agent.hold
            tasks = []
            for number in range(1, 16):
                tasks.append(asyncio.create_task(s.ask({**GREEDY, "prompt": "The same beginning. " * 40})))
                await agents_when(
                    s.client, s.url,
                    lambda agents, n=number: sum(a["requests_from_here"] for a in agents.values()) == n,  # type: ignore[misc]
                )  # fmt: skip
                held = [agent.open for agent in s.agents]
                assert max(held) <= OVER_MEAN * number / 3 + SLACK + 1
            assert all(agent.open >= 3 for agent in s.agents)
            for agent in s.agents:
                agent.released.set()
            assert {(await task)[0] for task in tasks} == {200}

    go(run())


def test_an_agent_that_has_served_the_prefix_is_preferred_until_it_forgets(tmp_path: Path) -> None:
    async def run() -> None:
        async with scene(tmp_path, 3) as s:
            story = "A long beginning that many requests share. " * 30
            body = {**GREEDY, "prompt": story}
            for agent in s.agents:
                agent.prefixes = [sketch(prompt_parts(story), "alice" if agent.name == "b" else "bob")]
                agent.change(incarnation="e" * 32)  # a new life, with these prefixes
            await agents_when(
                s.client, s.url, lambda agents: all(a["prefix_hashes"] for a in agents.values())
            )
            _, answer, headers = await s.ask(body, **{"x-tenant": "alice"})
            assert answer == {"from": "b"}
            known = max(end for end in BOUNDARIES if end <= len(story))
            assert headers["x-blockyard-why"].startswith(f"prefix {known}/{len(story)}, load 0")

    go(run())


def test_agents_come_and_go(tmp_path: Path) -> None:
    async def run() -> None:
        async with scene(tmp_path, 3, "--patience", "60") as s:
            a, b, c = s.agents
            a.respond = a.hold
            s.gateway.set_agents({"a": a.url})
            await all_ready(s.client, s.url, "a")
            waiting = asyncio.create_task(s.ask())
            await agents_when(s.client, s.url, lambda agents: agents["a"]["requests_from_here"] == 1)
            s.gateway.set_agents({"b": b.url})
            agents = await agents_when(
                s.client, s.url, lambda agents: agents.get("b", {}).get("ready", False)
            )
            assert agents["a"]["removed"] and not agents["a"]["ready"]
            assert (await s.ask())[1] == {"from": "b"}
            a.released.set()  # a removed agent finishes what it has begun
            assert (await waiting)[:2] == (200, {"from": "a"})
            await all_ready(s.client, s.url, "b")  # and is forgotten only then
            # None at all: requests wait for one.
            s.gateway.set_agents({})
            await agents_when(s.client, s.url, lambda agents: not agents)
            waiting = asyncio.create_task(s.ask())
            async with s.client.get(f"{s.url}/readyz") as response:
                assert response.status == 503
            assert not waiting.done()
            s.gateway.set_agents({"c": c.url})
            assert (await waiting)[:2] == (200, {"from": "c"})
            # Draining and starting agents are known and not asked.
            s.gateway.set_agents({"b": b.url, "c": c.url})
            await all_ready(s.client, s.url, "b", "c")
            c.change(state="draining")
            await agents_when(s.client, s.url, lambda agents: not agents["c"]["ready"])
            asked = len(c.requests)
            for number in range(6):
                assert (await s.ask({**GREEDY, "prompt": str(number)}))[1] == {"from": "b"}
            assert len(c.requests) == asked

    go(run())


# ── Tenants, ids, what is sent on ─────────────────────────────────────────────────────────────────


def test_with_keys_the_tenant_is_the_keys_and_nobody_elses(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "alice").write_text("key-a")

    async def run() -> None:
        async with scene(tmp_path, 1, "--keys-dir", str(keys), "--token", "inner") as s:
            agent = s.agents[0]
            for wrong in ({}, {"Authorization": "Bearer key-b"}, {"Authorization": "Bearer inner"}):
                status, answer, _ = await s.ask(**wrong)
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
                async with s.client.get(f"{s.url}/v1/models", headers=wrong) as response:
                    assert response.status == 401
            assert agent.requests == []
            mine = {"Authorization": "Bearer key-a", "x-tenant": "bob"}
            assert (await s.ask(**mine))[0] == 200
            sent = agent.requests[0][0]
            assert (sent["x-tenant"], sent["Authorization"]) == ("alice", "Bearer inner")
            (keys / "bob").write_text("key-b")
            assert await poll(lambda: s.ask(Authorization="Bearer key-b"), lambda got: got[0] == 200)
            assert agent.requests[-1][0]["x-tenant"] == "bob"

    go(run())


def test_without_keys_the_tenant_is_what_the_client_says(tmp_path: Path) -> None:
    async def run() -> None:
        async with scene(tmp_path, 1) as s:
            await s.ask(**{"x-tenant": "alice", "Authorization": "Bearer whatever", "Cookie": "c=1"})
            sent = s.agents[0].requests[0][0]
            assert sent["x-tenant"] == "alice"
            assert "Authorization" not in sent and "Cookie" not in sent
            await s.ask()
            assert s.agents[0].requests[1][0]["x-tenant"] == ""

    go(run())


def test_limits_of_a_tenant(tmp_path: Path) -> None:
    async def run() -> None:
        flags = ["--requests-per-minute", "4", "--concurrent-requests", "2"]
        async with scene(tmp_path, 1, *flags) as s:
            agent = s.agents[0]
            agent.respond = agent.hold
            mine = {"x-tenant": "alice"}
            held = [asyncio.create_task(s.ask(**mine)) for _ in range(2)]
            await agents_when(s.client, s.url, lambda agents: agents["a"]["requests_from_here"] == 2)
            status, answer, headers = await s.ask(**mine)
            assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
            assert "concurrent_requests" in answer["error"]["message"]
            assert headers["Retry-After"] == "1"
            other = asyncio.create_task(s.ask(**{"x-tenant": "bob"}))
            await agents_when(s.client, s.url, lambda agents: agents["a"]["requests_from_here"] == 3)
            agent.released.set()
            assert [(await task)[0] for task in [*held, other]] == [200] * 3
            assert [(await s.ask(**mine))[0] for _ in range(2)] == [200] * 2
            status, answer, headers = await s.ask(**mine)
            assert status == 429 and "requests_per_minute" in answer["error"]["message"]
            assert 1 <= int(headers["Retry-After"]) <= 15
            metrics = await s.metrics()
            for reason in ("concurrent_requests", "requests_per_minute"):
                assert metrics[f'blockyard_gateway_refusals_total{{reason="{reason}",tenant=""}}'] == 1

    go(run())


def test_a_request_keeps_its_id_and_gets_one_otherwise(tmp_path: Path) -> None:
    async def run() -> None:
        async with scene(tmp_path, 2) as s:
            for agent in s.agents:
                agent.respond = agent.stream("x")
            for body in (GREEDY, {**GREEDY, "stream": True}):
                async with s.post(body, **{"x-request-id": "mine-1"}) as response:
                    assert response.headers["x-request-id"] == "mine-1"
            async with s.post(GREEDY) as response:
                made = response.headers["x-request-id"]
                assert len(made) == 32
            sent = {headers["x-request-id"] for agent in s.agents for headers, _ in agent.requests}
            assert sent == {"mine-1", made}
            log = s.gateway.errors()
            for line in (f"attempt id={made} number=1 agent=", f"status=200 ms=.* id={made}"):
                assert re.search(line, log), line

    go(run())


def test_other_paths_are_forwarded_and_its_own_are_answered(tmp_path: Path) -> None:
    async def run() -> None:
        async with scene(tmp_path, 1, "--token", "inner") as s:
            async with s.client.get(f"{s.url}/v1/models") as response:
                assert await response.json() == {"from": "a"}
            assert (await s.ask({"prompt": "x"}, "/tokenize"))[1] == {"from": "a"}
            for path in ("/healthz", "/readyz", "/metrics"):
                async with s.client.get(s.url + path) as response:
                    assert response.status == 200
            async with s.client.get(f"{s.url}/status") as response:
                assert response.status == 401
            status = await gateway_status(s.client, s.url, "inner")
            assert [agent["name"] for agent in status["agents"]] == ["a"]
            metrics = await s.metrics()
            assert metrics['blockyard_gateway_agents{state="ready"}'] == 1
            assert metrics['blockyard_gateway_requests_total{code="200",path="/tokenize"}'] == 1
            assert metrics['blockyard_gateway_upstream_seconds_count{outcome="ok"}'] == 2

    go(run())


# ── Ends ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_takes_its_request_along(tmp_path: Path, stream: bool) -> None:
    async def run() -> None:
        async with scene(tmp_path, 1) as s:
            agent = s.agents[0]
            agent.respond = agent.stream("x", then="hold") if stream else agent.hold
            asking = asyncio.create_task(s.post({**GREEDY, "stream": stream}).__aenter__())
            await agent.until_open(1)
            if stream:
                (await asking).close()
            asking.cancel()
            await agent.until_open(0)
            await agents_when(s.client, s.url, lambda agents: agents["a"]["requests_from_here"] == 0)
            assert len(agent.requests) == 1  # and no failure is counted

    go(run())


def test_sigterm_finishes_what_is_open_and_takes_nothing_new(tmp_path: Path) -> None:
    async def run() -> None:
        async with scene(tmp_path, 1, "--grace-period", "100", "--linger", "2") as s:
            agent = s.agents[0]
            agent.respond = agent.stream("Hel", then="hold")
            async with s.post({**GREEDY, "stream": True}) as response:
                await response.content.readuntil(b"\n\n")
                s.gateway.process.send_signal(signal.SIGTERM)
                # While it lingers it says that it is going, and still serves.
                await poll(lambda: s.code("/readyz"), lambda code: code == 503)
                agent.respond = agent.answer
                async with s.post(GREEDY) as late:
                    assert late.status == 200
                    assert late.headers["Connection"] == "close"
                await poll(lambda: s.code("/readyz"), lambda code: code == 0)
                assert s.gateway.process.poll() is None
                # The open stream even loses its agent meanwhile, and is still completed.
                agent.respond = agent.stream("Hel", "lo")
                agent.change(incarnation="f" * 32)  # and its connection is still there
                assert text_of(await events(response)) == "lo"
            assert await asyncio.to_thread(s.gateway.process.wait, EXIT_TIMEOUT) == 0

    go(run())


@pytest.mark.parametrize("how", ["grace_period", "told twice"])
def test_what_is_open_after_the_grace_period_is_told(tmp_path: Path, how: str) -> None:
    async def run() -> None:
        grace = "0.5" if how == "grace_period" else "100"
        async with scene(tmp_path, 1, "--grace-period", grace) as s:
            agent = s.agents[0]
            agent.respond = agent.stream("Hel", then="hold")
            async with s.post({**GREEDY, "stream": True}) as response:
                await response.content.readuntil(b"\n\n")
                agent.respond = agent.hold
                waiting = asyncio.create_task(s.ask())
                await agent.until_open(2)
                for _ in range(1 if how == "grace_period" else 2):
                    s.gateway.process.send_signal(signal.SIGINT)
                    await asyncio.sleep(0.2)  # signals that come at once are one
                error = (await events(response))[-1]["error"]
                assert error["code"] == "server_shutdown"
                assert how in error["message"]
            status, answer, _ = await waiting
            assert (status, answer["error"]["code"]) == (503, "server_shutdown")
            assert await asyncio.to_thread(s.gateway.process.wait, EXIT_TIMEOUT) == 0
            await agent.until_open(0)

    go(run())


def test_a_client_that_stops_reading_is_dropped(tmp_path: Path) -> None:
    async def run() -> None:
        async with scene(tmp_path, 1, "--client-timeout", "1") as s:
            agent = s.agents[0]
            agent.respond = agent.stream(*["x" * 10000] * 2000)
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", int(s.url.rpartition(":")[2]), limit=1000
            )
            body = json.dumps({**GREEDY, "stream": True}).encode()
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            await agent.until_open(1)
            await agent.until_open(0)
            await agents_when(s.client, s.url, lambda agents: agents["a"]["requests_from_here"] == 0)
            assert len(agent.requests) == 1
            writer.close()
            del reader

    go(run())
