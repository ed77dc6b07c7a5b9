"""The Kubernetes API as the node stand-in and the tests use it: dicts in and out, every call bounded.

The tests have a client of their own, apart from the operator's, so that an error in one does not hide in
both. Kinds are found by discovery, so custom resources need nothing more.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp

from .access import Access

Raw = dict[str, Any]

CALL_LIMIT = 60.0  # seconds; generous, since the control plane shares its cores with what is tested
ATTEMPTS = 5
WATCH_SECONDS = 240  # the server ends a watch after that; it is begun again
PATCH_TYPES = {
    "merge": "application/merge-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "json": "application/json-patch+json",
    "apply": "application/apply-patch+yaml",
}
_DISCOVERY = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"


class ApiError(Exception):
    """The API server's refusal, in its own words."""

    def __init__(self, status: Raw) -> None:
        super().__init__(status.get("message") or str(status))
        self.code = int(status.get("code") or 0)
        self.reason = str(status.get("reason", ""))
        self.status = status

    @property
    def is_budget(self) -> bool:
        """Whether a PodDisruptionBudget forbids an eviction."""
        causes = self.status.get("details", {}).get("causes", [])
        return any(cause.get("reason") == "DisruptionBudget" for cause in causes)


class Api:
    """A client for one set of credentials; belongs to one event loop, in which it must be closed."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self._session: aiohttp.ClientSession | None = None
        self._paths: dict[tuple[str | None, str], tuple[str, bool]] = {}

    async def close(self) -> None:
        if self._session:
            await self._session.close()

    # -- one object -----------------------------------------------------------------------------------------

    async def get(self, kind: str, name: str, namespace: str | None = None) -> Raw:
        return await self.call("GET", await self.path(kind, namespace, name))

    async def find(self, kind: str, name: str, namespace: str | None = None) -> Raw | None:
        """The object, or None where there is none."""
        try:
            return await self.get(kind, name, namespace)
        except ApiError as error:
            if error.code != 404:
                raise
            return None

    async def create(self, manifest: Raw) -> Raw:
        path = await self._path_of(manifest, collection=True)
        return await self.call("POST", path, manifest)

    async def apply(self, manifest: Raw, *, manager: str = "tests") -> Raw:
        """Server-side apply, with force."""
        query = {"fieldManager": manager, "force": "true"}
        return await self.call("PATCH", await self._path_of(manifest), manifest, query=query, patch="apply")

    async def patch(
        self,
        kind: str,
        name: str,
        namespace: str | None,
        change: Any,
        *,
        how: str = "merge",
        subresource: str = "",
    ) -> Raw:
        path = await self.path(kind, namespace, name, subresource)
        return await self.call("PATCH", path, change, patch=how)

    async def delete(
        self,
        kind: str,
        name: str,
        namespace: str | None = None,
        *,
        grace: int | None = None,
        uid: str = "",
        propagation: str = "Background",
    ) -> None:
        """Ask for the deletion; an object that is not there (or not that one) is deleted already."""
        options: Raw = {"propagationPolicy": propagation}
        if grace is not None:
            options["gracePeriodSeconds"] = grace
        if uid:
            options["preconditions"] = {"uid": uid}
        try:
            await self.call("DELETE", await self.path(kind, namespace, name), options)
        except ApiError as error:
            if error.code != 404 and not (uid and error.code == 409):
                raise

    async def evict(self, name: str, namespace: str) -> None:
        """What `kubectl drain` does to a pod. ApiError with code 429 while a budget forbids it."""
        eviction = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": name, "namespace": namespace},
        }
        await self.call("POST", await self.path("Pod", namespace, name, "eviction"), eviction)

    async def token(self, account: str, namespace: str, **spec: Any) -> Raw:
        """Status of a TokenRequest: `token` and `expirationTimestamp`."""
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        answer = await self.call(
            "POST", await self.path("ServiceAccount", namespace, account, "token"), request
        )
        status: Raw = answer["status"]
        return status

    # -- many objects ---------------------------------------------------------------------------------------

    async def items(
        self, kind: str, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> list[Raw]:
        answer = await self.call("GET", await self.path(kind, namespace), query=_selectors(labels, fields))
        items: list[Raw] = answer["items"]
        return items

    async def watch(
        self, kind: str, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> AsyncIterator[tuple[str, Raw]]:
        """("ADDED" | "MODIFIED" | "DELETED", object) for ever, and ("SYNCED", {}) after each full list.

        Survives ended connections and versions that are too old (410); what vanished in between is told as
        DELETED.
        """
        path = await self.path(kind, namespace)
        selectors = _selectors(labels, fields)
        known: dict[str, Raw] = {}
        while True:
            try:
                listed = await self.call("GET", path, query=selectors)
            except (aiohttp.ClientError, TimeoutError):
                await asyncio.sleep(0.5)
                continue
            current = {item["metadata"]["uid"]: item for item in listed["items"]}
            for uid in [uid for uid in known if uid not in current]:
                yield "DELETED", known.pop(uid)
            for uid, item in current.items():
                before = known.get(uid)
                if not before or before["metadata"]["resourceVersion"] != item["metadata"]["resourceVersion"]:
                    known[uid] = item
                    yield ("MODIFIED" if before else "ADDED"), item
            yield "SYNCED", {}
            version = listed["metadata"]["resourceVersion"]
            async for event, item in self._stream(path, selectors, version):
                uid = item["metadata"]["uid"]
                if event == "DELETED":
                    known.pop(uid, None)
                else:
                    known[uid] = item
                yield event, item

    async def _stream(
        self, path: str, selectors: Mapping[str, str], version: str
    ) -> AsyncIterator[tuple[str, Raw]]:
        """Events after ``version``, until the server says that it is too old."""
        limit = aiohttp.ClientTimeout(total=WATCH_SECONDS + CALL_LIMIT, sock_connect=CALL_LIMIT)
        while True:
            query = {
                **selectors,
                "watch": "true",
                "allowWatchBookmarks": "true",
                "resourceVersion": version,
                "timeoutSeconds": str(WATCH_SECONDS),
            }
            try:
                async with self._client().get(f"{path}?{urlencode(query)}", timeout=limit) as answer:
                    if answer.status != 200:
                        if answer.status == 410:
                            return
                        raise aiohttp.ClientError(f"watch of {path}: HTTP {answer.status}")
                    async for line in answer.content:
                        event = json.loads(line)
                        item = event["object"]
                        if event["type"] == "ERROR":
                            if item.get("code") == 410:
                                return
                            raise aiohttp.ClientError(f"watch of {path}: {item}")
                        version = item["metadata"]["resourceVersion"]
                        if event["type"] != "BOOKMARK":
                            yield event["type"], item
            except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError):
                await asyncio.sleep(0.5)

    async def wait(
        self,
        kind: str,
        name: str,
        namespace: str | None,
        holds: Callable[[Raw | None], bool],
        *,
        limit: float = 120.0,
    ) -> Raw | None:
        """The first state of an object for which ``holds``; None stands for an object that is not there."""
        state: Raw | None = None
        try:
            async with asyncio.timeout(limit):
                async for event, item in self.watch(kind, namespace, fields=f"metadata.name={name}"):
                    if event != "SYNCED":
                        state = None if event == "DELETED" else item
                    if holds(state):
                        return state
        except TimeoutError:
            pass
        shown = json.dumps(state, indent=1) if state else "not there"
        raise AssertionError(
            f"{kind} {namespace}/{name} has not become what was awaited in {limit:.0f} s: {shown}"
        )

    # -- calls ----------------------------------------------------------------------------------------------

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, str] | None = None,
        patch: str = "",
        accept: str = "application/json",
    ) -> Raw:
        """One request. Repeated is what may be: reads, and calls that an overloaded server put off."""
        headers = {"Accept": accept}
        data = None
        if body is not None:
            headers["Content-Type"] = PATCH_TYPES[patch] if patch else "application/json"
            data = json.dumps(body)
        url = f"{path}?{urlencode(query)}" if query else path
        for attempt in range(ATTEMPTS):
            last = attempt == ATTEMPTS - 1
            try:
                async with self._client().request(method, url, data=data, headers=headers) as answer:
                    text = await answer.text()
                    if answer.status < 400:
                        result: Raw = json.loads(text)
                        return result
                    error = _error(answer.status, text)
                    if answer.status != 429 or error.is_budget or last:
                        raise error
                    pause = min(float(answer.headers.get("Retry-After", 1)), 10.0)
            except (aiohttp.ClientError, TimeoutError):
                if method != "GET" or last:
                    raise
                pause = 0.2 * 2**attempt
            await asyncio.sleep(pause * random.uniform(1, 1.3))
        raise AssertionError("the last attempt answers or raises")

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            access = self.access
            context = ssl.create_default_context(cadata=access.authority or None)
            if access.certificate:
                with tempfile.TemporaryDirectory() as folder:  # ssl reads certificates from files only
                    pair = Path(folder, "certificate"), Path(folder, "key")
                    pair[1].touch(mode=0o600)
                    pair[0].write_text(access.certificate)
                    pair[1].write_text(access.key)
                    context.load_cert_chain(*pair)
            self._session = aiohttp.ClientSession(
                access.server,
                connector=aiohttp.TCPConnector(ssl=context, limit=100),
                headers={"Authorization": f"Bearer {access.token}"} if access.token else {},
                timeout=aiohttp.ClientTimeout(total=CALL_LIMIT),
                read_bufsize=1 << 22,  # a watch event is one line
            )
        return self._session

    # -- where objects are ----------------------------------------------------------------------------------

    async def path(
        self,
        kind: str,
        namespace: str | None = None,
        name: str | None = None,
        subresource: str = "",
        *,
        api_version: str | None = None,
    ) -> str:
        """Path of a kind; of one object if it is named. A kind in several groups is the first group's."""
        if (api_version, kind) not in self._paths:
            await self._discover()
        try:
            base, namespaced = self._paths[api_version, kind]
        except KeyError:
            raise LookupError(
                f"the API server knows no kind {kind} in {api_version or 'any group'}"
            ) from None
        version, plural = base.rsplit("/", 1)
        parts = [version]
        if namespaced and namespace:
            parts += ["namespaces", namespace]
        parts += [part for part in (plural, name, subresource) if part]
        return "/".join(parts)

    async def _path_of(self, manifest: Raw, *, collection: bool = False) -> str:
        metadata = manifest["metadata"]
        name = None if collection else metadata["name"]
        namespace = metadata.get("namespace", "default")
        return await self.path(manifest["kind"], namespace, name, api_version=manifest["apiVersion"])

    async def _discover(self) -> None:
        for root in ("/api", "/apis"):
            answer = await self.call("GET", root, accept=_DISCOVERY)
            for group in answer["items"]:
                name = group["metadata"].get("name", "")
                for version in group["versions"]:
                    api_version = f"{name}/{version['version']}" if name else version["version"]
                    for resource in version["resources"]:
                        kind = resource.get("responseKind", {}).get("kind")
                        if kind:
                            place = (
                                f"{root}/{api_version}/{resource['resource']}",
                                resource["scope"] == "Namespaced",
                            )
                            self._paths.setdefault((None, kind), place)
                            self._paths.setdefault((api_version, kind), place)


def _selectors(labels: str, fields: str) -> dict[str, str]:
    return {name: value for name, value in (("labelSelector", labels), ("fieldSelector", fields)) if value}


def _error(code: int, text: str) -> ApiError:
    try:
        status = json.loads(text)
    except json.JSONDecodeError:
        status = None
    return ApiError(status if isinstance(status, dict) else {"code": code, "message": text[:500]})
