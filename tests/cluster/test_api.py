"""The client's watch against a server that ends connections and forgets versions."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web

from .access import Access
from .api import Api, ApiError, Raw


def thing(name: str, version: int) -> Raw:
    return {"metadata": {"name": name, "uid": f"uid-{name}", "resourceVersion": str(version)}}


class Server:
    """Knows one kind, and answers lists and watches from a script."""

    def __init__(self, lists: list[Raw], watches: list[list[Raw]]) -> None:
        self.lists = lists
        self.watches = watches
        self.asked: list[str] = []  # resourceVersion of each watch

    async def discover(self, request: web.Request) -> web.Response:
        resource = {"resource": "things", "responseKind": {"kind": "Thing"}, "scope": "Namespaced"}
        groups = [{"metadata": {}, "versions": [{"version": "v1", "resources": [resource]}]}]
        return web.json_response({"items": groups if request.path == "/api" else []})

    async def things(self, request: web.Request) -> web.StreamResponse:
        if "watch" not in request.query:
            return web.json_response(self.lists.pop(0))
        self.asked.append(request.query["resourceVersion"])
        answer = web.StreamResponse()
        await answer.prepare(request)
        for event in self.watches.pop(0) if self.watches else []:
            await answer.write(json.dumps(event).encode() + b"\n")
        if not self.watches:  # the script is over
            await asyncio.Event().wait()
        assert request.transport
        request.transport.abort()
        return answer


def run(server: Server, count: int) -> list[tuple[str, str]]:
    """The first events of a watch, as (event, name)."""

    async def watch() -> list[tuple[str, str]]:
        app = web.Application()
        app.router.add_get("/api", server.discover)
        app.router.add_get("/apis", server.discover)
        app.router.add_get("/api/v1/things", server.things)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        api = Api(Access(f"http://127.0.0.1:{runner.addresses[0][1]}", ""))
        found: list[tuple[str, str]] = []
        try:
            async with asyncio.timeout(60):
                async for event, item in api.watch("Thing"):
                    found.append((event, item.get("metadata", {}).get("name", "")))
                    if len(found) == count:
                        break
        finally:
            await api.close()
            await runner.cleanup()
        return found

    return asyncio.run(watch())


def listing(version: int, *things: Raw) -> Raw:
    return {"metadata": {"resourceVersion": str(version)}, "items": list(things)}


def event(kind: str, item: Raw) -> Raw:
    return {"type": kind, "object": item}


GONE = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired"}}


def test_an_ended_watch_goes_on_where_it_was() -> None:
    server = Server(
        [listing(10, thing("a", 5))],
        [
            [event("MODIFIED", thing("a", 11)), event("BOOKMARK", thing("", 15))],
            [event("ADDED", thing("b", 16))],
        ],
    )
    assert run(server, 4) == [("ADDED", "a"), ("SYNCED", ""), ("MODIFIED", "a"), ("ADDED", "b")]
    assert server.asked == ["10", "15"]


def test_after_a_version_that_is_too_old_what_changed_meanwhile_is_told() -> None:
    server = Server(
        [
            listing(10, thing("a", 5), thing("b", 6), thing("c", 7)),
            listing(30, thing("b", 6), thing("c", 29), thing("d", 28)),
        ],
        [[GONE], [event("DELETED", thing("b", 31))]],
    )
    told = run(server, 9)
    assert told[:4] == [("ADDED", "a"), ("ADDED", "b"), ("ADDED", "c"), ("SYNCED", "")]
    assert told[4:] == [("DELETED", "a"), ("MODIFIED", "c"), ("ADDED", "d"), ("SYNCED", ""), ("DELETED", "b")]
    assert server.asked == ["10", "30"]


def test_a_refusal_by_a_budget_is_told_from_an_overloaded_server() -> None:
    causes: dict[str, Any] = {"causes": [{"reason": "DisruptionBudget"}]}
    assert ApiError({"code": 429, "details": causes}).is_budget
    assert not ApiError({"code": 429, "details": {}}).is_budget
