"""``blockyard status`` and ``top`` of a cluster: what they show, also while it does not answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from blockyard.operator import terminal
from blockyard.operator.kube import LLM_SERVICE, ApiError

from .api_server import ApiServer, Fault, kubeconfig

Work = Callable[[ApiServer], Awaitable[None]]


@pytest.fixture
def with_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Work], None]:
    """Runs something with a cluster that KUBECONFIG leads to, in which there is one service."""

    async def run(work: Work) -> None:
        async with ApiServer() as server:
            config = kubeconfig(tmp_path / "config", server.url, token="secret")
            monkeypatch.setenv("KUBECONFIG", str(config))
            monkeypatch.setenv("BLOCKYARD_CACHE", str(tmp_path))
            monkeypatch.setattr(terminal, "REFRESH", 0.05)
            metadata = {"name": "tiny", "namespace": "prod"}
            await server.put(LLM_SERVICE, {"metadata": metadata, "spec": {"replicas": 2}})
            await asyncio.wait_for(work(server), 60)

    return lambda work: asyncio.run(run(work))


def asked(server: ApiServer) -> int:
    return sum("llmservices" in path for _, path in server.calls)


def test_status_shows_what_the_cluster_holds(
    with_cluster: Callable[[Work], None], capsys: pytest.CaptureFixture[str]
) -> None:
    async def work(_: ApiServer) -> None:
        assert await terminal.show(None, here=False, follow=False) == 0

    with_cluster(work)
    assert "prod/tiny  0 of 2 ready" in capsys.readouterr().out


def test_status_of_a_cluster_that_refuses_is_an_error(with_cluster: Callable[[Work], None]) -> None:
    async def work(server: ApiServer) -> None:
        server.faults.append(Fault(lambda _, path: "llmservices" in path, code=403, message="not you"))
        with pytest.raises(ApiError, match="not you"):
            await terminal.show(None, here=False, follow=False)

    with_cluster(work)


def test_top_keeps_what_it_had_and_says_why_while_the_cluster_does_not_answer(
    with_cluster: Callable[[Work], None], capsys: pytest.CaptureFixture[str]
) -> None:
    async def work(server: ApiServer) -> None:
        async def top(until: Callable[[], bool]) -> str:
            """What the screen shows at the end."""
            showing = asyncio.create_task(terminal.show(None, here=False, follow=True))
            while not until():
                await server.called(len(server.calls) + 1)
            showing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await showing
            return capsys.readouterr().out

        def not_the_first(_: str, path: str) -> bool:
            return "llmservices" in path and asked(server) > 1

        fault = Fault(not_the_first, times=3, code=403, message="not now")
        server.faults.append(fault)
        shown = await top(lambda: fault.times == 1)
        assert "LLMServices cannot be listed: not now" in shown and "/apis" not in shown
        assert "prod/tiny  0 of 2 ready" in shown

        server.faults.clear()
        again = asked(server)
        assert "cannot be listed" not in await top(lambda: asked(server) >= again + 3)

    with_cluster(work)
