"""What can break while people are being served: processes, signals, clients, settings."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import pytest

from .load import LONG, ask, complete, events, go, in_flight, session, status_when, stream
from .process import MODEL, AgentProcess, wait_for_end

Start = Callable[..., AgentProcess]
EXIT_TIMEOUT = 30.0  # seconds; a multiple of what it takes


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """Holds two requests at once and three in the queue, and waits little for clients."""
    flags = ["--kv-blocks", "512", "--max-num-seqs", "2", "--max-queue", "3", "--client-timeout", "4"]
    running = AgentProcess(tmp_path_factory.mktemp("small"), *flags)
    yield running
    running.idle()
    assert running.stop() == 0, running.errors()


def error_of(answer: Any) -> dict[str, Any]:
    """The error of an answer, which must have OpenAI's shape."""
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert error["message"]
    assert error["type"]
    return error  # type: ignore[no-any-return]


# ── Processes ─────────────────────────────────────────────────────────────────────────────────────


def test_a_killed_engine_fails_open_requests_and_ends_the_agent(start_agent: Start) -> None:
    agent = start_agent("--max-num-seqs", "2")

    async def run() -> None:
        async with session() as client:
            streamed = await stream(client, agent.url, ask(LONG))
            whole = asyncio.create_task(complete(client, agent.url, ask(LONG)))
            queued = asyncio.create_task(
                client.post(f"{agent.url}/v1/completions", json=ask(9, n=2, stream=True))
            )
            await in_flight(agent, 3)
            os.kill(agent.engine_pid(), signal.SIGKILL)
            error = error_of((await events(streamed))[-1])
            assert error["code"] == "engine_failed"
            assert "exit code -9" in error["message"]
            status, answer = await whole
            assert (status, error_of(answer)["code"]) == (503, "engine_failed")
            # A stream that has not begun still gets a proper status.
            response = await queued
            assert response.status == 503
            assert error_of(await response.json())["code"] == "engine_failed"

    go(run())
    assert agent.code("/readyz") in (503, 0)
    assert agent.process.wait(EXIT_TIMEOUT) == 1
    assert "exit code -9" in agent.errors()


def test_an_engine_killed_while_it_loads_ends_the_agent(start_agent: Start) -> None:
    agent = start_agent(wait=False)
    agent.wait_for_url()
    os.kill(agent.engine_pid_when_started(), signal.SIGKILL)
    assert agent.process.wait(EXIT_TIMEOUT) == 1
    assert "exit code -9" in agent.errors()


def test_the_engine_goes_when_the_http_process_is_killed_even_in_a_step_that_does_not_end(
    start_agent: Start,
) -> None:
    agent = start_agent()
    engine = agent.engine_pid()

    async def run() -> None:
        async with session() as client:
            streamed = await stream(client, agent.url, ask(LONG))
            os.kill(engine, signal.SIGSTOP)
            agent.process.kill()
            with pytest.raises(aiohttp.ClientError):
                await streamed.read()

    try:
        go(run())
        wait_for_end(engine)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(engine, signal.SIGCONT)  # otherwise the stopped engine would outlive a failed test


def test_an_engine_that_hangs_is_ended_and_one_that_is_idle_is_not(start_agent: Start) -> None:
    agent = start_agent("--hang-timeout", "6")
    engine = agent.engine_pid()

    async def run() -> None:
        async with session() as client:
            status, _ = await complete(client, agent.url, ask(4))
            assert status == 200
            await asyncio.sleep(8)  # an idle engine sends nothing, and that is no hang
            streamed = await stream(client, agent.url, ask(LONG))
            os.kill(engine, signal.SIGSTOP)
            error = error_of((await events(streamed))[-1])
            assert error["code"] == "engine_failed"
            assert "hang_timeout" in error["message"]

    go(run())
    assert agent.process.wait(60) != 0
    wait_for_end(engine)


# ── Signals ───────────────────────────────────────────────────────────────────────────────────────


def test_sigterm_under_load_finishes_what_runs_and_takes_nothing_new(start_agent: Start) -> None:
    agent = start_agent("--max-num-seqs", "3", "--grace-period", "600")
    engine = agent.engine_pid()

    async def run() -> None:
        async with session() as client:
            # The drain cannot end before this one does, and this one ends when the test says so.
            held = await stream(client, agent.url, ask(LONG))
            streamed = [await stream(client, agent.url, ask(10)) for _ in range(2)]
            whole = [asyncio.create_task(complete(client, agent.url, ask(6))) for _ in range(4)]
            await status_when(agent, lambda s: s["in_flight"] >= 5 and s["waiting"] >= 1)
            agent.process.send_signal(signal.SIGTERM)
            await status_when(agent, lambda s: s["state"] == "draining")
            assert await asyncio.to_thread(agent.code, "/readyz") == 503
            assert await asyncio.to_thread(agent.code, "/healthz") == 200
            async with client.post(f"{agent.url}/v1/completions", json=ask(1)) as refused:
                assert refused.status == 503
                assert int(refused.headers["Retry-After"]) > 0
                assert error_of(await refused.json())["code"] == "server_draining"
            agent.process.send_signal(signal.SIGTERM)  # told again: it goes on draining
            for status, answer in await asyncio.gather(*whole):
                assert status == 200
                assert answer["usage"]["completion_tokens"] == 6
            for response in streamed:
                *_, last, done = await events(response)
                assert last["choices"][0]["finish_reason"] == "length"
                assert done == "[DONE]"
            assert agent.process.poll() is None
            held.close()

    go(run())
    assert agent.process.wait(EXIT_TIMEOUT) == 0, agent.errors()
    wait_for_end(engine)


def test_the_grace_period_cuts_off_what_is_left(start_agent: Start) -> None:
    agent = start_agent("--grace-period", "5")

    async def run() -> None:
        async with session() as client:
            streamed = await stream(client, agent.url, ask(LONG))
            whole = asyncio.create_task(complete(client, agent.url, ask(LONG)))
            await in_flight(agent, 2)
            agent.process.send_signal(signal.SIGTERM)
            error = error_of((await events(streamed))[-1])
            assert error["code"] == "server_shutdown"
            assert "grace_period of 5 seconds is over" in error["message"]
            status, answer = await whole
            assert (status, error_of(answer)["code"]) == (503, "server_shutdown")

    go(run())
    assert agent.process.wait(EXIT_TIMEOUT) == 0, agent.errors()


def test_a_second_interrupt_does_not_wait_for_the_grace_period(start_agent: Start) -> None:
    agent = start_agent("--grace-period", "600")

    async def run() -> None:
        async with session() as client:
            streamed = await stream(client, agent.url, ask(LONG))
            agent.process.send_signal(signal.SIGINT)
            await status_when(agent, lambda s: s["state"] == "draining")
            agent.process.send_signal(signal.SIGINT)
            error = error_of((await events(streamed))[-1])
            assert "told twice" in error["message"]

    go(run())
    assert agent.process.wait(EXIT_TIMEOUT) == 0, agent.errors()


def test_sigterm_while_loading_ends_at_once_and_leaves_nobody(start_agent: Start) -> None:
    agent = start_agent(wait=False)
    agent.wait_for_url()
    engine = agent.engine_pid_when_started()
    assert agent.code("/readyz") == 503
    assert agent.code("/healthz") == 200
    status, answer = agent.post("/v1/completions", ask(1))
    assert (status, error_of(answer)["code"]) == (503, "server_starting")
    assert agent.stop(timeout=EXIT_TIMEOUT) == 0, agent.errors()
    assert "Traceback" not in agent.errors()
    wait_for_end(engine)


# ── Clients ───────────────────────────────────────────────────────────────────────────────────────


def test_a_full_queue_answers_429_and_loses_nothing(small: AgentProcess) -> None:
    small.idle()

    async def run() -> None:
        async with session() as client:
            running = [await stream(client, small.url, ask(LONG)) for _ in range(2)]
            queued = [asyncio.create_task(complete(client, small.url, ask(5))) for _ in range(3)]
            await in_flight(small, 5)
            for _ in range(3):
                async with client.post(f"{small.url}/v1/completions", json=ask(1)) as refused:
                    assert refused.status == 429
                    assert int(refused.headers["Retry-After"]) > 0
                    error = error_of(await refused.json())
                    assert error["code"] == "queue_full"
                    assert "max_num_seqs + max_queue" in error["message"]
            for response in running:
                response.close()
            for status, answer in await asyncio.gather(*queued):
                assert status == 200
                assert answer["usage"]["completion_tokens"] == 5

    go(run())
    small.idle()


def test_more_prompts_than_the_server_holds_are_the_requests_fault(small: AgentProcess) -> None:
    status, answer = small.post("/v1/completions", ask(1, prompt=["a"] * 6))
    error = error_of(answer)
    assert (status, error["param"]) == (400, "prompt")
    assert "holds 5 at once" in error["message"]
    status, answer = small.post("/v1/completions", ask(1, n=3))
    assert (status, error_of(answer)["param"]) == (400, "best_of")


def test_two_hundred_clients_that_disconnect_leave_no_block_behind(agent: AgentProcess) -> None:
    before = agent.idle()["finished"]

    async def run() -> None:
        async with session() as client:
            posts = [
                asyncio.create_task(
                    client.post(f"{agent.url}/v1/completions", json=ask(LONG, n=1 + i % 2, stream=True))
                )
                for i in range(200)
            ]
            await in_flight(agent, 200)
            # Half of them go while they wait or just get their first token, half in the middle of the stream.
            for post in posts[::2]:
                if post.done():
                    post.result().close()
                post.cancel()

            async def leave(post: asyncio.Task[aiohttp.ClientResponse]) -> None:
                response = await post
                assert response.status == 200
                await response.content.readuntil(b"\n\n")
                response.close()

            await asyncio.gather(*map(leave, posts[1::2]))

    go(run())
    after = agent.idle()["finished"]
    assert after["abort"] - before.get("abort", 0) == 200
    assert {**after, "abort": 0} == {**before, "abort": 0}


def test_a_client_that_stops_reading_is_dropped(small: AgentProcess) -> None:
    before = small.idle()
    body = json.dumps(ask(LONG, n=2, stream=True, logprobs=20)).encode()
    with socket.socket() as client:
        # Small buffers, so that the server notices after little that nobody reads.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", int(small.url.rpartition(":")[2])))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        small.status_when(lambda s: s["in_flight"] == 1)
        after = small.idle()  # although the client is still there
    assert after["finished"]["abort"] == before["finished"].get("abort", 0) + 1
    assert "took no data for 4 s" in small.errors()


def test_a_body_that_does_not_come_is_not_waited_for(small: AgentProcess) -> None:
    connection = http.client.HTTPConnection(small.url.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b'{"model":')
    response = connection.getresponse()
    error = error_of(json.loads(response.read()))
    assert (response.status, error["code"]) == (408, "body_timeout")
    assert "client_timeout" in error["message"]
    connection.close()


def test_requests_that_were_preempted_are_answered_and_counted_as_if_alone(start_agent: Start) -> None:
    agent = start_agent("--kv-blocks", "14", "--max-num-seqs", "4")
    bodies = [
        ask(60, temperature=0, prompt=f"Story number {n} of many about the sea, the wind, the stars and {n}:")
        for n in range(4)
    ]

    async def run() -> list[Any]:
        async with session() as client:
            answers = await asyncio.gather(*(complete(client, agent.url, body) for body in bodies))
        assert [status for status, _ in answers] == [200] * 4
        return [answer for _, answer in answers]

    together = asyncio.run(run())
    assert agent.idle()["preemptions_recompute"] > 0  # or the test proves nothing
    for body, answer in zip(bodies, together, strict=True):
        # No other request had this prompt; blocks that a preempted request finds of itself are no cache hits.
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        status, alone = agent.post("/v1/completions", body)
        assert status == 200
        assert answer["choices"] == alone["choices"]
        for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert answer["usage"][count] == alone["usage"][count]
        assert answer["usage"]["completion_tokens"] == 60


# ── Settings ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--port", "{taken}"], r"cannot listen on 127.0.0.1:\d+: .*in use.*set host or port"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["--model", "no-such-model"], "'no-such-model' is neither a folder.*SmolLM2-135M-Instruct"),
        (["--model", "{empty}"], "config.json"),
        (["--max-model-len", "9000"], "max_model_len.*8192"),
        (["--kv-bytes", "1000"], "kv_bytes"),
    ],
)
def test_a_setting_that_cannot_work_is_named_and_ends_the_agent(
    agent: AgentProcess, tmp_path: Any, flags: list[str], says: str
) -> None:
    values = {"taken": agent.url.rpartition(":")[2], "empty": str(tmp_path)}
    command = [sys.executable, "-m", "blockyard.cli", "agent", "--model", MODEL, "--port", "0"]
    command += [flag.format(**values) for flag in flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2, done.stderr
    assert re.search(says, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
