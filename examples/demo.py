"""Serve a real model on this machine, ask it a few things that share a system prompt, look at its KV pool.

    python examples/demo.py

Starts ``blockyard agent`` as any user would and talks to it with the official OpenAI client. The first
question computes the system prompt's KV; those after it find its blocks in the prefix cache.
"""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from typing import Any

import aiohttp
import openai

MODEL = "SmolLM2-135M-Instruct"
SYSTEM = (
    "You are the assistant of a small public library. You answer visitors in one or two short and friendly "
    "sentences. You know the opening hours: Monday to Friday from nine to six, Saturday from ten to two, and "
    "closed on Sunday. Books may be kept for three weeks, and films for one week. A library card is free."
)
QUESTIONS = (
    "When are you open?",
    "How long may I keep a book?",
    "What does a library card cost?",
    "Can you recommend a book about the sea?",
)
STOP_TIMEOUT = 60.0


async def start() -> tuple[Process, str]:
    """The agent, ready for requests, and its address."""
    command = [sys.executable, "-m", "blockyard.cli", "agent", "--model", MODEL, "--port", "0"]
    agent = await asyncio.create_subprocess_exec(*command, stdout=PIPE)
    assert agent.stdout is not None
    url = ""
    async for raw in agent.stdout:
        line = raw.decode().rstrip()
        print(line, flush=True)
        if match := re.search(r"(http://\S+) is loading", line):
            url = match[1]
        if "ready," in line:
            return agent, url
    raise SystemExit(f"the agent ended with exit code {await agent.wait()}")


async def ask(client: openai.AsyncOpenAI, question: str, *, live: bool) -> None:
    """Stream one answer; ``live`` prints it as it comes, otherwise when it is whole."""
    begin = time.monotonic()
    first = 0.0
    text, usage = "", None
    if live:
        print(f"\n\033[1m{question}\033[0m\n  ", end="")
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
        temperature=0,
        max_tokens=64,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            piece = choice.delta.content or ""
            if piece and not first:
                first = time.monotonic() - begin
            text += piece
            if live:
                print(piece, end="", flush=True)
    assert usage is not None
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    head = "" if live else f"\n\033[1m{question}\033[0m\n  {text}"
    print(
        f"{head}\n  \033[2m{usage.completion_tokens} tokens, the first after {first:.2f} s; "
        f"{cached} of {usage.prompt_tokens} prompt tokens came from the prefix cache\033[0m"
    )


def describe(status: dict[str, Any]) -> str:
    """The block pool in two lines."""
    tier = status["device_tier"]
    size = tier["total"] * tier["block_bytes"] / 2**20
    return (
        f"KV pool: {tier['total']} blocks of {status['block_tokens']} tokens ({size:.0f} MiB): {tier['free']} free, "
        f"{tier['cached']} cached, {tier['active']} active\n"
        f"prefix cache: {status['prefix_hits']} of {status['prefix_queries']} prompt tokens found, "
        f"hit rate {status['hit_rate']:.0%}; {status['generated_tokens']} tokens generated in {status['steps']} steps"
    )


async def main() -> int:
    agent, url = await start()
    try:
        async with (
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client,
            aiohttp.ClientSession() as session,
        ):
            await ask(client, QUESTIONS[0], live=True)
            print("\n\033[2mthe others all at once, in one batch:\033[0m")
            await asyncio.gather(*(ask(client, question, live=False) for question in QUESTIONS[1:]))
            async with session.get(f"{url}/status") as response:
                print(f"\n{describe(await response.json())}")
    finally:
        if agent.returncode is None:
            agent.send_signal(signal.SIGTERM)
        code = await asyncio.wait_for(agent.wait(), STOP_TIMEOUT)
    print(f"agent stopped, exit code {code}\n\ntalk to it yourself:")
    print(f"  .venv/bin/blockyard agent --model {MODEL}     and in another terminal     .venv/bin/blockyard chat")
    return code


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
