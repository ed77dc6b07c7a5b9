"""What operators and gateways ask of an agent: its token, draining, and the prompts it has served."""

from __future__ import annotations

import asyncio
import signal
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from blockyard.agent.gateway.prefix_mirror import PrefixMirror
from blockyard.agent.prefix_sketch import (
    BOUNDARIES,
    PrefixReport,
    chat_parts,
    prompt_parts,
    sketch,
)

from .load import LONG, ask, complete, events, go, in_flight, session, status_when, stream
from .process import MODEL, AgentProcess

Start = Callable[..., AgentProcess]
EXIT_TIMEOUT = 30.0


def drain(agent: AgentProcess, timeout_s: float) -> dict[str, Any]:
    code, status = agent.post("/drain", {"timeout_s": timeout_s})
    assert code == 200, status
    return status  # type: ignore[no-any-return]


def test_a_drain_finishes_what_runs_takes_nothing_new_and_stays(start_agent: Start) -> None:
    agent = start_agent("--max-num-seqs", "3")

    async def run() -> None:
        async with session() as client:
            held = await stream(client, agent.url, ask(LONG))
            whole = [asyncio.create_task(complete(client, agent.url, ask(8))) for _ in range(3)]
            await in_flight(agent, 4)
            assert (await asyncio.to_thread(drain, agent, 600))["state"] == "draining"
            assert await asyncio.to_thread(agent.code, "/readyz") == 503
            assert await asyncio.to_thread(agent.code, "/healthz") == 200
            status, answer = await complete(client, agent.url, ask(1))
            assert (status, answer["error"]["code"]) == (503, "server_draining")
            for status, answer in await asyncio.gather(*whole):
                assert (status, answer["usage"]["completion_tokens"]) == (200, 8)
            # Asked again, with more time or the same: nothing changes.
            assert (await asyncio.to_thread(drain, agent, 600))["state"] == "draining"
            held.close()
            await status_when(agent, lambda s: s["state"] == "drained")
            assert (await asyncio.to_thread(drain, agent, 600))["state"] == "drained"
            status, answer = await complete(client, agent.url, ask(1))
            assert (status, answer["error"]["code"]) == (503, "server_drained")

    go(run())
    agent.idle()
    assert agent.process.poll() is None
    assert agent.stop(timeout=EXIT_TIMEOUT) == 0, agent.errors()


def test_a_drains_deadline_cuts_off_what_is_left_and_may_only_come_nearer(start_agent: Start) -> None:
    agent = start_agent()

    async def run() -> None:
        async with session() as client:
            streamed = await stream(client, agent.url, ask(LONG))
            whole = asyncio.create_task(complete(client, agent.url, ask(LONG)))
            await in_flight(agent, 2)
            await asyncio.to_thread(drain, agent, 3000)
            await asyncio.to_thread(drain, agent, 0.1)
            await asyncio.to_thread(drain, agent, 3000)
            error = (await events(streamed))[-1]["error"]
            assert error["code"] == "server_shutdown"
            assert "drain" in error["message"]
            status, answer = await whole
            assert (status, answer["error"]["code"]) == (503, "server_shutdown")
            await status_when(agent, lambda s: s["state"] == "drained")

    go(run())
    agent.idle()
    assert agent.stop(signal.SIGTERM, EXIT_TIMEOUT) == 0, agent.errors()


def test_a_drain_while_it_loads_never_lets_it_become_ready(start_agent: Start) -> None:
    agent = start_agent(wait=False)
    agent.wait_for_url()
    assert drain(agent, 5)["state"] in ("draining", "drained")
    status = agent.status_when(lambda s: s["layout_digest"])  # the model is loaded
    assert status["state"] == "drained"
    assert agent.code("/readyz") == 503
    assert agent.stop(timeout=EXIT_TIMEOUT) == 0, agent.errors()


@pytest.mark.parametrize(
    "body", [{}, {"timeout_s": -1}, {"timeout_s": "x"}, {"timeout_s": 1e9}, {"timeout_s": 1, "x": 2}, []]
)
def test_a_malformed_drain_is_refused_and_starts_none(agent: AgentProcess, body: Any) -> None:
    code, answer = agent.post("/drain", body)
    assert code == 400, answer
    assert answer["error"]["message"]
    assert agent.get("/status")["state"] == "ready"


def test_a_token_is_asked_for_everywhere_but_on_health_and_metrics(
    start_agent: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKYARD_TOKEN", "sesame")
    agent = start_agent(wait=False)
    agent.wait_for_url()

    def code(path: str, authorization: str | None, method: str = "GET") -> int:
        headers = {} if authorization is None else {"Authorization": authorization}
        request = urllib.request.Request(agent.url + path, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code

    gets = ["/status", "/prefixes", "/v1/models", "/openapi.json", "/nothing"]
    posts = ["/drain", "/v1/completions", "/v1/chat/completions", "/tokenize"]
    for wrong in (None, "Bearer wrong", "Basic sesame", "Bearer", "sesame"):
        assert {code(path, wrong) for path in gets} == {401}
        assert {code(path, wrong, "POST") for path in posts} == {401}
    assert code("/healthz", None) == 200
    assert code("/readyz", None) in (200, 503)
    assert code("/metrics", None) == 200
    assert code("/status", "Bearer sesame") == 200
    assert code("/status", "bearer sesame") == 200
    assert code("/nothing", "Bearer sesame") == 404
    assert agent.stop(timeout=EXIT_TIMEOUT) == 0


def test_prefixes_tell_what_was_served_to_whom(agent: AgentProcess) -> None:
    mirror = PrefixMirror()

    def update(wait: int) -> PrefixReport:
        query = f"/prefixes?since={mirror.version}&incarnation={mirror.incarnation}&wait={wait}"
        report = PrefixReport.model_validate(agent.get(query))
        mirror.update(report)
        return report

    update(0)
    assert mirror.incarnation == agent.get("/status")["incarnation"]
    text = "A long story that nobody else has told to this agent. " * 5
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": text}]},
    ]
    chat = sketch(chat_parts([("system", "Be brief."), ("user", text)]), "alice")
    plain = sketch(prompt_parts(text), "\0salt")
    ids = sketch(prompt_parts([17] * 60), "")
    assert [p.shared_with(mirror) for p in (chat, plain, ids)] == [0, 0, 0]
    body = {"model": MODEL, "max_tokens": 1}
    version = mirror.version
    for path, more, headers in (
        ("/v1/chat/completions", {"messages": messages}, {"x-tenant": "alice"}),
        ("/v1/completions", {"prompt": ["x", text], "cache_salt": "salt"}, {}),
        ("/v1/completions", {"prompt": [17] * 60}, {}),
    ):
        assert agent.post(path, {**body, **more}, headers)[0] == 200
        report = update(60)  # at once, since there is something
        assert report.version == mirror.version > version
        version = mirror.version
    assert [p.shared_with(mirror) for p in (chat, plain, ids)] == [
        BOUNDARIES[len(p.hashes) - 1] for p in (chat, plain, ids)
    ]
    assert sketch(chat_parts([("system", "Be brief."), ("user", text)]), "bob").shared_with(mirror) == 0
    assert update(0).uses == []
    assert agent.post("/v1/completions", {**body, "prompt": text, "n": 0})[0] == 400
    assert update(0).uses == []  # a refused request leaves no prefix
    for bad in ("since=x", "wait=x", "wait=1e9", "incarnation=%2F"):
        assert agent.code(f"/prefixes?{bad}") == 400
