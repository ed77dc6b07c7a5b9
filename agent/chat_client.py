"""``blockyard chat``: a chat in the terminal against any OpenAI server, with speed and cached tokens.

Questions are read in the main thread, outside of any event loop, so that Ctrl-C ends the reading at once
and, while an answer comes, cancels that answer alone.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

CONNECT_TIMEOUT = 10.0  # seconds
SILENCE_TIMEOUT = 600.0  # seconds without a byte; a busy server may queue a question for long


class Refused(Exception):
    """The server answered, but not with what was asked for."""


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON payloads of a server-sent event stream, up to [DONE]."""
    async for raw in response.content:
        line = raw.decode().strip()
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line[6:])


def _session() -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=SILENCE_TIMEOUT)
    return aiohttp.ClientSession(timeout=timeout)


async def first_model(url: str) -> str:
    """The name of the first model that the server has."""
    async with _session() as session, session.get(f"{url}/v1/models") as response:
        if response.status != 200:
            raise Refused(f"{url}/v1/models: {response.status}: {await response.text()}")
        try:
            return str((await response.json())["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError, aiohttp.ContentTypeError):
            raise Refused(f"{url}/v1/models is no list of models; is this an OpenAI server?") from None


async def answer(
    url: str, model: str, messages: list[dict[str, str]], options: dict[str, Any]
) -> tuple[str, str]:
    """Stream one answer to the terminal -> (its text, a line about it)."""
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
    async with _session() as session, session.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            raise Refused(_message(response.status, await response.text()))
        async for event in events(response):
            if "error" in event:
                raise Refused(event["error"]["message"])
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
    count = f"{tokens} token" if tokens == 1 else f"{tokens} tokens"
    rate = f"{count}, {(tokens - 1) / (last - first):.1f} tokens/s" if tokens > 1 and last > first else count
    waited = f", first after {first - begin:.2f} s" if first else ""
    prompt = f"prompt {usage.get('prompt_tokens', '?')} tokens of which {cached} cached"
    return text, f"{rate}{waited}, {prompt}"


def _message(status: int, body: str) -> str:
    """What an error in OpenAI's shape says; the body as it is if it has another one."""
    try:
        return f"{status}: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{status}: {body}"


def chat(url: str, model: str | None, system: str | None, options: dict[str, Any]) -> int:
    """Talk until end of input, Ctrl-D or Ctrl-C; returns the exit code, 1 if a question got no answer.

    At a terminal a question that failed can be asked again, so there only a server that is gone counts.
    """
    url = url.rstrip("/").removesuffix("/v1")
    interactive = sys.stdin.isatty()
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    code = 0
    try:
        if model is None:
            model = asyncio.run(first_model(url))
        while (question := _ask(interactive=interactive)) is not None:
            if not question:
                continue
            messages.append({"role": "user", "content": question})
            try:
                text, line = asyncio.run(answer(url, model, messages, options))
            except Refused as error:
                print(f"\nblockyard chat: {error}", file=sys.stderr)
                messages.pop()
                code = 0 if interactive else 1
            except KeyboardInterrupt:
                if not interactive:
                    raise
                print("\n[cancelled]", flush=True)
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": text})
                print(f"\n[{line}]", flush=True)
    except Refused as error:
        print(f"blockyard chat: {error}", file=sys.stderr)
        return 1
    except (aiohttp.ClientError, TimeoutError) as error:
        print(f"\nblockyard chat: {url} does not answer: {error or type(error).__name__}", file=sys.stderr)
        return 1
    return code


def _ask(*, interactive: bool) -> str | None:
    try:
        return input("> " if interactive else "").strip()
    except EOFError:
        return None
