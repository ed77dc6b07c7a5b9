"""A container's probes, asked as the kubelet asks them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp

from .api import Raw


class Probe:
    """One probe of a container: what to ask, how often, and how many answers count.

    ``patience`` multiplies the time that one answer may take: a manifest's limits are meant for a node of its
    own, and here all pods share the cores with the control plane and the tests.
    """

    def __init__(
        self,
        spec: Raw,
        *,
        address: str,
        container: Raw,
        execute: Callable[[list[str], float], Awaitable[bool]],
        patience: float,
    ) -> None:
        self._spec = spec
        self._address = address
        self._container = container
        self._execute = execute
        self.initial_delay = float(spec.get("initialDelaySeconds", 0))
        self.period = float(spec.get("periodSeconds", 10))
        self.limit = patience * float(spec.get("timeoutSeconds", 1))
        self.failures = int(spec.get("failureThreshold", 3))
        self.successes = int(spec.get("successThreshold", 1))
        self.grace: int | None = spec.get("terminationGracePeriodSeconds")
        self.problem = ""

    async def results(self) -> AsyncIterator[bool]:
        """Ask for ever; each result that has come often enough to count (again and again)."""
        await asyncio.sleep(self.initial_delay)
        last, run = None, 0
        while True:
            result = await self._ask()
            run = run + 1 if result == last else 1
            last = result
            if run >= (self.successes if result else self.failures):
                yield result
            await asyncio.sleep(self.period)

    async def _ask(self) -> bool:
        try:
            async with asyncio.timeout(self.limit):
                if request := self._spec.get("httpGet"):
                    return await self._http(request)
                if target := self._spec.get("tcpSocket"):
                    return await self._tcp(target)
                if command := self._spec.get("exec"):
                    return await self._execute(command["command"], self.limit)
        except TimeoutError:
            self.problem = f"no answer in {self.limit} s"
            return False
        raise AssertionError(f"the node stand-in does not play the probe {self._spec}")

    async def _http(self, request: Raw) -> bool:
        scheme = request.get("scheme", "HTTP").lower()
        host = request.get("host") or self._address
        path = request.get("path", "/")
        url = f"{scheme}://{host}:{self._port(request['port'])}{path if path.startswith('/') else '/' + path}"
        headers = {header["name"]: header["value"] for header in request.get("httpHeaders", [])}
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.get(url, headers=headers, ssl=False, allow_redirects=False) as answer,
            ):
                self.problem = f"HTTP probe failed with statuscode: {answer.status}"
                return 200 <= answer.status < 400
        except aiohttp.ClientError as error:
            self.problem = f"{url}: {error}"
            return False

    async def _tcp(self, target: Raw) -> bool:
        try:
            _, writer = await asyncio.open_connection(
                target.get("host") or self._address, self._port(target["port"])
            )
        except OSError as error:
            self.problem = str(error)
            return False
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return True

    def _port(self, port: int | str) -> int:
        if isinstance(port, int):
            return port
        for known in self._container.get("ports", []):
            if known.get("name") == port:
                return int(known["containerPort"])
        return int(port)
