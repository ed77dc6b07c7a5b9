"""``blockyard chat``: a chat in the terminal against any OpenAI server, with speed and cached tokens."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON payloads of a server-sent event stream, up to [DONE]."""
    async for raw in response.content:
        line = raw.decode().strip()
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line[6:])


async def answer(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    messages: list[dict[str, str]],
    options: dict[str, Any],
) -> tuple[str, str]:
    """Stream one answer to the terminal -> (its text, a line about it). RuntimeError if refused."""
    body = {
        "model": model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        **options,
    }
    begin = time.monotonic()
    first = last = 0.0
    text = ""
    usage: dict[str, Any] = {}
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {await response.text()}")
        async for event in events(response):
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                delta = choice["delta"].get("content") or ""
                if delta:
                    last = time.monotonic()
                    first = first or last
                    text += delta
                    print(delta, end="", flush=True)
    tokens = usage.get("completion_tokens", 0)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    rate = (
        f"{(tokens - 1) / (last - first):.1f} tokens/s" if tokens > 1 and last > first else f"{tokens} tokens"
    )
    line = (
        f"{rate}, first after {first - begin:.2f} s, prompt {usage.get('prompt_tokens', '?')} tokens "
        f"of which {cached} cached"
    )
    return text, line


async def chat(url: str, model: str | None, system: str | None, options: dict[str, Any]) -> int:
    """Talk until end of input or Ctrl-D; returns the exit code."""
    url = url.rstrip("/").removesuffix("/v1")
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None, sock_connect=10)) as session:
        try:
            if model is None:
                async with session.get(f"{url}/v1/models") as response:
                    response.raise_for_status()
                    model = (await response.json())["data"][0]["id"]
            assert model is not None
            while (question := await asyncio.to_thread(_ask)) is not None:
                if not question:
                    continue
                messages.append({"role": "user", "content": question})
                try:
                    text, line = await answer(session, url, model, messages, options)
                except RuntimeError as error:
                    print(f"\n{error}", file=sys.stderr)
                    messages.pop()
                    continue
                messages.append({"role": "assistant", "content": text})
                print(f"\n  [{line}]" if sys.stdout.isatty() else f"\n[{line}]", flush=True)
        except aiohttp.ClientError as error:
            print(f"blockyard chat: {url} does not answer: {error}", file=sys.stderr)
            return 1
    return 0


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
