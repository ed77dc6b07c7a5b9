"""What it brings to choose agents by what they have cached: the routing part of ``gateway.py``."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import report
from chat_load import WORDS, Sample, ask, chat_body, session, tail

if TYPE_CHECKING:
    import aiohttp

    from tests.agent.process import AgentProcess

ROUTES = ("round_robin", "gateway")


async def converse(
    client: aiohttp.ClientSession, url: Callable[[], str], number: int, salt: str, options: argparse.Namespace
) -> list[Sample]:
    """One conversation: its turns and pauses are the same in every run."""
    system = random.Random(number % options.systems)
    rng = random.Random(f"conversation {number}")
    text = " ".join(system.choices(WORDS, k=options.system_words))
    messages = [{"role": "system", "content": text}]
    samples = []
    for turn in range(options.turns):
        await asyncio.sleep(options.pause * rng.uniform(0.5 if turn else 0.0, 1.5 if turn else 1.0))
        messages.append({"role": "user", "content": " ".join(rng.choices(WORDS, k=options.turn_words))})
        sample = await ask(client, url(), chat_body(messages, options.answer_tokens, cache_salt=salt))
        assert sample.status == 200, sample
        messages.append({"role": "assistant", "content": sample.text})
        samples.append(sample)
    return samples


async def one_run(
    agents: Sequence[AgentProcess], url: Callable[[], str], salt: str, options: argparse.Namespace
) -> dict[str, Any]:
    """All conversations at once."""
    before = [agent.idle() for agent in agents]
    begin = time.perf_counter()
    async with session() as client:
        talks = [converse(client, url, number, salt, options) for number in range(options.conversations)]
        samples = [sample for talk in await asyncio.gather(*talks) for sample in talk]
    took = time.perf_counter() - begin
    after = [agent.idle() for agent in agents]
    looked_up, found = (
        [new[name] - old[name] for old, new in zip(before, after, strict=True)]
        for name in ("prefix_queries", "prefix_hits")
    )
    return {
        "seconds": took,
        "hit_rate": sum(found) / sum(looked_up),
        "prompt_tokens": sum(looked_up),
        "computed_tokens": sum(looked_up) - sum(found),
        "looked_up_by_agent": looked_up,
        "first_token_s": [sample.first for sample in samples],
    }


def routing(agents: Sequence[AgentProcess], gateway: str, options: argparse.Namespace) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {route: [] for route in ROUTES}
    turn = itertools.cycle([agent.url for agent in agents])
    urls: dict[str, Callable[[], str]] = {"round_robin": lambda: next(turn), "gateway": lambda: gateway}
    for number in range(options.rounds):
        for route in ROUTES if number % 2 else ROUTES[::-1]:
            salt = f"{route} {number}"
            runs[route].append(asyncio.run(one_run(agents, urls[route], salt, options)))
    names = ("systems", "system_words", "conversations", "turns", "turn_words", "answer_tokens", "pause")
    found: dict[str, Any] = {name: getattr(options, name) for name in (*names, "kv_blocks")}
    for route in ROUTES:
        found[route] = {
            **{
                name: report.spread([run[name] for run in runs[route]])
                for name in ("hit_rate", "prompt_tokens", "computed_tokens", "seconds")
            },
            "looked_up_by_agent": [run["looked_up_by_agent"] for run in runs[route]],
            "first_token_s": tail([first for run in runs[route] for first in run["first_token_s"]]),
            "first_token_p50_s": report.spread(
                [statistics.median(run["first_token_s"]) for run in runs[route]]
            ),
        }
    pairs = list(zip(*(runs[route] for route in ROUTES), strict=True))
    medians = [[statistics.median(run["first_token_s"]) for run in pair] for pair in pairs]
    found["ratio"] = {
        "computed_tokens": report.spread([a["computed_tokens"] / b["computed_tokens"] for a, b in pairs]),
        "first_token_p50": report.spread([plain / routed for plain, routed in medians]),
    }
    return found


def show_routing(found: dict[str, Any]) -> None:
    print("\n| | hit rate (min to max) | prompt tokens computed | TTFT p50, p99 (s) |\n|---|---|---|---|")
    for route in ROUTES:
        row = found[route]
        rate, computed, first = row["hit_rate"], row["computed_tokens"], row["first_token_s"]
        print(
            f"| {route.replace('_', '-')} | {rate['median']:.0%} ({rate['min']:.0%} to {rate['max']:.0%}) "
            f"| {computed['median']:.0f} of {row['prompt_tokens']['median']:.0f} "
            f"| {first['p50']:.3f}, {first['p99']:.3f} |"
        )
    cells = [
        f"**{one['median']:.1f}** ({one['min']:.1f} to {one['max']:.1f})" for one in found["ratio"].values()
    ]
    print(f"| ratio (min to max) | | {cells[0]} | p50 {cells[1]} |", flush=True)
