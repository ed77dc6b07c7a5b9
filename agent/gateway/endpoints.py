"""Where a gateway's agents are: a Service's EndpointSlices in Kubernetes, or a file on one machine.

Both are followed for ever. While they cannot be read the agents stay as they were last known: a service that
works must not stop because the API server cannot be reached.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import ssl
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import aiohttp
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

log = logging.getLogger("blockyard.gateway")

FILE_INTERVAL = 0.25  # seconds between two looks at the file
WATCH_SECONDS = 60  # a watch is renewed after this, so that a dead connection is noticed
ANSWER_TIMEOUT = 15.0  # seconds for a list, and for what a watch takes beyond WATCH_SECONDS
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0  # seconds before the API server is asked again
PAGE = 500  # slices in one answer


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """One agent: the name it is known by (its pod's) and where it listens."""

    name: str
    url: str


class Endpoints(Protocol):
    """A source of agents."""

    def watch(self) -> AsyncGenerator[frozenset[Endpoint], None]:
        """All agents, again whenever they have changed; never ends."""
        ...


class _Listed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    url: str


_FILE = TypeAdapter(list[_Listed])


class FileEndpoints:
    """A JSON file with a list of {"name", "url"}. It should be replaced, not written into."""

    def __init__(self, file: Path) -> None:
        self._file = file

    async def watch(self) -> AsyncGenerator[frozenset[Endpoint], None]:
        seen: object = None
        while True:
            try:
                found = self._file.stat()
                now: object = (found.st_mtime_ns, found.st_size, found.st_ino)
            except OSError as error:
                now = str(error)
            if now != seen:
                seen = now
                try:
                    listed = _FILE.validate_json(self._file.read_bytes())
                except (OSError, ValidationError) as error:
                    log.warning(
                        "agents file %s cannot be read; the agents stay as they are: %s", self._file, error
                    )
                else:
                    yield frozenset(Endpoint(agent.name, agent.url.rstrip("/")) for agent in listed)
            await asyncio.sleep(FILE_INTERVAL)


class _Expired(Exception):
    """The API server no longer knows the resource version: the list must be read anew."""


class ServiceAccount:
    """The credentials that Kubernetes mounts into a pod. Tokens are renewed in place, so read each time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {(self._folder / 'token').read_text().strip()}"}

    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self._folder / "ca.crt"))


class SliceEndpoints:
    """The EndpointSlices of one Service, by list and watch.

    Addresses that Kubernetes calls not ready are taken too: the agent's own status tells whether it is ready,
    and tells it sooner.
    """

    def __init__(self, api: str, namespace: str, service: str, account: ServiceAccount) -> None:
        self._api = api
        self._path = f"{api}/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        self._selector = f"kubernetes.io/service-name={service}"
        self._account = account
        self._slices: dict[str, frozenset[Endpoint]] = {}
        self._version = ""  # resource version to go on from; empty: list first

    def _all(self) -> frozenset[Endpoint]:
        return frozenset().union(*self._slices.values())

    async def watch(self) -> AsyncGenerator[frozenset[Endpoint], None]:
        shown: frozenset[Endpoint] | None = None
        pause = FIRST_PAUSE
        trust = self._account.trust() if self._api.startswith("https") else False
        # A new connection for every request, so that a dead one is never used again.
        connector = aiohttp.TCPConnector(ssl=trust, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:
            while True:
                begun = asyncio.get_running_loop().time()
                try:
                    if not self._version:
                        await self._list(session)
                        if self._all() != shown:
                            shown = self._all()
                            yield shown
                    async with contextlib.aclosing(self._events(session)) as events:
                        async for event in events:
                            self._apply(event)
                            if self._all() != shown:
                                shown = self._all()
                                yield shown
                except _Expired:
                    self._version = ""
                except (OSError, aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
                    log.warning(
                        "EndpointSlices with %s: %s; the agents stay as they are, next try in %.1f s",
                        self._selector, str(error) or type(error).__name__, pause,
                    )  # fmt: skip
                # Pause after a normal end too, in case a server ends every watch at once.
                if asyncio.get_running_loop().time() - begun > LONGEST_PAUSE:
                    pause = FIRST_PAUSE
                await asyncio.sleep(pause * random.uniform(0.8, 1.2))
                pause = min(2 * pause, LONGEST_PAUSE)

    async def _list(self, session: aiohttp.ClientSession) -> None:
        """Read everything, page by page; only a whole list replaces what is known."""
        found: dict[str, frozenset[Endpoint]] = {}
        page = ""
        while True:
            query = {"labelSelector": self._selector, "limit": str(PAGE)} | (
                {"continue": page} if page else {}
            )
            limit = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT)
            headers = self._account.headers()
            async with session.get(self._path, params=query, headers=headers, timeout=limit) as response:
                await _check(response)
                answer = await response.json()
            for item in answer.get("items") or []:
                found[item["metadata"]["name"]] = _endpoints(item)
            page = answer["metadata"].get("continue") or ""
            if not page:
                self._slices, self._version = found, answer["metadata"]["resourceVersion"]
                return

    async def _events(self, session: aiohttp.ClientSession) -> AsyncGenerator[dict[str, Any], None]:
        query = {
            "labelSelector": self._selector,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        limit = aiohttp.ClientTimeout(total=WATCH_SECONDS + ANSWER_TIMEOUT)
        headers = self._account.headers()
        async with session.get(self._path, params=query, headers=headers, timeout=limit) as response:
            await _check(response)
            buffer = bytearray()
            async for data in response.content.iter_any():
                buffer += data
                *lines, rest = buffer.split(b"\n")
                buffer = bytearray(rest)
                for line in lines:
                    if line.strip():
                        yield json.loads(line)

    def _apply(self, event: dict[str, Any]) -> None:
        kind, item = event["type"], event["object"]
        if kind == "ERROR":
            if item.get("code") == 410:
                raise _Expired
            raise ValueError(f"the watch failed: {item.get('message') or item}")
        name = item["metadata"].get("name", "")
        if kind == "DELETED":
            self._slices.pop(name, None)
        elif kind in ("ADDED", "MODIFIED"):
            self._slices[name] = _endpoints(item)
        self._version = item["metadata"]["resourceVersion"]


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status == 410:
        raise _Expired
    if response.status != 200:
        text = (await response.text())[:300]
        remedy = (
            "; the ServiceAccount needs list and watch on endpointslices" if response.status == 403 else ""
        )
        raise ValueError(f"the API server answers {response.status}{remedy}: {text}")


def _endpoints(item: dict[str, Any]) -> frozenset[Endpoint]:
    """The agents in one slice: those with a pod are named after it, others after their address."""
    ports = item.get("ports") or []
    port = next((entry for entry in ports if entry.get("name") == "http"), ports[0] if ports else None)
    if port is None or not port.get("port"):
        return frozenset()
    found = set()
    for endpoint in item.get("endpoints") or []:
        # The addresses of one endpoint are interchangeable, and all but the first are deprecated.
        address = endpoint["addresses"][0]
        host = f"[{address}]" if item.get("addressType") == "IPv6" else address
        name = (endpoint.get("targetRef") or {}).get("name") or address
        found.add(Endpoint(name, f"http://{host}:{port['port']}"))
    return frozenset(found)
