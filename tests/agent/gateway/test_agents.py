"""The gateway before real agents with the real model: what a client gets while they are killed and drained.

The tests run in the order in which they stand here: the later ones use up the agents of the first.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from ..load import LONG, ask, in_flight, session
from ..process import MODEL, START_TIMEOUT, AgentProcess
from .process import GatewayProcess, agents_when, all_ready

FLAGS = ["--kv-blocks", "256", "--max-num-seqs", "16"]
SYSTEM = (
    "You are the keeper of a lighthouse on a small rock in the north, and you answer in short sentences. " * 6
)
STORY = "Once upon a time, in a small village by the sea, there lived"


class Stage:
    """Two agents at most, and two gateways before them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.agents: dict[str, AgentProcess] = {}
        starting = {name: self._start(name) for name in "ab"}
        for name, agent in starting.items():
            self._await_ready(name, agent)
        self.gateways = [GatewayProcess(folder / f"gateway-{n}", self.listed()) for n in range(2)]

    def _start(self, name: str) -> AgentProcess:
        folder = self._folder / name
        folder.mkdir()
        return AgentProcess(folder, *FLAGS, wait=False)

    def _await_ready(self, name: str, agent: AgentProcess) -> None:
        assert agent._ready.wait(START_TIMEOUT) and agent.process.poll() is None, agent.errors()
        self.agents[name] = agent

    def start(self, name: str) -> None:
        self._await_ready(name, self._start(name))

    def listed(self) -> dict[str, str]:
        return {name: agent.url for name, agent in self.agents.items()}

    async def show(self, *names: str) -> None:
        """Give the gateways this list of agents."""
        async with session() as client:
            for gateway in self.gateways:
                gateway.set_agents({name: self.agents[name].url for name in names})
                await all_ready(client, gateway.url, *names)

    def stop(self) -> None:
        for process in (*self.gateways, *self.agents.values()):
            process.stop()

    async def metrics(self, number: int = 0) -> dict[str, float]:
        async with session() as client, client.get(f"{self.gateways[number].url}/metrics") as response:
            lines = [line for line in (await response.text()).splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("stage"))
    yield made
    made.stop()


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=240) as client:
        yield client


def go(work: Any) -> None:
    asyncio.run(asyncio.wait_for(work, 280))


# ── Nothing goes wrong ────────────────────────────────────────────────────────────────────────────


def test_an_answer_through_the_gateway_is_the_agents(stage: Stage) -> None:
    messages: Any = [{"role": "user", "content": "What is the capital of France?"}]

    async def run() -> None:
        await stage.show("a", "b")
        async with client_of(stage.gateways[0].url) as client:
            answer = await client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
            assert answer.choices[0].message.content == "The capital of France is Paris."
            text = ""
            async for chunk in await client.chat.completions.create(
                model=MODEL, messages=messages, temperature=0, stream=True
            ):
                text += chunk.choices[0].delta.content or ""
            assert text == answer.choices[0].message.content
            assert [model.id async for model in client.models.list()] == [MODEL]
            with pytest.raises(openai.NotFoundError, match="does not exist"):
                await client.chat.completions.create(model="other", messages=messages)
            with pytest.raises(openai.BadRequestError, match="temperature") as refused:
                await client.chat.completions.create(model=MODEL, messages=messages, temperature=7)
            assert refused.value.param == "temperature"

    go(run())


def test_requests_with_the_same_system_prompt_meet_its_blocks_from_either_gateway(stage: Stage) -> None:
    async def run() -> None:
        await stage.show("a", "b")
        agents, cached = [], []
        for number in range(4):
            messages: Any = [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": f"What did you see on day {number}?"},
            ]
            async with client_of(stage.gateways[number % 2].url) as client:
                raw = await client.chat.completions.with_raw_response.create(
                    model=MODEL, messages=messages, max_tokens=2, temperature=0
                )
            usage = raw.parse().usage
            assert usage is not None and usage.prompt_tokens_details is not None
            agents.append(raw.headers["x-blockyard-agent"])
            cached.append(usage.prompt_tokens_details.cached_tokens)
        assert len(set(agents)) == 1
        assert cached[0] == 0
        assert min(cached[1:]) > 100

    go(run())


def test_a_client_that_goes_away_frees_its_blocks(stage: Stage) -> None:
    async def run() -> None:
        await stage.show("a")
        async with client_of(stage.gateways[0].url) as client:
            stream = await client.completions.create(
                model=MODEL, prompt=STORY, max_tokens=LONG, stream=True, extra_body={"ignore_eos": True}
            )
            waiting = asyncio.create_task(
                client.completions.create(
                    model=MODEL, prompt=STORY, max_tokens=LONG, extra_body={"ignore_eos": True}
                )
            )
            await anext(aiter(stream))
            await in_flight(stage.agents["a"], 2)
            await stream.close()
            waiting.cancel()
            await in_flight(stage.agents["a"], 0)

    before = stage.agents["a"].idle()["finished"].get("abort", 0)
    go(run())
    assert stage.agents["a"].idle()["finished"]["abort"] == before + 2


# ── An agent is killed ────────────────────────────────────────────────────────────────────────────

TOKENS = 100
GREEDY: dict[str, Any] = {"temperature": 0}
SEEDED: dict[str, Any] = {"temperature": 0.9, "seed": 1234}
MANY: dict[str, Any] = {"temperature": 0.9, "seed": 99, "n": 2, "logprobs": 2}
UNSEEDED: dict[str, Any] = {"temperature": 0.9}


class Reader:
    """One request of a client, streaming or not, and the text that the client receives."""

    def __init__(self, client: openai.AsyncOpenAI, *, stream: bool, how: dict[str, Any]) -> None:
        self._client = client
        self._stream = stream
        self._ask: dict[str, Any] = {
            "model": MODEL, "prompt": STORY, "max_tokens": TOKENS, "extra_body": {"ignore_eos": True}, **how
        }  # fmt: skip
        self.events = 0
        self.text: dict[int, str] = {}
        self.tokens: dict[int, list[str]] = {}
        self.ids: set[str] = set()
        self.ends: list[str] = []
        self.usages: list[int] = []
        self.under_way = asyncio.Event()  # some of the text is there

    async def read(self) -> None:
        if not self._stream:
            answer = await self._client.completions.create(**self._ask)
            self._take(answer)
            return
        stream = await self._client.completions.create(
            **self._ask, stream=True, stream_options={"include_usage": True}
        )
        async for chunk in stream:
            self._take(chunk)
            self.events += 1
            if self.events >= 5:
                self.under_way.set()

    def _take(self, answer: Any) -> None:
        self.ids.add(answer.id)
        for choice in answer.choices:
            self.text[choice.index] = self.text.get(choice.index, "") + choice.text
            if choice.logprobs:
                self.tokens.setdefault(choice.index, []).extend(choice.logprobs.tokens)
            if choice.finish_reason:
                self.ends.append(choice.finish_reason)
        if answer.usage:
            self.usages.append(answer.usage.completion_tokens)


def test_clients_do_not_notice_that_their_agent_is_killed(stage: Stage) -> None:
    """Greedy and seeded ones get the very answer of an undisturbed agent, streaming or not."""
    plans = [(stream, how) for stream in (True, False) for how in (GREEDY, SEEDED, MANY)]

    async def run() -> None:
        victim = stage.agents["a"]
        async with client_of(stage.agents["b"].url) as direct:
            undisturbed = [Reader(direct, stream=False, how=how) for how in (GREEDY, SEEDED, MANY)]
            await asyncio.gather(*(reader.read() for reader in undisturbed))
        expected = undisturbed * 2
        await stage.show("a")
        async with client_of(stage.gateways[0].url) as client:
            readers = [Reader(client, stream=stream, how=how) for stream, how in plans]
            unseeded = Reader(client, stream=True, how=UNSEEDED)
            tasks = [asyncio.create_task(reader.read()) for reader in (*readers, unseeded)]
            streams = [*readers[:3], unseeded]
            await asyncio.gather(*(reader.under_way.wait() for reader in streams))
            os.kill(
                victim.engine_pid(), signal.SIGSTOP
            )  # the engine is stopped: no request finishes before the kill
            await in_flight(victim, len(tasks))
            await stage.show("a", "b")
            assert not any(task.done() for task in tasks)
            victim.process.kill()
            await asyncio.gather(*tasks)
        for reader, right in zip(readers, expected, strict=True):
            assert reader.text == right.text
            assert reader.tokens == right.tokens
        for reader in (*readers, unseeded):
            assert len(reader.ids) == 1
            assert set(reader.ends) == {"length"} and len(reader.ends) == len(reader.text)
            assert reader.usages == [TOKENS * len(reader.text)]
        metrics = await stage.metrics()
        assert metrics['blockyard_gateway_replays_total{outcome="begun"}'] == len(streams)
        assert metrics['blockyard_gateway_replays_total{outcome="gone_on"}'] == len(streams)
        assert 'blockyard_gateway_replays_total{outcome="diverged"}' not in metrics

    go(run())
    stage.agents["b"].idle()
    stage.agents.pop("a").stop()


# ── An agent is drained ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("timeout_s", [600, 0])
def test_no_request_fails_while_an_agent_is_drained_under_load(stage: Stage, timeout_s: int) -> None:
    """With time to finish what runs, and with none: then it is cut off, and replayed."""
    old, new = ("b", "c") if timeout_s else ("c", "d")
    stage.start(new)

    async def run() -> None:
        await stage.show(old, new)
        enough = asyncio.Event()
        done = [0, 0]  # answers, and how many of them began after the drain

        async def user(client: aiohttp.ClientSession, number: int) -> None:
            gateway = stage.gateways[number % 2]
            asked = 0
            while not enough.is_set():
                asked += 1
                late = drained.is_set()
                body = ask(12, prompt=f"{number} {asked} {STORY}", temperature=number % 2, stream=number > 2)
                async with client.post(f"{gateway.url}/v1/completions", json=body) as response:
                    text = await response.text()
                    assert response.status == 200, text
                if body["stream"]:
                    assert text.endswith("data: [DONE]\n\n"), text
                    assert '"error"' not in text
                done[0] += 1
                done[1] += late
                changed.set()

        drained, changed = asyncio.Event(), asyncio.Event()

        async def until(count: int, which: int) -> None:
            while done[which] < count:
                changed.clear()
                waiting = asyncio.create_task(changed.wait())
                await asyncio.wait({waiting, *users}, return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
                for task in users:
                    if task.done():
                        task.result()

        async with session() as client:
            users = [asyncio.create_task(user(client, number)) for number in range(6)]
            await until(8, 0)
            await asyncio.to_thread(stage.agents[old].status_when, lambda s: s["in_flight"] > 0)
            async with client.post(
                f"{stage.agents[old].url}/drain", json={"timeout_s": timeout_s}
            ) as response:
                assert response.status == 200
            drained.set()
            await asyncio.to_thread(stage.agents[old].status_when, lambda s: s["state"] == "drained")
            await until(6, 1)
            for gateway in stage.gateways:
                await agents_when(client, gateway.url, lambda agents: not agents[old]["ready"])
            # Removed only after the drain, as the operator does it.
            assert await asyncio.to_thread(stage.agents[old].stop) == 0
            enough.set()
            await asyncio.gather(*users)

    go(run())
    stage.agents.pop(old)
    stage.agents[new].idle()
