"""Clients that keep an agent busy, by plain HTTP, so that tests control every byte and connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

import aiohttp

from .process import MODEL, AgentProcess

LONG = 3000  # tokens; far more than are computed during a test, so that only the test ends such a request


def ask(tokens: int, **more: Any) -> dict[str, Any]:
    """A request of exactly so many tokens."""
    return {"model": MODEL, "prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True, **more}


def session() -> aiohttp.ClientSession:
    """Without a limit on connections, and with one on time, so that a test that hangs fails."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=240)
    )


async def complete(client: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[int, Any]:
    """(status, answer) of a completion that does not stream."""
    async with client.post(f"{url}/v1/completions", json=body) as response:
        return response.status, await response.json()


async def stream(client: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> aiohttp.ClientResponse:
    """A stream that has begun, at its first event."""
    response = await client.post(f"{url}/v1/completions", json={**body, "stream": True})
    assert response.status == 200, await response.text()
    return response


async def events(response: aiohttp.ClientResponse) -> list[Any]:
    """The rest of a stream; its last item is "[DONE]" if it came to its proper end."""
    lines = (await response.text()).split("\n\n")
    data = [line.removeprefix("data: ") for line in lines if line]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


async def status_when(agent: AgentProcess, predicate: Any) -> dict[str, Any]:
    return await asyncio.to_thread(agent.status_when, predicate)


async def in_flight(agent: AgentProcess, count: int) -> None:
    """Until the agent holds so many requests."""
    await status_when(agent, lambda status: status["in_flight"] == count)


def go(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)
