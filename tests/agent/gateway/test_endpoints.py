"""Where agents come from: EndpointSlices, as a server that speaks list and watch gives them, and files."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from blockyard.agent.errors import SettingsError
from blockyard.agent.gateway import endpoints
from blockyard.agent.gateway.endpoints import (
    Endpoint,
    Endpoints,
    FileEndpoints,
    ServiceAccount,
    SliceEndpoints,
)
from blockyard.agent.gateway.settings import GatewaySettings

NAMESPACE, SERVICE = "team", "chat-agents"


def slice_of(name: str, *addresses: str, version: int = 0, **more: Any) -> dict[str, Any]:
    """An EndpointSlice; the pod of an address is named after its last number."""
    return {
        "metadata": {"name": name, "resourceVersion": str(version)},
        "addressType": "IPv4",
        "ports": [{"name": "metrics", "port": 9}, {"name": "http", "port": 8000}],
        "endpoints": [
            {"addresses": [a], "targetRef": {"kind": "Pod", "name": f"pod-{a.rpartition('.')[2]}"}}
            for a in addresses
        ],
        **more,
    }


class ApiServer:
    """List and watch of EndpointSlices: resource versions, bookmarks, 410, and connections that break."""

    def __init__(self) -> None:
        self.version = 10
        self.slices: dict[str, dict[str, Any]] = {}
        self.history: list[dict[str, Any]] = []
        self.forgotten = 0  # versions up to this one are too old to watch from
        self.lists = 0
        self.watches: list[int] = []  # the versions from which watches were begun
        self.token = "first"
        self.refuse = 0  # requests that are answered with a 500
        self._changed = asyncio.Event()
        self._served = asyncio.Event()
        self._streams: set[web.StreamResponse] = set()
        self.app = web.Application()
        self.app.router.add_get(
            f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices", self._answer
        )

    def put(self, item: dict[str, Any]) -> None:
        name = item["metadata"]["name"]
        self._record("MODIFIED" if name in self.slices else "ADDED", item)
        self.slices[name] = item

    def delete(self, name: str) -> None:
        self._record("DELETED", self.slices.pop(name))

    def bookmark(self) -> None:
        self._record("BOOKMARK", {"kind": "EndpointSlice", "metadata": {}})

    def forget(self) -> None:
        """Compact the history, as etcd does: older versions get 410."""
        self.version += 1
        self.forgotten = self.version

    async def break_watches(self) -> None:
        """Cut all open watch connections."""
        for stream in list(self._streams):
            request = stream._req
            assert request is not None and request.transport is not None
            request.transport.abort()
        await self.when(lambda: not self._streams)

    async def when(self, holds: Callable[[], bool]) -> None:
        """Wait until it holds; checked after every request."""
        async with asyncio.timeout(30):
            while not holds():
                await self._served.wait()

    async def watched(self) -> None:
        """Until a watch is open."""
        await self.when(lambda: bool(self._streams))

    def _did(self) -> None:
        self._served.set()
        self._served = asyncio.Event()

    def _record(self, kind: str, item: dict[str, Any]) -> None:
        self.version += 1
        item["metadata"]["resourceVersion"] = str(self.version)
        self.history.append({"type": kind, "object": json.loads(json.dumps(item))})
        self._changed.set()
        self._changed = asyncio.Event()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"message": "Unauthorized"}, status=401)
        if self.refuse:
            self.refuse -= 1
            self._did()
            return web.json_response({"message": "etcd has no leader"}, status=500)
        assert request.query["labelSelector"] == f"kubernetes.io/service-name={SERVICE}"
        return await (self._watch(request) if request.query.get("watch") else self._list(request))

    async def _list(self, request: web.Request) -> web.StreamResponse:
        """One slice on a page, so that paging is always used."""
        begin = int(request.query.get("continue", "0"))
        self.lists += begin == 0
        items = list(self.slices.values())
        metadata = {"resourceVersion": str(self.version)}
        if begin + 1 < len(items):
            metadata["continue"] = str(begin + 1)
        return web.json_response({"metadata": metadata, "items": items[begin : begin + 1] or None})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        sent = int(request.query["resourceVersion"])
        self.watches.append(sent)
        response = web.StreamResponse()
        await response.prepare(request)
        self._streams.add(response)
        self._did()
        try:
            if sent < self.forgotten:
                gone = {"kind": "Status", "code": 410, "message": "too old resource version"}
                await response.write(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
                return response
            async with asyncio.timeout(float(request.query["timeoutSeconds"])):
                while True:
                    changed = self._changed
                    for event in self.history:
                        version = int(event["object"]["metadata"]["resourceVersion"])
                        if version > sent:
                            sent = version
                            line = json.dumps(event).encode() + b"\n"
                            await response.write(line[:7])  # an event may come in pieces
                            await response.write(line[7:])
                    await changed.wait()
        except TimeoutError:
            return response
        finally:
            self._streams.discard(response)
            self._did()


@contextlib.asynccontextmanager
async def served(server: ApiServer, trust: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    runner = web.AppRunner(server.app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=trust)
    await site.start()
    try:
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


class Seen:
    """The endpoints that a source has yielded, with a way to wait for the next ones."""

    def __init__(self, source: Endpoints) -> None:
        self.all: list[set[str]] = []
        self.urls: set[str] = set()
        self._source = source
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async with contextlib.aclosing(self._source.watch()) as changes:
            async for found in changes:
                self.all.append({endpoint.name for endpoint in found})
                self.urls = {endpoint.url for endpoint in found}
                self._changed.set()

    async def until(self, *names: str) -> None:
        async with asyncio.timeout(30):
            while not self.all or self.all[-1] != set(names):
                assert not self._task.done(), self._task
                self._changed.clear()
                await self._changed.wait()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


Scene = Callable[[ApiServer, Seen, Path], Awaitable[None]]


def play(folder: Path, scene: Scene) -> None:
    """A server with two slices and a source that follows it."""

    async def run() -> None:
        server = ApiServer()
        server.put(slice_of("one", "10.0.0.1"))
        server.put(slice_of("two", "10.0.0.2", "10.0.0.3"))
        (folder / "token").write_text("first\n")
        async with served(server) as port:
            url = f"http://127.0.0.1:{port}"
            seen = Seen(SliceEndpoints(url, NAMESPACE, SERVICE, ServiceAccount(folder)))
            try:
                await seen.until("pod-1", "pod-2", "pod-3")
                await server.watched()
                await scene(server, seen, folder)
            finally:
                await seen.close()

    asyncio.run(asyncio.wait_for(run(), 90))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "FIRST_PAUSE", 0.01)


def test_slices_are_listed_and_then_watched(tmp_path: Path) -> None:
    async def scene(server: ApiServer, seen: Seen, _: Path) -> None:
        assert seen.urls == {f"http://10.0.0.{n}:8000" for n in (1, 2, 3)}
        server.put(slice_of("three", "10.0.0.4"))
        await seen.until("pod-1", "pod-2", "pod-3", "pod-4")
        server.put(slice_of("two", "10.0.0.3"))
        await seen.until("pod-1", "pod-3", "pod-4")
        server.delete("one")
        await seen.until("pod-3", "pod-4")
        assert server.lists == 1
        assert len(server.watches) == 1
        assert {"pod-1"} not in seen.all  # a list is taken over as a whole, not page by page

    play(tmp_path, scene)


def test_a_broken_watch_goes_on_where_it_was(tmp_path: Path) -> None:
    async def scene(server: ApiServer, seen: Seen, _: Path) -> None:
        for number in range(4, 8):
            await server.watched()
            await server.break_watches()
            server.put(slice_of("three", f"10.0.0.{number}"))
            await seen.until("pod-1", "pod-2", "pod-3", f"pod-{number}")
        assert server.lists == 1
        assert server.watches[1:] == sorted(set(server.watches[1:]))
        assert len(server.watches) == 5

    play(tmp_path, scene)


def test_bookmarks_move_the_version_on(tmp_path: Path) -> None:
    async def scene(server: ApiServer, seen: Seen, _: Path) -> None:
        server.bookmark()
        bookmark = server.version
        server.put(slice_of("three", "10.0.0.4"))
        await seen.until("pod-1", "pod-2", "pod-3", "pod-4")
        server.bookmark()
        server.forgotten = server.version - 1  # everything but the bookmark
        await asyncio.sleep(0)
        await server.break_watches()
        server.put(slice_of("three", "10.0.0.5"))
        await seen.until("pod-1", "pod-2", "pod-3", "pod-5")
        assert server.lists == 1 or server.watches[-1] > bookmark

    play(tmp_path, scene)


def test_a_version_that_is_too_old_is_listed_anew(tmp_path: Path) -> None:
    async def scene(server: ApiServer, seen: Seen, _: Path) -> None:
        server.slices.pop("one")  # a change that the watch does not report
        server.forget()
        await server.break_watches()
        await seen.until("pod-2", "pod-3")
        assert server.lists == 2
        server.put(slice_of("one", "10.0.0.9"))
        await seen.until("pod-2", "pod-3", "pod-9")
        assert server.lists == 2

    play(tmp_path, scene)


def test_what_is_known_outlives_an_api_server_that_fails(tmp_path: Path) -> None:
    async def scene(server: ApiServer, seen: Seen, _: Path) -> None:
        server.refuse = 3
        server.slices.clear()
        await server.break_watches()
        await server.when(lambda: not server.refuse)
        assert seen.all == [{"pod-1", "pod-2", "pod-3"}]
        server.put(slice_of("four", "10.0.0.4"))
        await seen.until("pod-1", "pod-2", "pod-3", "pod-4")

    play(tmp_path, scene)


def test_a_renewed_token_is_used(tmp_path: Path) -> None:
    async def scene(server: ApiServer, seen: Seen, folder: Path) -> None:
        server.token = "second"
        await server.break_watches()
        server.put(slice_of("three", "10.0.0.4"))
        (folder / "token").write_text("second")
        await seen.until("pod-1", "pod-2", "pod-3", "pod-4")

    play(tmp_path, scene)


def test_what_slices_may_look_like(tmp_path: Path) -> None:
    async def scene(server: ApiServer, seen: Seen, _: Path) -> None:
        server.delete("one")
        server.put(slice_of("two", "fd00::7", addressType="IPv6"))
        await seen.until("pod-fd00::7")
        assert seen.urls == {"http://[fd00::7]:8000"}
        nameless = [{"addresses": ["10.0.0.8"], "conditions": {"ready": False}}]
        server.put(slice_of("two", endpoints=nameless, ports=[{"name": "", "port": 81}]))
        await seen.until("10.0.0.8")
        assert seen.urls == {"http://10.0.0.8:81"}
        server.put(slice_of("two", endpoints=None))
        await seen.until()
        server.put(slice_of("two", "10.0.0.8", ports=None))
        server.put(slice_of("one", "10.0.0.1"))
        await seen.until("pod-1")

    play(tmp_path, scene)


def test_the_ca_of_the_service_account_is_trusted_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cluster", "other"):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
             "-days", "2", "-subj", "/CN=kube", "-addext", "subjectAltName=IP:127.0.0.1",
             "-keyout", tmp_path / f"{name}.key", "-out", tmp_path / f"{name}.crt"],
            check=True, capture_output=True,
        )  # fmt: skip
    (tmp_path / "token").write_text("first")
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trust.load_cert_chain(tmp_path / "cluster.crt", tmp_path / "cluster.key")

    async def run() -> None:
        server = ApiServer()
        server.put(slice_of("one", "10.0.0.1"))
        async with served(server, trust) as port:
            monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
            monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(port))
            settings = GatewaySettings.load(
                {"namespace": NAMESPACE, "service": "chat", "serviceaccount": tmp_path}
            )
            (tmp_path / "ca.crt").write_bytes((tmp_path / "cluster.crt").read_bytes())
            seen = Seen(settings.endpoints())
            await seen.until("pod-1")
            await seen.close()
            (tmp_path / "ca.crt").write_bytes((tmp_path / "other.crt").read_bytes())
            lists = server.lists
            stranger = Seen(settings.endpoints())
            await asyncio.sleep(0.3)
            assert stranger.all == [] and server.lists == lists
            await stranger.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "agents.json"

    async def run() -> None:
        seen = Seen(FileEndpoints(file))
        file.write_text(json.dumps([{"name": "a", "url": "http://127.0.0.1:1/"}]))
        await seen.until("a")
        assert seen.urls == {"http://127.0.0.1:1"}
        for junk in ("", "{", "[{}]", '[{"name": 1, "url": 2}]', '{"name": "a"}'):
            replaced = tmp_path / "new"
            replaced.write_text(junk)
            replaced.replace(file)
            await asyncio.sleep(2 * endpoints.FILE_INTERVAL)
        file.unlink()
        await asyncio.sleep(2 * endpoints.FILE_INTERVAL)
        assert seen.all == [{"a"}]
        file.write_text(json.dumps([{"name": name, "url": "http://b"} for name in "bc"]))
        await seen.until("b", "c")
        await seen.close()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_endpoints_of_equal_names_and_other_urls_are_others() -> None:
    assert Endpoint("a", "http://1") != Endpoint("a", "http://2")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({}, "agents_file.*namespace and service"),
        ({"service": "x"}, "both namespace and service"),
        ({"agents_file": "x", "namespace": "y", "service": "z"}, "either agents_file"),
        ({"agents_file": "x", "port": "70000"}, r"port \(--port, BLOCKYARD_GATEWAY_PORT\).*65535"),
        ({"agents_file": "x", "requests_per_minute": 0}, "BLOCKYARD_GATEWAY_REQUESTS_PER_MINUTE.*greater"),
    ],
)
def test_a_setting_that_cannot_work_is_named(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        GatewaySettings.load(flags)


def test_outside_kubernetes_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    settings = GatewaySettings.load({"namespace": "a", "service": "b", "serviceaccount": tmp_path})
    with pytest.raises(SettingsError, match="KUBERNETES_SERVICE_HOST is not set"):
        settings.endpoints()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    with pytest.raises(SettingsError, match=str(tmp_path)):
        settings.endpoints()
