"""A running agent under Poisson arrivals: ``python benchmarks/serve.py``.

Starts an agent (or takes ``--url``), then sends chat requests with exponentially distributed gaps at
several rates, each for a fixed time, and measures as a client sees it: time to first token (TTFT), time per
output token after the first (TPOT), end-to-end latency, and goodput: requests a second whose TTFT and TPOT
both keep the limits. The number of requests is bounded by rate and time; arrivals do not wait for answers.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from dataclasses import dataclass
from typing import Any

import report
from chat_load import MODEL, WORDS, Sample, ask, chat_body, session, tail
from proc import resident_mib

SYSTEM = "You are a helpful assistant. Answer in full sentences, explain your reasons, and stay polite. " * 4
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must keep to count as good, in seconds."""

    first: float
    per_token: float


def question(rng: random.Random) -> dict[str, Any]:
    """A chat request: a shared system prompt, words of its own, 16 to 128 tokens of answer."""
    words = " ".join(rng.choices(WORDS, k=rng.randint(8, 200)))
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": words}]
    return chat_body(messages, rng.randint(16, 128))


async def load(url: str, rate: float, seconds: float, limits: Limits) -> dict[str, Any]:
    """Poisson arrivals at ``rate`` a second for ``seconds``, then wait for the last answer."""
    rng = random.Random(f"{rate}")
    async with session() as client:
        begin = time.perf_counter()
        tasks: list[asyncio.Task[Sample]] = []
        arrival = rng.expovariate(rate)
        while arrival < seconds:
            await asyncio.sleep(max(0.0, begin + arrival - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(client, url, question(random.Random(rng.random())))))
            arrival += rng.expovariate(rate)
        samples = await asyncio.gather(*tasks)
        duration = time.perf_counter() - begin
    served = [s for s in samples if s.status == 200]
    good = [s for s in served if s.first <= limits.first and s.per_token <= limits.per_token]

    return {
        "rate": rate,
        "requests": len(samples),
        "refused": sum(s.status == 429 for s in samples),
        "failed": sum(s.status not in (200, 429) for s in samples),
        "output_tokens_per_s": sum(s.tokens for s in served) / duration,
        "ttft_s": tail([s.first for s in served]),
        "tpot_s": tail([s.per_token for s in served if s.tokens > 1]),
        "latency_s": tail([s.total for s in served]),
        "goodput": len(good) / duration,
        "good_share": len(good) / max(1, len(samples)),
    }


async def start() -> tuple[Process, str, float]:
    """An agent that is ready, its address, and how long it took from the start to a first token."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "blockyard.cli", "agent", "--model", MODEL, "--port", "0"]
    agent = await asyncio.create_subprocess_exec(*command, "--kv-bytes", str(1 << 30), stdout=PIPE)
    assert agent.stdout is not None
    url = ""
    async for raw in agent.stdout:
        line = raw.decode()
        if match := re.search(r"(http://\S+) is loading", line):
            url = match[1]
        if "ready," in line:
            break
    async with session() as client:
        sample = await ask(client, url, question(random.Random(0)))
        return agent, url, time.perf_counter() - begin - sample.total + sample.first


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="an agent that is running already")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0], help="requests a second"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals at each rate")
    parser.add_argument("--ttft", type=float, default=2.0, help="limit of a good request, seconds")
    parser.add_argument("--tpot", type=float, default=0.2, help="limit of a good request, seconds")
    arguments = parser.parse_args()
    limits = Limits(arguments.ttft, arguments.tpot)
    agent: Process | None = None
    url, start_seconds = arguments.url, None
    if url is None:
        agent, url, start_seconds = await start()
        print(f"from start to first token: {start_seconds:.1f} s\n")
    rows = []
    memory: dict[str, float] = {}
    try:
        print(
            "| rate | requests | refused | TTFT p50, p99 (s) | TPOT p50, p99 (ms) | tok/s | goodput | good |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for rate in arguments.rates:
            row = await load(url, rate, arguments.seconds, limits)
            rows.append(row)
            ttft, tpot = row["ttft_s"], row["tpot_s"]
            print(
                f"| {rate:g} | {row['requests']} | {row['refused']} | {ttft['p50']:.2f}, {ttft['p99']:.2f} "
                f"| {1e3 * tpot['p50']:.0f}, {1e3 * tpot['p99']:.0f} | {row['output_tokens_per_s']:.0f} "
                f"| {row['goodput']:.2f}/s | {row['good_share']:.0%} |",
                flush=True,
            )
        async with session() as client, client.get(f"{url}/status") as response:
            status = await response.json()
        if agent is not None:
            tier = status["device_tier"]
            memory = {
                "resident_mib": resident_mib(agent.pid),
                "kv_pool_mib": tier["total"] * tier["block_bytes"] / MIB,
                "weights_mib": status_weights_mib(),
            }
            memory["beyond_weights_and_pool_mib"] = (
                memory["resident_mib"] - memory["weights_mib"] - memory["kv_pool_mib"]
            )
            print("\n" + ", ".join(f"{name} {value:.0f}" for name, value in memory.items()))
    finally:
        if agent is not None and agent.returncode is None:
            agent.send_signal(signal.SIGTERM)
            await asyncio.wait_for(agent.wait(), 60)
    print(f"good: first token within {limits.first:g} s and {1e3 * limits.per_token:g} ms a token")
    report.save(
        "serve-cpu",
        {
            "model": MODEL,
            "limits": {"ttft_s": limits.first, "tpot_s": limits.per_token},
            "start_to_first_token_s": start_seconds,
            "memory": memory,
            "rates": rows,
        },
    )


def status_weights_mib() -> float:
    """Bytes of the prepared checkpoint, which is float32 as it is served."""
    from blockyard.engine.model.files import prepare

    return sum(path.stat().st_size for path in prepare(MODEL).glob("*.safetensors")) / MIB


if __name__ == "__main__":
    asyncio.run(main())
