"""One streamed chat request as its client sees it: what the benchmarks of servers have in common."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import report

from blockyard.agent.chat_client import events

MODEL = "SmolLM2-135M-Instruct"
WORDS = [
    "river",
    "window",
    "seven",
    "cloud",
    "garden",
    "letter",
    "music",
    "winter",
    "silver",
    "engine",
    "market",
    "story",
    "paper",
    "mountain",
]
REQUEST_TIMEOUT = 600.0


@dataclass(slots=True)
class Sample:
    """Seconds of one request, its tokens, its HTTP status and the text of its answer."""

    first: float
    total: float
    tokens: int
    status: int
    text: str = ""

    @property
    def per_token(self) -> float:
        return (self.total - self.first) / max(1, self.tokens - 1)


def session() -> aiohttp.ClientSession:
    """A client that holds no request back."""
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT)
    return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))


def chat_body(messages: list[dict[str, str]], max_tokens: int, **more: Any) -> dict[str, Any]:
    """A greedy request for exactly so many tokens, streamed."""
    return {
        "model": MODEL,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }


async def ask(client: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Sample:
    begin = time.perf_counter()
    first, tokens, text = 0.0, 0, ""
    async with client.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status == 200:
            async for event in events(response):
                new = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                text += new
                if new and not first:
                    first = time.perf_counter() - begin
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
    return Sample(first, time.perf_counter() - begin, tokens, response.status, text)


def tail(values: Sequence[float]) -> dict[str, float]:
    return {"p50": report.percentile(values, 0.5), "p99": report.percentile(values, 0.99)}
