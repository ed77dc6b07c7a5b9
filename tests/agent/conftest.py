"""One agent for all tests that leave it intact, and a factory of others for tests that break theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from .process import AgentProcess


@pytest.fixture(scope="session")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    flags = [
        "--kv-blocks",
        "512",
        "--max-num-seqs",
        "16",
        "--max-queue",
        "256",
        "--max-body-bytes",
        "1000000",
    ]
    running = AgentProcess(tmp_path_factory.mktemp("agent"), *flags)
    yield running
    assert running.stop() == 0, running.errors()


@pytest.fixture
def start_agent(tmp_path: Path) -> Iterator[Callable[..., AgentProcess]]:
    """A factory of agents, which are stopped at the end of the test."""
    started: list[AgentProcess] = []

    def start(*flags: str, **options: object) -> AgentProcess:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(AgentProcess(folder, "--kv-blocks", "256", *flags, **options))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for running in started:
        running.stop()


@pytest.fixture
def client(agent: AgentProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{agent.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made
    agent.idle()
