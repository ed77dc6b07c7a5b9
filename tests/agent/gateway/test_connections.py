"""The gateway's connections: malformed requests, and clients that have shut down their sending side."""

from __future__ import annotations

import asyncio
from pathlib import Path

from ..sockets import MALFORMED, exchange, final, post
from .test_server import GREEDY, go, scene


def test_a_malformed_request_is_the_peers_fault_and_no_error_of_the_gateway(tmp_path: Path) -> None:
    async def work() -> None:
        async with scene(tmp_path, 1, "--token", "inner") as at:
            for what, sent in MALFORMED.items():
                received = await asyncio.to_thread(exchange, at.url, sent)
                if received:
                    status, body = final(received)
                    assert 400 <= status < 500, (what, received)
                    assert status != 400 or "error" in body, (what, received)
            metrics = await at.metrics()
            assert metrics["blockyard_gateway_malformed_requests_total"] >= 5
            assert " ERROR " not in at.gateway.errors(), at.gateway.errors()
            assert (await at.ask())[0] == 200

    go(work())


def test_a_client_that_has_shut_down_its_sending_side_gets_its_answer(tmp_path: Path) -> None:
    async def work() -> None:
        async with scene(tmp_path, 1, "--token", "inner") as at:
            sent = post("/v1/completions", GREEDY)
            status, text = final(await asyncio.to_thread(exchange, at.url, sent, half_close=True))
            assert (status, text) == (200, '{"from": "a"}')

    go(work())
