"""A stand-in for the Kubernetes API server: real HTTP, resource versions, watches, conflicts, and faults on
demand.

It knows what the operator relies on and no more: no schemas, no defaults, no controllers but owner
references' garbage collection. Server-side apply is a merge that notes who wrote, not which fields. The
end-to-end tests run against a real one.
"""

from __future__ import annotations

import asyncio
import copy
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from aiohttp import web
from kubernetes.aio.client.configuration import Configuration

from blockyard.operator.kube import COMPANIONS, EVENT, KV_MOVE, LEASE, LLM_SERVICE, NODE, POD, SECRET, Kind

Raw = dict[str, Any]
# kopf asks whether the cluster has these before it watches anything.
ELSE = (
    Kind("v1", "Namespace", "namespaces", namespaced=False),
    Kind(
        "apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions", namespaced=False
    ),
)
KINDS = {
    kind.plural: kind for kind in (*COMPANIONS, LLM_SERVICE, KV_MOVE, POD, NODE, SECRET, EVENT, LEASE, *ELSE)
}
WITH_STATUS = {LLM_SERVICE.plural, POD.plural, NODE.plural, "deployments", "poddisruptionbudgets"}


@dataclass
class Fault:
    """The next ``times`` matching calls do not reach the store, or their answers do not reach the client."""

    matches: Callable[[str, str], bool]  # of method and path
    times: int = 1
    code: int = 503  # 0: the connection is cut
    headers: dict[str, str] = field(default_factory=dict)
    after: bool = False  # carried out, and only then failed
    message: str = "a fault of the test"


def kubeconfig(path: Path, server: str, **user: Any) -> Path:
    """A file that leads to a server as a user with these credentials."""
    body = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": server, "insecure-skip-tls-verify": True}}],
        "users": [{"name": "u", "user": user}],
    }
    path.write_text(yaml.safe_dump(body))
    return path


class Refused(Exception):
    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


class ApiServer:
    """``async with ApiServer() as server``; then ``server.credentials()`` for clients."""

    def __init__(self) -> None:
        self.version = 100
        self.objects: dict[str, dict[tuple[str, str], Raw]] = {plural: {} for plural in KINDS}
        self.history: list[tuple[int, str, str, Raw]] = []  # version, plural, event, object
        self.calls: list[tuple[str, str]] = []  # method and path of every call that came in
        self.details: list[tuple[str, str, str]] = []  # method, content type and query of each
        self.faults: list[Fault] = []
        self.horizon = 0  # watches from before it get 410
        self.missing: set[str] = set()  # plurals of kinds that this cluster does not have
        self.gate: asyncio.Event | None = None  # if set, writes wait for it
        self._changed = asyncio.Condition()
        self._called = asyncio.Condition()
        self._watches: dict[asyncio.Task[Any], asyncio.Transport | None] = {}

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cut_watches()
        await self._runner.cleanup()

    def credentials(self) -> Configuration:
        found = Configuration()
        found.host = self.url
        return found

    # ── For tests ─────────────────────────────────────────────────────────────────────────────────

    def writes(self, plural: str = "") -> list[tuple[str, str]]:
        return [
            call
            for call in self.calls
            if call[0] != "GET" and f"/{plural}" in call[1] and "leases" not in call[1]
        ]

    def get(self, kind: Kind, name: str, namespace: str = "default") -> Raw:
        return self.objects[kind.plural][(namespace if kind.namespaced else "", name)]

    def all(self, kind: Kind) -> list[Raw]:
        return list(self.objects[kind.plural].values())

    async def put(self, kind: Kind, body: Raw) -> Raw:
        """Create or replace, status included, as whoever else writes to the cluster does."""
        key = self._key(kind, body)
        before = self.objects[kind.plural].get(key)
        body = copy.deepcopy(body)
        body.setdefault("apiVersion", kind.api)
        body.setdefault("kind", kind.name)
        if before is None:
            self._stamp(body)
        return await self._store(kind, key, body, before)

    async def change(self, kind: Kind, name: str, patch: Raw, namespace: str = "default") -> Raw:
        """Merge something into an object, status included."""
        key = (namespace if kind.namespaced else "", name)
        before = self.objects[kind.plural][key]
        return await self._store(kind, key, merge(before, patch), before)

    async def remove(self, kind: Kind, name: str, namespace: str = "default") -> None:
        await self._drop(kind, (namespace if kind.namespaced else "", name))

    async def called(self, times: int) -> None:
        """Until so many calls have come in."""
        async with self._called:
            await self._called.wait_for(lambda: len(self.calls) >= times)

    async def until(self, holds: Callable[[], Any], limit: float = 30.0) -> None:
        """Until something holds of what is stored; asked whenever that changes."""
        async with asyncio.timeout(limit), self._changed:
            await self._changed.wait_for(holds)

    async def cut_watches(self) -> None:
        """End all watches, as a load balancer or a restart of the API server does."""
        for task, transport in list(self._watches.items()):
            if transport is not None:
                transport.abort()
            task.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)

    # ── The store ─────────────────────────────────────────────────────────────────────────────────

    @staticmethod
    def _key(kind: Kind, body: Raw) -> tuple[str, str]:
        return (body["metadata"].get("namespace", "") if kind.namespaced else "", body["metadata"]["name"])

    @staticmethod
    def _stamp(body: Raw) -> None:
        body["metadata"]["uid"] = str(uuid.uuid4())
        body["metadata"]["creationTimestamp"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        body["metadata"]["generation"] = 1

    async def _store(
        self, kind: Kind, key: tuple[str, str], body: Raw, before: Raw | None, manager: str = "somebody"
    ) -> Raw:
        if before is not None:
            if without_version(body) == without_version(before):
                return before
            if body.get("spec") != before.get("spec"):
                body["metadata"]["generation"] = before["metadata"].get("generation", 1) + 1
            if (
                "deletionTimestamp" in body["metadata"]
                and not body["metadata"].get("finalizers")
                and kind != POD
            ):
                self.objects[kind.plural][key] = body
                await self._drop(kind, key)
                return body
        self.version += 1
        body["metadata"]["resourceVersion"] = str(self.version)
        self._sign(body, before, manager)
        self.objects[kind.plural][key] = body
        await self._tell(kind, "ADDED" if before is None else "MODIFIED", body)
        return body

    def _sign(self, body: Raw, before: Raw | None, manager: str) -> None:
        """Note who has written, and whether it was the status alone."""
        parts = (body.keys() | (before or {}).keys()) - {"metadata", "status"}
        only_status = (
            before is not None
            and all(body.get(part) == before.get(part) for part in parts)
            and body["metadata"].get("labels") == before["metadata"].get("labels")
        )
        entry = {"manager": manager, "time": f"{self.version:08d}"} | (
            {"subresource": "status"} if only_status else {}
        )
        others = [
            each
            for each in (before or {"metadata": {}})["metadata"].get("managedFields") or ()
            if (each["manager"], each.get("subresource")) != (manager, entry.get("subresource"))
        ]
        body["metadata"]["managedFields"] = [*others, entry]

    async def _drop(self, kind: Kind, key: tuple[str, str]) -> Raw:
        """The object's last state, with the version of its deletion."""
        body = self.objects[kind.plural].pop(key)
        self.version += 1
        last = copy.deepcopy(body)
        last["metadata"]["resourceVersion"] = str(self.version)
        await self._tell(kind, "DELETED", last)
        for plural, objects in self.objects.items():
            for other, dependent in list(objects.items()):
                owners = dependent["metadata"].get("ownerReferences") or ()
                if any(owner["uid"] == body["metadata"]["uid"] for owner in owners):
                    await self._drop(KINDS[plural], other)
        return last

    async def _tell(self, kind: Kind, event: str, body: Raw) -> None:
        self.history.append((self.version, kind.plural, event, copy.deepcopy(body)))
        async with self._changed:
            self._changed.notify_all()

    # ── HTTP ──────────────────────────────────────────────────────────────────────────────────────

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        method, path = request.method, request.path
        await request.read()  # a client that gives up while its call waits has said all
        self.calls.append((method, path))
        async with self._called:
            self._called.notify_all()
        self.details.append((method, request.headers.get("Content-Type", ""), request.query_string))
        fault = next((fault for fault in self.faults if fault.times and fault.matches(method, path)), None)
        if fault is not None:
            fault.times -= 1
            if fault.after:
                await self._answer(request)
            if fault.code == 0:
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            return failure(fault.code, "Fault", fault.message, fault.headers)
        return await self._answer(request)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if self.gate is not None and request.method != "GET":
            await self.gate.wait()
        try:
            return await self._route(request)
        except Refused as error:
            return failure(error.code, error.reason, str(error))

    async def _route(self, request: web.Request) -> web.StreamResponse:
        parts = request.path.strip("/").split("/")
        if (discovered := self._discover(parts)) is not None:
            return web.json_response(discovered)
        rest = parts[2:] if parts[0] == "api" else parts[3:]
        api = "/".join(parts[1 : len(parts) - len(rest)])
        namespace = ""
        if len(rest) > 2 and rest[0] == "namespaces":
            namespace, rest = rest[1], rest[2:]
        kind = KINDS.get(rest[0])
        if kind is None or kind.api != api or kind.plural in self.missing:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        if len(rest) == 1:
            if request.method == "POST":
                made = await self._create(kind, namespace, await request.json(), manager_of(request))
                return web.json_response(made, status=201)
            if request.query.get("watch") == "true":
                return await self._watch(request, kind, namespace)
            return web.json_response(self._list(request, kind, namespace))
        key, subresource = (namespace, rest[1]), rest[2] if len(rest) > 2 else ""
        return web.json_response(await self._one(request, kind, key, subresource))

    def _discover(self, parts: list[str]) -> Raw | None:
        kinds = [kind for kind in KINDS.values() if kind.plural not in self.missing]
        if parts == ["api"]:
            return {"versions": ["v1"]}
        if parts == ["apis"]:
            groups = sorted({kind.api for kind in kinds if "/" in kind.api})
            return {
                "groups": [
                    {
                        "name": api.split("/")[0],
                        "versions": [{"groupVersion": api, "version": api.split("/")[1]}],
                        "preferredVersion": {"groupVersion": api, "version": api.split("/")[1]},
                    }
                    for api in groups
                ]
            }
        api = "/".join(parts[1:])
        if api not in {kind.api for kind in kinds}:
            return None
        verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
        return {
            "resources": [
                {
                    "name": kind.plural + suffix,
                    "singularName": kind.name.lower(),
                    "kind": kind.name,
                    "namespaced": kind.namespaced,
                    "verbs": verbs,
                }
                for kind in kinds
                if kind.api == api
                for suffix in ("", "/status")
            ]
        }

    def _list(self, request: web.Request, kind: Kind, namespace: str) -> Raw:
        found = [
            body
            for (where, _), body in sorted(self.objects[kind.plural].items())
            if namespace in ("", where) and selected(request, body)
        ]
        begin, version = 0, self.version
        if token := request.query.get("continue"):
            begin, version = map(int, token.split(":"))
        limit = int(request.query.get("limit") or 0) or len(found) + 1
        more = {"continue": f"{begin + limit}:{version}"} if begin + limit < len(found) else {}
        items = [{k: v for k, v in body.items() if k not in ("kind", "apiVersion")} for body in found]
        return {
            "apiVersion": kind.api,
            "kind": f"{kind.name}List",
            "metadata": {"resourceVersion": str(version), **more},
            "items": items[begin : begin + limit],
        }

    async def _create(self, kind: Kind, namespace: str, body: Raw, manager: str) -> Raw:
        body["metadata"]["namespace"] = namespace
        key = (namespace, body["metadata"]["name"])
        if key in self.objects[kind.plural]:
            raise Refused(409, "AlreadyExists", f'{kind.plural} "{key[1]}" already exists')
        self._stamp(body)
        return await self._store(kind, key, body, None, manager)

    async def _one(self, request: web.Request, kind: Kind, key: tuple[str, str], subresource: str) -> Raw:
        before = self.objects[kind.plural].get(key)
        content = request.headers.get("Content-Type", "")
        apply = request.method == "PATCH" and content == "application/apply-patch+yaml"
        if before is None:
            if apply:
                return await self._create(kind, key[0], await request.json(), manager_of(request))
            raise Refused(404, "NotFound", f'{kind.plural} "{key[1]}" not found')
        if request.method == "GET":
            return before
        if request.method == "DELETE":
            return await self._delete(kind, key, before, json.loads(await request.text() or "{}"))
        patch = await request.json()
        if request.method == "PUT":
            after = patch
        elif content == "application/json-patch+json":
            after = patched(before, patch)
        else:
            after = merge(before, patch)
            if apply and "selector" in patch.get("spec", {}):
                after["spec"]["selector"] = patch["spec"]["selector"]  # one value, for all its keys
        given = patch.get("metadata", {}) if isinstance(patch, dict) else {}
        for name in ("uid", "resourceVersion"):
            if given.get(name, before["metadata"][name]) != before["metadata"][name]:
                raise Refused(409, "Conflict", f"the object has been modified: {name}")
        if kind.plural in WITH_STATUS:
            kept = "status" if subresource != "status" else "spec"
            after = {**after, kept: before.get(kept)}
            if after[kept] is None:
                del after[kept]
        return await self._store(kind, key, after, before, manager_of(request))

    async def _delete(self, kind: Kind, key: tuple[str, str], before: Raw, options: Raw) -> Raw:
        wanted = options.get("preconditions", {}).get("uid")
        if wanted not in (None, before["metadata"]["uid"]):
            raise Refused(409, "Conflict", "the UID in the precondition does not match")
        graceful = (
            kind == POD and before.get("spec", {}).get("nodeName") and options.get("gracePeriodSeconds") != 0
        )
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        after = merge(before, {"metadata": {"deletionTimestamp": now}})
        if before["metadata"].get("finalizers") or graceful:
            return await self._store(kind, key, after, before)
        last = await self._drop(kind, key)
        # A pod that goes at once is shown as it was; of everything else the answer is a Status.
        return merge(after, last) if kind == POD else {"kind": "Status", "status": "Success"}

    async def _watch(self, request: web.Request, kind: Kind, namespace: str) -> web.StreamResponse:
        since = int(request.query.get("resourceVersion") or 0)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        task = asyncio.current_task()
        assert task is not None
        self._watches[task] = request.transport
        try:
            if since < self.horizon:
                error = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired"}}
                await response.write(json.dumps(error).encode() + b"\n")
                return response
            position = 0
            while True:
                while position < len(self.history):
                    version, plural, event, body = self.history[position]
                    position += 1
                    where = body["metadata"].get("namespace", "")
                    if version <= since or plural != kind.plural or namespace not in ("", where):
                        continue
                    if selected(request, body):
                        line = json.dumps({"type": event, "object": body}).encode() + b"\n"
                        await response.write(line)
                async with self._changed:
                    if position == len(self.history):
                        await self._changed.wait()
        except ConnectionError:
            return response
        finally:
            self._watches.pop(task, None)


def manager_of(request: web.Request) -> str:
    return request.query.get("fieldManager", "unknown")


def failure(code: int, reason: str, message: str, headers: dict[str, str] | None = None) -> web.Response:
    body = {"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": message}
    return web.json_response(body, status=code, headers=headers)


def selected(request: web.Request, body: Raw) -> bool:
    labels = body["metadata"].get("labels") or {}
    wanted = request.query.get("labelSelector", "")
    return all(
        labels.get(name) == value for name, value in (part.split("=") for part in wanted.split(",") if part)
    )


def merge(before: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = copy.deepcopy(before) if isinstance(before, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merge(result.get(name), value)
    return result


def patched(before: Raw, operations: list[Raw]) -> Raw:
    """RFC 6902, of which test and add at dictionary keys are needed."""
    result = copy.deepcopy(before)
    for operation in operations:
        *parents, last = operation["path"].strip("/").split("/")
        target = result
        for name in parents:
            target = target[name]
        if operation["op"] == "test":
            if target.get(last) != operation["value"]:
                raise Refused(422, "Invalid", f"testing path {operation['path']} failed")
        else:
            assert operation["op"] == "add", operation
            target[last] = operation["value"]
    return result


def without_version(body: Raw) -> Raw:
    return {**body, "metadata": {**body["metadata"], "resourceVersion": ""}}
