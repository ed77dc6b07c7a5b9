"""What an agent tells about itself: status, health, metrics, memory."""

from __future__ import annotations

import asyncio
import re
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from .load import LONG, ask, complete, go, in_flight, session, status_when, stream
from .process import MODEL, AgentProcess

GIB = 1 << 30


@pytest.fixture
def idle(agent: AgentProcess) -> Iterator[AgentProcess]:
    agent.idle()
    yield agent
    agent.idle()


def samples(agent: AgentProcess) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """/metrics through Prometheus' own parser: (name, labels) -> value."""
    with urllib.request.urlopen(f"{agent.url}/metrics", timeout=30) as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = response.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def long_words(count: int) -> str:
    """A prompt of many tokens that nothing else has asked for."""
    return " ".join(uuid.uuid4().hex for _ in range(count))


# ── Status ────────────────────────────────────────────────────────────────────────────────────────


def test_the_report_follows_a_request(idle: AgentProcess) -> None:
    before = idle.get("/status")
    assert before["running"] == before["waiting"] == before["in_flight"] == 0

    async def run() -> None:
        async with session() as client:
            streams = [await stream(client, idle.url, ask(LONG)) for _ in range(2)]
            status = await status_when(idle, lambda s: s["running"] == 2 and s["device_tier"]["active"] > 0)
            assert status["in_flight"] == 2
            tier = status["device_tier"]
            assert tier["free"] + tier["cached"] + tier["active"] == tier["total"] == 512
            assert (
                tier["block_bytes"] == 30 * 2 * 3 * 16 * 64 * 4
            )  # layers, K and V, heads, tokens, width, fp32
            for response in streams:
                response.close()

    go(run())
    after = idle.idle()
    assert after["version"] > before["version"]
    assert after["incarnation"] == before["incarnation"]
    assert after["finished"]["abort"] == before["finished"].get("abort", 0) + 2
    assert after["steps"] > before["steps"]
    assert after["mean_step_ms"] > 0
    assert after["capacity"] == 16 + 256


def test_the_queue_is_reported(idle: AgentProcess) -> None:
    async def run() -> None:
        async with session() as client:
            streams = [await stream(client, idle.url, ask(400, n=8)) for _ in range(2)]
            queued = [asyncio.create_task(complete(client, idle.url, ask(1))) for _ in range(3)]
            status = await status_when(idle, lambda s: s["waiting"] == 3)
            assert (status["running"], status["in_flight"]) == (2, 5)
            for response in streams:
                response.close()
            assert [status for status, _ in await asyncio.gather(*queued)] == [200] * 3

    go(run())


def test_a_long_poll_waits_for_a_change_and_no_longer(idle: AgentProcess) -> None:
    version = idle.idle()["version"]
    assert idle.get(f"/status?since={version - 1}&wait=60")["version"] == version  # there is news already
    assert idle.get(f"/status?since={version}")["version"] == version  # without a wait there is none
    assert idle.get(f"/status?since={version}&wait=0.2")["version"] == version

    async def run() -> None:
        poll = asyncio.create_task(asyncio.to_thread(idle.get, f"/status?since={version}&wait=60"))
        async with session() as client:
            assert (await complete(client, idle.url, ask(1)))[0] == 200
        assert (await poll)["version"] > version

    go(run())


def test_a_hot_prefix_is_reported_and_hit(idle: AgentProcess) -> None:
    prompt = long_words(4)
    first = idle.post("/v1/completions", ask(1, prompt=prompt))[1]["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    full = (first["prompt_tokens"] - 1) // 16 * 16
    before = idle.idle()
    for _ in range(3):
        usage = idle.post("/v1/completions", ask(1, prompt=prompt))[1]["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == full >= 32
    after = idle.idle()
    assert after["prefix_queries"] - before["prefix_queries"] == 3 * first["prompt_tokens"]
    assert after["prefix_hits"] - before["prefix_hits"] == 3 * full
    assert after["hit_rate"] == pytest.approx(after["prefix_hits"] / after["prefix_queries"])
    hot = after["hottest_prefixes"]
    assert [entry["hits"] for entry in hot] == sorted((entry["hits"] for entry in hot), reverse=True)
    assert all(re.fullmatch("[0-9a-f]{32,64}", entry["key"]) and entry["tokens"] % 16 == 0 for entry in hot)
    assert {"hits": 3, "tokens": full} in [{k: e[k] for k in ("hits", "tokens")} for e in hot] or all(
        entry["hits"] > 3 for entry in hot
    )


def test_tenants_and_salts_share_no_prefix(idle: AgentProcess) -> None:
    prompt = long_words(4)

    def cached(salt: dict[str, str], headers: dict[str, str]) -> int:
        status, answer = idle.post("/v1/completions", ask(1, prompt=prompt, **salt), headers)
        assert status == 200, answer
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    owners: list[tuple[dict[str, str], dict[str, str]]] = [
        ({}, {}),
        ({}, {"x-tenant": "a"}),
        ({}, {"x-tenant": "b"}),
        ({"cache_salt": "a"}, {}),
        ({"cache_salt": "s"}, {"x-tenant": "a"}),
    ]
    assert [cached(*owner) for owner in owners] == [0] * 5
    assert all(cached(*owner) >= 32 for owner in owners)


# ── While the engine computes ─────────────────────────────────────────────────────────────────────


def test_the_server_answers_while_the_engine_is_in_the_middle_of_a_step(idle: AgentProcess) -> None:
    async def run() -> None:
        async with session() as client:
            with idle.frozen_engine():
                waiting = asyncio.create_task(complete(client, idle.url, ask(1)))
                await in_flight(idle, 1)
                assert (await asyncio.to_thread(idle.get, "/status"))["commands_pending"] == 1
                for path in ("/healthz", "/readyz", "/metrics", "/v1/models", "/openapi.json"):
                    assert await asyncio.to_thread(idle.code, path) == 200
                status, answer = await asyncio.to_thread(idle.post, "/tokenize", {"prompt": "Hello"})
                assert (status, answer["count"]) == (200, 1)
            assert (await waiting)[0] == 200

    go(run())


def test_a_lower_priority_value_is_served_sooner(idle: AgentProcess) -> None:
    """Each needs all rows, so that they are served one after the other."""
    order: list[int] = []

    async def run() -> None:
        async with session() as client:

            async def one(priority: int) -> None:
                body = ask(1, n=16, priority=priority, prompt="Priority")
                assert (await complete(client, idle.url, body))[0] == 200
                order.append(priority)

            blocker = await stream(client, idle.url, ask(400, n=16))
            tasks = []
            for count, priority in enumerate((5, 0, -5), start=2):
                tasks.append(asyncio.create_task(one(priority)))
                await in_flight(idle, count)
            await status_when(idle, lambda s: s["waiting"] == 3)
            blocker.close()
            await asyncio.gather(*tasks)

    go(run())
    assert order == [-5, 0, 5]


# ── Health and metrics ────────────────────────────────────────────────────────────────────────────


def test_probes(agent: AgentProcess) -> None:
    assert agent.get("/healthz") == agent.get("/readyz") == {"state": "ready"}


def test_request_ids_go_back_to_the_client(agent: AgentProcess) -> None:
    def sent_back(headers: dict[str, str], path: str = "/healthz") -> str:
        request = urllib.request.Request(agent.url + path, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            return str(response.headers["x-request-id"])

    assert sent_back({"x-request-id": "mine-1"}) == "mine-1"
    made = {sent_back({}), sent_back({}), sent_back({"x-request-id": "x" * 129})}
    assert len(made) == 3  # ids of our own, all different
    assert all(re.fullmatch("[0-9a-f]{32}", name) for name in made)


def test_metrics_count_a_request_under_vllms_names(idle: AgentProcess) -> None:
    model = frozenset({("model_name", MODEL)})
    before, status = samples(idle), idle.get("/status")
    prompt = idle.post("/v1/completions", ask(5))[1]["usage"]["prompt_tokens"]
    assert idle.post("/v1/completions", ask(1, ignore_eos=False))[0] == 200
    idle.idle()
    after = samples(idle)

    def grown(name: str, labels: frozenset[tuple[str, str]] = model) -> float:
        return after[name, labels] - before.get((name, labels), 0)

    assert grown("vllm:prompt_tokens_total") == 2 * prompt
    assert 5 <= grown("vllm:generation_tokens_total") <= 6
    assert grown("vllm:time_to_first_token_seconds_count") == 2
    assert grown("vllm:inter_token_latency_seconds_count") == 4
    assert grown("vllm:time_per_output_token_seconds_count") == 4
    assert grown("vllm:e2e_request_latency_seconds_count") == 2
    assert grown("vllm:request_prompt_tokens_sum") == 2 * prompt
    assert grown("vllm:request_generation_tokens_count") == 2
    assert grown("vllm:request_success_total", model | {("finished_reason", "length")}) >= 1
    assert grown("blockyard_steps_total") > 0
    for gauge in (
        "num_requests_running",
        "num_requests_waiting",
        "num_requests_swapped",
        "kv_cache_usage_perc",
    ):
        assert after[f"vllm:{gauge}", model] == 0
    for counter in ("prefix_cache_queries", "prefix_cache_hits", "num_preemptions"):
        assert (f"vllm:{counter}_total", model) in after
    assert after["vllm:cache_config_info", frozenset({("block_size", "16"), ("num_gpu_blocks", "512")})] == 1
    tier = status["device_tier"]
    blocks = [
        after["blockyard_kv_blocks", frozenset({("tier", "device"), ("state", state)})]
        for state in ("free", "cached", "active")
    ]
    assert sum(blocks) == tier["total"]


# ── Memory ────────────────────────────────────────────────────────────────────────────────────────


def resident(pid: int) -> int:
    """Bytes, shared pages counted in shares (proportional set size)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss: +(\d+) kB", text, re.MULTILINE)[1]) << 10  # type: ignore[index]


def test_the_http_process_does_without_torch(agent: AgentProcess) -> None:
    def libraries(pid: int) -> Any:
        return re.findall(r"lib(?:torch|triton|c10)\w*\.so", Path(f"/proc/{pid}/maps").read_text())

    assert libraries(agent.engine_pid())  # so that the check below can fail
    assert not libraries(agent.process.pid)


def test_memory_is_weights_and_pool_and_little_more(idle: AgentProcess) -> None:
    weights = 134_515_008 * 4  # SmolLM2-135M's parameters in fp32
    tier = idle.get("/status")["device_tier"]
    pool = tier["total"] * tier["block_bytes"]
    used = resident(idle.process.pid) + resident(idle.engine_pid())
    assert used <= weights + pool + 1.2 * GIB, f"{used / GIB:.2f} GiB"
