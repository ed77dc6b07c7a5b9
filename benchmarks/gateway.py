"""What a gateway costs and what it brings: ``python benchmarks/gateway.py``.

Three parts, each with both sides in turn in one run:

- *overhead*: one request at a time, straight to an agent and through a gateway. The agent is once a simulated
  one that answers at once, so that nothing but the gateway is measured, and once a real one.
- *capacity*: more and more clients at the simulated agent until one gateway process on a core of its own
  carries no more; its CPU time is read from /proc. The load generator and the agent share the other cores,
  and the side without the gateway shows what they could carry.
- *routing*: conversations over shared system prompts at two real agents whose pools are too small for all
  of them, through the gateway and round-robin. Each run has a salt of its own, so that no run finds
  anything that another one has cached.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import report
from chat_load import Sample, chat_body, tail
from gateway_routing import routing, show_routing
from proc import cpu_seconds
from raw_client import Connection, post
from simulated_agent import STEP

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.agent.gateway.process import GatewayProcess, all_ready  # noqa: E402 -- as the tests run them
from tests.agent.process import AgentProcess  # noqa: E402

SIDES = ("direct", "gateway")
NO_MORE = 1.05  # the capacity is reached when more clients twice bring less than this factor
MS = 1e3


def simulated_agent(stack: contextlib.ExitStack) -> tuple[str, int]:
    """(address, process id) of one that ends with the stack."""
    command = [sys.executable, str(Path(__file__).with_name("simulated_agent.py"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    assert process.stdout is not None
    return process.stdout.readline().strip(), process.pid


def start_gateway(stack: contextlib.ExitStack, folder: Path, agents: dict[str, str]) -> GatewayProcess:
    gateway = GatewayProcess(folder, agents)
    stack.callback(gateway.stop)
    asyncio.run(until_ready(gateway, agents))
    return gateway


async def until_ready(gateway: GatewayProcess, agents: dict[str, str]) -> None:
    async with aiohttp.ClientSession() as client:
        await all_ready(client, gateway.url, *agents)


def short_body(tokens: int) -> dict[str, Any]:
    return chat_body([{"role": "user", "content": "Name three rivers."}], tokens)


# ── Overhead ──────────────────────────────────────────────────────────────────────────────────────────


async def overhead(urls: dict[str, str], tokens: int, pairs: int, rounds: int) -> dict[str, Any]:
    """Pairs of requests, one to each side; the side that begins alternates."""
    connections = {side: await Connection.open(url) for side, url in urls.items()}
    requests = {side: post(url, short_body(tokens)) for side, url in urls.items()}
    samples: dict[str, list[Sample]] = {side: [] for side in SIDES}
    for number in range(-2, pairs):
        for side in SIDES if number % 2 else SIDES[::-1]:
            sample = await connections[side].ask(requests[side], tokens)
            if number >= 0:  # those before warm up
                samples[side].append(sample)
    for connection in connections.values():
        connection.close()
    found: dict[str, Any] = {"tokens": tokens, "pairs": pairs}
    measures: dict[str, Callable[[Sample], float]] = {
        "first_token": lambda sample: MS * sample.first,
        "end": lambda sample: MS * sample.total,
    }
    if tokens > 1:
        measures["per_token"] = lambda sample: MS * sample.per_token
    for name, measure in measures.items():
        values = {side: [measure(sample) for sample in samples[side]] for side in SIDES}
        added = [through - direct for direct, through in zip(*values.values(), strict=True)]
        tails = {side: tail(values[side]) for side in SIDES}
        found[f"{name}_ms"] = {
            **tails,
            "added_p50": report.spread([statistics.median(part) for part in parts(added, rounds)]),
            "added_p99": tails["gateway"]["p99"] - tails["direct"]["p99"],
        }
    return found


def parts(values: Sequence[float], count: int) -> list[Sequence[float]]:
    size = max(1, len(values) // count)
    return [values[begin : begin + size] for begin in range(0, size * count, size) if values[begin:]]


def show_overhead(found: dict[str, list[dict[str, Any]]]) -> None:
    print("\n| agent | answer | | direct p50, p99 (ms) | gateway p50, p99 | added p50 (min to max), p99 |")
    print("|---|---|---|---|---|---|")
    for agent, rows in found.items():
        for row in rows:
            for name in ("first_token", "end", "per_token"):
                if cell := row.get(f"{name}_ms"):
                    direct, through, added = cell["direct"], cell["gateway"], cell["added_p50"]
                    print(
                        f"| {agent} | {row['tokens']} | {name.replace('_', ' ')} "
                        f"| {direct['p50']:.2f}, {direct['p99']:.2f} "
                        f"| {through['p50']:.2f}, {through['p99']:.2f} "
                        f"| **{added['median']:.2f}** ({added['min']:.2f} to {added['max']:.2f}), "
                        f"{cell['added_p99']:.2f} |",
                        flush=True,
                    )


# ── Capacity ──────────────────────────────────────────────────────────────────────────────────────────


async def closed_loop(
    url: str, tokens: int, clients: int, seconds: float, pid: int
) -> tuple[list[Sample], float, float]:
    """So many clients, each with one request at a time -> (samples, requests/s, share of a core of ``pid``).

    All are of ``seconds`` in the middle, when all clients are at work and at different places of a stream.
    """
    connections = [await Connection.open(url) for _ in range(clients)]
    request, samples, stop = post(url, short_body(tokens)), [], False
    lead = max(0.1, (tokens - 1) * STEP)

    async def client(number: int, connection: Connection) -> None:
        await asyncio.sleep(lead * number / clients)
        while not stop:
            samples.append(await connection.ask(request, tokens))

    tasks = [asyncio.create_task(client(*one)) for one in enumerate(connections)]
    await asyncio.sleep(lead)
    begin, skip, cpu = time.perf_counter(), len(samples), cpu_seconds(pid)
    await asyncio.sleep(seconds)
    cpu, middle, stop = cpu_seconds(pid) - cpu, samples[skip:], True
    took = time.perf_counter() - begin
    await asyncio.gather(*tasks)
    for connection in connections:
        connection.close()
    return middle, len(middle) / took, cpu / took


async def capacity(
    urls: dict[str, str], pid: int, tokens: int, levels: Sequence[int], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each number of clients, up to the one with which the gateway carries no more."""
    rows: list[dict[str, Any]] = []
    for clients in levels:
        rates: dict[str, list[float]] = {side: [] for side in SIDES}
        samples: dict[str, list[Sample]] = {side: [] for side in SIDES}
        cpu: dict[str, list[float]] = {side: [] for side in SIDES}
        for number in range(options.rounds):
            for side in SIDES if number % 2 else SIDES[::-1]:
                new, rate, share = await closed_loop(urls[side], tokens, clients, options.seconds, pid)
                samples[side] += new
                rates[side].append(rate)
                cpu[side].append(share)
        rows.append(
            {
                "clients": clients,
                "tokens": tokens,
                **{f"{side}_requests_per_s": report.spread(rates[side]) for side in SIDES},
                **{
                    f"{side}_first_token_ms": tail([MS * sample.first for sample in samples[side]])
                    for side in SIDES
                },
                **{
                    f"{side}_per_token_ms": tail([MS * sample.per_token for sample in samples[side]])
                    for side in SIDES
                    if tokens > 1
                },
                "gateway_cpu_share": statistics.mean(cpu["gateway"]),
                "gateway_cpu_share_idle": statistics.mean(cpu["direct"]),
                "gateway_cpu_ms_per_request": MS * sum(cpu["gateway"]) / max(1e-9, sum(rates["gateway"])),
            }
        )
        carried = [row["gateway_requests_per_s"]["median"] for row in rows]
        if len(rows) > 2 and max(carried[-2:]) < NO_MORE * max(carried[:-2]):
            break
    return rows


def show_capacity(rows: Sequence[dict[str, Any]]) -> None:
    print(
        "\n| clients | tokens | direct requests/s | gateway requests/s (min to max) | tokens/s "
        "| first token p50, p99 (ms) | per token p50, p99 (ms; direct) | CPU | CPU ms/request | µs/token |"
    )
    print("|---" * 10 + "|")
    for row in rows:
        rate, first = row["gateway_requests_per_s"], row["gateway_first_token_ms"]
        pace, plain = row.get("gateway_per_token_ms"), row.get("direct_per_token_ms")
        per_token = f"{pace['p50']:.1f}, {pace['p99']:.1f} ({plain['p50']:.1f})" if pace and plain else ""
        cost = f"{row['gateway_cpu_us_per_token']:.0f}" if "gateway_cpu_us_per_token" in row else ""
        print(
            f"| {row['clients']} | {row['tokens']} | {row['direct_requests_per_s']['median']:.0f} "
            f"| **{rate['median']:.0f}** ({rate['min']:.0f} to {rate['max']:.0f}) "
            f"| {rate['median'] * row['tokens']:.0f} | {first['p50']:.1f}, {first['p99']:.1f} | {per_token} "
            f"| {row['gateway_cpu_share']:.0%} | {row['gateway_cpu_ms_per_request']:.2f} | {cost} |",
            flush=True,
        )


# ── The run ───────────────────────────────────────────────────────────────────────────────────────────


def with_simulated_agent(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        url, agent = simulated_agent(stack)
        gateway = start_gateway(stack, folder, {"simulated": url})
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > 1:
            stack.callback(os.sched_setaffinity, 0, cores)
            for pid in (0, agent):
                os.sched_setaffinity(pid, cores[:-1])
            os.sched_setaffinity(gateway.process.pid, cores[-1:])
        urls = {"direct": url, "gateway": gateway.url}
        alone = [
            asyncio.run(overhead(urls, 1, 10 * options.pairs, options.rounds)),
            asyncio.run(overhead(urls, options.tokens, options.pairs // 8, options.rounds)),
        ]
        levels = [1 << power for power in range(options.most.bit_length()) if 1 << power <= options.most]
        pid = gateway.process.pid
        short = asyncio.run(capacity(urls, pid, 1, levels, options))
        long = asyncio.run(capacity(urls, pid, options.tokens, levels[5:] or levels[-1:], options))
    per_request = min(row["gateway_cpu_ms_per_request"] for row in short)
    for row in long:
        beyond_first = row["gateway_cpu_ms_per_request"] - per_request
        row["gateway_cpu_us_per_token"] = 1e3 * beyond_first / (options.tokens - 1)
    return {"overhead": alone, "capacity": [*short, *long]}


def with_real_agents(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        agents = []
        for number in range(2):
            (place := folder / f"agent-{number}").mkdir()
            agents.append(AgentProcess(place, "--kv-blocks", str(options.kv_blocks)))
            stack.callback(agents[-1].stop)
        gateway = start_gateway(stack, folder, {"a": agents[0].url})
        urls = {"direct": agents[0].url, "gateway": gateway.url}
        found: dict[str, Any] = {
            "overhead": [
                asyncio.run(overhead(urls, 1, options.pairs, options.rounds)),
                asyncio.run(overhead(urls, options.tokens, options.pairs // 10, options.rounds)),
            ]
        }
        both = {"a": agents[0].url, "b": agents[1].url}
        gateway.set_agents(both)
        asyncio.run(until_ready(gateway, both))
        agents[1].post("/v1/chat/completions", {**short_body(1), "stream": False, "stream_options": None})
        found["routing"] = routing(agents, gateway.url, options)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=200, help="of short requests at the real agent")
    parser.add_argument("--tokens", type=int, default=32, help="of a long answer")
    parser.add_argument("--rounds", type=int, default=3, help="times that both sides take turns")
    parser.add_argument("--seconds", type=float, default=1.0, help="of load in a round of the capacity part")
    parser.add_argument("--most", type=int, default=512, help="clients in the capacity part")
    parser.add_argument("--kv-blocks", type=int, default=160, help="of 16 tokens, of each real agent")
    parser.add_argument("--systems", type=int, default=5, help="system prompts")
    parser.add_argument("--system-words", type=int, default=300)
    parser.add_argument("--conversations", type=int, default=10)
    parser.add_argument("--turns", type=int, default=4, help="of each conversation")
    parser.add_argument("--turn-words", type=int, default=25)
    parser.add_argument("--answer-tokens", type=int, default=8)
    parser.add_argument("--pause", type=float, default=4.0, help="mean seconds between turns")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        simulated = with_simulated_agent(Path(folder) / "simulated", options)
        show_capacity(simulated["capacity"])
        real = with_real_agents(Path(folder), options)
    found = {
        "overhead": {"simulated": simulated["overhead"], "real": real["overhead"]},
        "capacity": simulated["capacity"],
        "routing": real["routing"],
    }
    show_overhead(found["overhead"])
    show_routing(found["routing"])
    report.save("gateway", found)


if __name__ == "__main__":
    main()
