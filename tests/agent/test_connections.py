"""Connections that clients treat badly: malformed requests, and sending sides that are shut down."""

from __future__ import annotations

import re
import urllib.request

import pytest

from .load import ask
from .process import AgentProcess
from .sockets import MALFORMED, exchange, final, post


def malformed_so_far(agent: AgentProcess) -> float:
    with urllib.request.urlopen(f"{agent.url}/metrics", timeout=60) as response:
        text = response.read().decode()
    (count,) = re.findall(r"^blockyard_malformed_requests_total (\S+)$", text, re.MULTILINE)
    return float(count)


def test_a_malformed_request_is_the_peers_fault_and_no_error_of_the_agent(agent: AgentProcess) -> None:
    before, told = malformed_so_far(agent), len(agent.errors())
    for what, sent in MALFORMED.items():
        received = exchange(agent.url, sent)
        if received:
            status, body = final(received)
            assert 400 <= status < 500, (what, received)
            assert status != 400 or "error" in body, (what, received)
    assert malformed_so_far(agent) >= before + 5
    log = agent.errors()[told:]
    assert "Traceback" not in log and " ERROR " not in log, log
    assert re.search(r"INFO blockyard.agent malformed request peer=127.0.0.1: ", log), log


def test_a_flood_of_them_is_counted_and_not_told(agent: AgentProcess) -> None:
    before, told = malformed_so_far(agent), len(agent.errors())
    for _ in range(100):
        exchange(agent.url, MALFORMED["two lengths"])
    assert malformed_so_far(agent) == before + 100
    assert agent.errors()[told:].count("malformed request") < 100


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_shut_down_its_sending_side_gets_its_answer(
    agent: AgentProcess, stream: bool, version: str
) -> None:
    body = ask(12, stream=stream, temperature=0)
    received = exchange(agent.url, post("/v1/completions", body, version=version), half_close=True)
    status, text = final(received)
    assert status == 200, received
    assert ("[DONE]" in text) if stream else ('"completion_tokens":12' in text.replace(" ", "")), text
    assert received.startswith(b"HTTP/1.1 100 ") == (version == "HTTP/1.1") or stream


def test_a_request_that_was_cut_off_in_the_middle_is_none(agent: AgentProcess) -> None:
    whole = post("/v1/completions", ask(4))
    assert exchange(agent.url, whole[:-10], half_close=True) == b""
