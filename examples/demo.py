"""Run an LLMService on this machine, ask it things that share a system prompt, and kill an agent meanwhile.

    python examples/demo.py

Starts ``blockyard up examples/cpu.yaml`` as any user would: two agents and a gateway. Talks to it with the
official OpenAI client. The first question computes the system prompt's KV; those after it find its blocks in
the prefix cache of the agent that has it. Then one agent is killed while both decode, and no request fails.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from pathlib import Path
from typing import Any

import openai
from rich.console import Console

MANIFEST = Path(__file__).with_name("cpu.yaml")
SERVICE = "smollm"
SYSTEM = (
    "You are a helpful teacher in a small school. You answer the questions of curious children in one or two "
    "short, correct and friendly sentences, without long words, and you never make anything up. When you do "
    "not know something, you say so. Today's lesson is about the world and how it works."
)
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "What do plants need to grow?",
    "How many legs does a spider have?",
)
START_TIMEOUT = 600.0  # seconds; the first time, the model is fetched and the kernels are built
console = Console(highlight=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def state() -> dict[str, Any]:
    """What the local runtime says of itself; {} while it is not there."""
    from blockyard.operator.terminal import runs_folder

    try:
        return dict(json.loads((runs_folder() / SERVICE / "state.json").read_text()))
    except (OSError, ValueError):
        return {}


async def ready(runtime: Process) -> None:
    """Wait until both agents answer."""
    deadline = time.monotonic() + START_TIMEOUT
    while state().get("service", {}).get("status", {}).get("readyReplicas") != 2:
        if runtime.returncode is not None or time.monotonic() > deadline:
            raise SystemExit("the service did not become ready; its logs are in ~/.cache/blockyard/run")
        await asyncio.sleep(0.2)


async def ask(client: openai.AsyncOpenAI, question: str, *, live: bool = False, tokens: int = 48) -> str:
    """Stream one answer; ``live`` prints it as it comes."""
    begin = time.monotonic()
    first, text, usage = 0.0, "", None
    if live:
        console.print(f"\n[bold]{question}[/]\n  ", end="")
    raw = await client.chat.completions.with_raw_response.create(
        model=SERVICE,
        messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
        temperature=0,
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in raw.parse():
        usage = chunk.usage or usage
        for choice in chunk.choices:
            piece = choice.delta.content or ""
            if piece and not first:
                first = time.monotonic() - begin
            text += piece
            if live:
                console.out(piece, end="")
    assert usage is not None, "the stream ended without its last event"
    agent = raw.headers.get("x-blockyard-agent")
    details = usage.prompt_tokens_details
    cached = details.cached_tokens if details else 0
    head = "" if live else f"\n[bold]{question}[/]\n  {text}"
    console.print(
        f"{head}\n  [dim]{usage.completion_tokens} tokens by {agent}, the first "
        f"after {first:.2f} s; {cached} of {usage.prompt_tokens} prompt tokens from the prefix cache[/]",
        soft_wrap=True,
    )
    return text


async def kill_one_under_load(client: openai.AsyncOpenAI) -> None:
    """Eight answers at once; an agent dies in the middle of them."""
    before = await asyncio.gather(*(plain(client, number) for number in range(8)))
    victim, pid = next(iter(state()["agents"].items()))
    requests = [asyncio.create_task(plain(client, number)) for number in range(8)]
    await asyncio.sleep(0.5)
    os.kill(pid, signal.SIGKILL)
    after = await asyncio.gather(*requests, return_exceptions=True)
    failed = [each for each in after if isinstance(each, BaseException)]
    equal = sum(a == b for a, b in zip(before, after, strict=True))
    console.print(
        f"\n[bold]{victim} (pid {pid}) was killed while 8 answers were being written:[/] "
        f"{len(failed)} requests failed, {equal} of 8 answers are the same as without the kill",
        soft_wrap=True,
    )
    if failed:
        raise SystemExit(f"a request failed: {failed[0]!r}")


async def plain(client: openai.AsyncOpenAI, number: int) -> str:
    """A greedy answer, streamed and put together."""
    stream = await client.completions.create(
        model=SERVICE,
        prompt=f"The history of the number {number} begins",
        max_tokens=64,
        temperature=0,
        stream=True,
    )
    return "".join([choice.text async for chunk in stream for choice in chunk.choices])


async def main() -> int:
    port = free_port()
    command = [sys.executable, "-m", "blockyard.cli"]
    console.print(f"[dim]$ blockyard up {MANIFEST.parent.name}/{MANIFEST.name} --port {port}[/]")
    runtime = await asyncio.create_subprocess_exec(
        *command, "up", str(MANIFEST), "--port", str(port), stdout=DEVNULL
    )
    try:
        await ready(runtime)
        url = f"http://127.0.0.1:{port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=300) as client:
            await ask(client, QUESTIONS[0], live=True)
            console.print(
                "\n[dim]the others at once, in the batch of the agent that has the system prompt:[/]"
            )
            await asyncio.gather(*(ask(client, question) for question in QUESTIONS[1:]))
            await kill_one_under_load(client)
        console.print("\n[dim]$ blockyard status --local[/]")
        await (await asyncio.create_subprocess_exec(*command, "status", "--local")).wait()
    finally:
        if runtime.returncode is None:
            runtime.send_signal(signal.SIGINT)
        code = await runtime.wait()
    console.print(f"\nstopped, exit code {code}; nothing is left running. Do it yourself:", markup=False)
    console.print(f"  .venv/bin/blockyard up examples/cpu.yaml\n  .venv/bin/blockyard chat --model {SERVICE}")
    return code


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
