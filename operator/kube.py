"""A client of the Kubernetes API, as much as the operator needs: raw dicts in and out, every call bounded.

It uses the asyncio side of the official client for credentials (in-cluster, kubeconfig, exec plugins), TLS
and proxies, but not the official models: they refuse unknown fields, and there is none for a custom resource.
Measured: importing that client beside kopf costs 0.1 s and 1 MB (60 MB against 59 MB; kopf and aiohttp are
the rest), so a client of our own would save nothing.

This file adds timeouts, bounded retries of calls that may be repeated, a bound on concurrent calls, one
exception tree, and server-side apply. A write either names the object (create, apply) or carries a
precondition (uid or resourceVersion), so repeating it after its answer was lost does no harm.

    KubeError
    ├── NotLeading       this process must not write: another operator may act by now
    ├── Unreachable      no answer in time, after all attempts
    └── ApiError         the API server refused the call; ``refusals.explain`` has words for people
        ├── NotFound     404, also for a kind that the cluster does not have
        ├── Conflict     409: exists already, or a precondition does not hold
        ├── Gone         410: the snapshot of a list that is read in pages has expired
        ├── Forbidden    401 and 403
        └── Invalid      422: the object is refused, or the test of a JSON patch failed
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
from kubernetes.aio import config as kubeconfig
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.config.incluster_config import InClusterConfigLoader

from .api import GROUP, VERSION
from .settings import OperatorSettings, SettingsError

FIELD_MANAGER = "blockyard-operator"
ATTEMPTS = 5
CALL_TIMEOUT = 15.0  # seconds for one attempt; a hanging admission webhook is given up after 10 of them
LIST_TIMEOUT = 30.0
BACKOFF = 0.2  # seconds before the second attempt; doubled each time
LONGEST_PAUSE = 10.0  # seconds between two attempts, whatever Retry-After asks for
PAGE_SIZE = 500  # objects of a list that are held as JSON at once
CONCURRENT_CALLS = 32
WATCH_SECONDS = 240  # a watch is made anew so often, so that a dead connection is noticed
_JSON = "application/json"
_METADATA = f"{_JSON};as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
_METADATA_LIST = f"{_JSON};as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"

Raw = dict[str, Any]


class KubeError(Exception):
    """A call to the API server failed."""


class NotLeading(KubeError):
    """This process must not write: it does not hold the Lease, or cannot be sure that it still does."""


class Unreachable(KubeError):
    """No answer in time, after all attempts. ``why`` is the message without the call."""

    def __init__(self, why: str, call: str = "") -> None:
        super().__init__(f"{call}: {why}" if call else why)
        self.why = why


class ApiError(KubeError):
    """The API server's refusal. As a string it is the call and the raw answer: that is for the log alone.

    ``reason``, ``message`` and ``details`` are those of the Status that was answered; ``verb``, ``kind`` and
    ``name`` say what was asked for, and ``body`` is the object that was sent, but for Secrets.
    """

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        *,
        call: str = "",
        verb: str = "",
        kind: str = "",
        name: str = "",
        details: Raw | None = None,
        body: Raw | None = None,
    ) -> None:
        super().__init__(f"{call}: {message}" if call else message)
        self.code = code
        self.reason = reason
        self.message = message
        self.details: Raw = details or {}
        self.verb, self.kind, self.name = verb, kind, name
        self.body: Raw = body or {}


class NotFound(ApiError):
    pass


class Conflict(ApiError):
    pass


class Gone(ApiError):
    pass


class Forbidden(ApiError):
    pass


class Invalid(ApiError):
    pass


_ERRORS: dict[int, type[ApiError]] = {
    401: Forbidden,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    422: Invalid,
}
_WEBHOOK = "admission webhook "  # begins the message of a refusal whose code is the webhook's choice


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of object and where the API server keeps it."""

    api: str  # "v1" or "group/version"
    name: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str = "") -> str:
        parts = ["api" if "/" not in self.api else "apis", self.api]
        if namespace and self.namespaced:
            parts += ["namespaces", quote(namespace, safe="")]
        parts.append(self.plural)
        if name:
            parts.append(quote(name, safe=""))
        if subresource:
            parts.append(subresource)
        return "/" + "/".join(parts)


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a list, and the resourceVersion of the snapshot that all pages of that list show."""

    items: list[Raw]
    version: int


@dataclass(frozen=True, slots=True)
class Change:
    """What a watch tells: an object as it is now, or as it was when it went."""

    object: Raw
    deleted: bool


LLM_SERVICE = Kind(f"{GROUP}/{VERSION}", "LLMService", "llmservices")
KV_MOVE = Kind(f"{GROUP}/{VERSION}", "KVMove", "kvmoves")
POD = Kind("v1", "Pod", "pods")
NODE = Kind("v1", "Node", "nodes", namespaced=False)
SECRET = Kind("v1", "Secret", "secrets")
EVENT = Kind("v1", "Event", "events")
SERVICE = Kind("v1", "Service", "services")
SERVICE_ACCOUNT = Kind("v1", "ServiceAccount", "serviceaccounts")
DEPLOYMENT = Kind("apps/v1", "Deployment", "deployments")
ROLE = Kind("rbac.authorization.k8s.io/v1", "Role", "roles")
ROLE_BINDING = Kind("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings")
DISRUPTION_BUDGET = Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets")
NETWORK_POLICY = Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
SERVICE_MONITOR = Kind("monitoring.coreos.com/v1", "ServiceMonitor", "servicemonitors")
LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")

# The kinds that an LLMService's companions may have, in the order in which a re-list reads them.
COMPANIONS = (
    SERVICE_ACCOUNT,
    ROLE,
    ROLE_BINDING,
    SERVICE,
    DISRUPTION_BUDGET,
    NETWORK_POLICY,
    DEPLOYMENT,
    SERVICE_MONITOR,
)
_KINDS = {
    (kind.api, kind.name): kind for kind in (*COMPANIONS, LLM_SERVICE, KV_MOVE, POD, SECRET, EVENT, LEASE)
}


def kind_of(body: Raw) -> Kind:
    """The kind of an object that the operator made or is about to make."""
    return _KINDS[body["apiVersion"], body["kind"]]


def controller(body: Raw) -> Raw:
    """The reference to the object that owns this one as its controller; empty if there is none."""
    owners: list[Raw] = body["metadata"].get("ownerReferences") or []
    return next((owner for owner in owners if owner.get("controller")), {})


def controller_uid(body: Raw) -> str:
    """uid of the object that owns this one as its controller; empty if there is none."""
    return str(controller(body).get("uid", ""))


def writers(body: Raw) -> list[str]:
    """Who has written the object, apart from its status, by field manager: who wrote last comes first."""
    entries: list[Raw] = body["metadata"].get("managedFields") or []
    known = [entry for entry in entries if entry.get("subresource") != "status"]
    known.sort(key=lambda entry: str(entry.get("time", "")), reverse=True)
    return list(dict.fromkeys(str(entry.get("manager", "")) for entry in known))


async def load_credentials(settings: OperatorSettings) -> Configuration:
    """The given kubeconfig, else the pod's service account, else the user's own kubeconfig."""
    try:
        if settings.kubeconfig is not None:
            return await _from_kubeconfig(str(settings.kubeconfig))
        try:
            return _from_serviceaccount(settings.serviceaccount)
        except kubeconfig.ConfigException as error:
            try:
                return await _from_kubeconfig(None)
            except kubeconfig.ConfigException:
                raise error from None
    except kubeconfig.ConfigException as error:
        where = settings.kubeconfig or settings.serviceaccount
        raise SettingsError(f"no credentials for the Kubernetes API in {where}: {error}") from None


def _from_serviceaccount(folder: Path) -> Configuration:
    """The pod's credentials; the token's file is read again every minute, since the kubelet renews it."""
    found = Configuration()
    token, ca = str(folder / "token"), str(folder / "ca.crt")
    loader = InClusterConfigLoader(token, ca)  # type: ignore[no-untyped-call]  # no types in the client
    loader.load_and_set(found)  # type: ignore[no-untyped-call]  # no types in the client
    return found


async def _from_kubeconfig(path: str | None) -> Configuration:
    found = Configuration()
    await kubeconfig.load_kube_config(path, client_configuration=found)  # type: ignore[no-untyped-call]  # as above
    return found


class Kube:
    """A client with one connection pool. ``count(verb, kind, code)`` is called after every attempt."""

    def __init__(
        self,
        credentials: Configuration,
        count: Callable[[str, str, int], None] | None = None,
        renew: Callable[[], Awaitable[Configuration]] | None = None,
    ) -> None:
        self.credentials = credentials
        self.may_write: Callable[[], bool] = lambda: True  # not asked for writes to Leases
        credentials.connection_pool_maxsize = 0  # watches hold connections; calls are bounded below
        self._client = ApiClient(credentials)
        self._load = renew
        self._count = count
        self._slots = asyncio.Semaphore(CONCURRENT_CALLS)

    @classmethod
    async def connect(cls, settings: OperatorSettings, count: Callable[[str, str, int], None]) -> Kube:
        """A client with the credentials that the settings lead to. SettingsError if there are none."""
        return cls(await load_credentials(settings), count, lambda: load_credentials(settings))

    async def close(self) -> None:
        await self._client.close()  # type: ignore[no-untyped-call]  # the client has no types there

    # ── Reading ───────────────────────────────────────────────────────────────────────────────────

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Raw | None:
        """The object as it is now; None if there is none."""
        try:
            return await self._call("get", kind, namespace, name)
        except NotFound:
            return None

    async def pages(
        self, kind: Kind, namespace: str | None = None, labels: str = "", *, metadata_only: bool = False
    ) -> AsyncIterator[Page]:
        """All objects as they are now, in pages of one moment. Gone if reading them takes minutes."""
        query = {"limit": str(PAGE_SIZE), **({"labelSelector": labels} if labels else {})}
        accept = _METADATA_LIST if metadata_only else _JSON
        while True:
            found = await self._call("list", kind, namespace, query=query, limit=LIST_TIMEOUT, accept=accept)
            yield Page(found.get("items") or [], int(found["metadata"]["resourceVersion"]))
            after = found["metadata"].get("continue")
            if not after:
                return
            query["continue"] = after

    async def watch_metadata(
        self, kind: Kind, namespace: str | None, labels: str, version: int
    ) -> AsyncIterator[Change]:
        """The metadata of what changes after ``version``, for WATCH_SECONDS.

        Gone if the API server no longer knows that version: list again. KubeError for any other end.
        """
        query = {
            "watch": "true",
            "labelSelector": labels,
            "resourceVersion": str(version),
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        url = f"{self.credentials.host}{kind.path(namespace)}?{urlencode(query)}"
        headers = {"Accept": _METADATA, "User-Agent": FIELD_MANAGER}
        if authorization := await self.authorization():
            headers["Authorization"] = authorization
        limit = aiohttp.ClientTimeout(total=WATCH_SECONDS + CALL_TIMEOUT, sock_connect=CALL_TIMEOUT)
        try:
            answer = (await self._client.call_api("GET", url, headers, _request_timeout=limit)).response
            try:
                self._counted("watch", kind, answer.status)
                if answer.status != 200:
                    said = _parsed(await answer.read())
                    raise _refusal("watch", kind, kind.path(namespace), answer.status, said)
                # Not line by line: the reader has a limit for lines, and an object may be longer.
                rest = b""
                async for data in answer.content.iter_any():
                    *lines, rest = (rest + data).split(b"\n")
                    for line in filter(None, lines):
                        event = json.loads(line)
                        if event["type"] == "ERROR":
                            said = event["object"]
                            code = int(said.get("code") or 500)
                            raise _refusal("watch", kind, kind.path(namespace), code, said)
                        yield Change(event["object"], event["type"] == "DELETED")
            finally:
                answer.close()
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            self._counted("watch", kind, 0)
            raise Unreachable(repr(error), f"watch {kind.path(namespace)}") from error

    # ── Writing ───────────────────────────────────────────────────────────────────────────────────

    async def create(self, body: Raw) -> Raw:
        """Create an object. If it exists with the same controller, the answer of an earlier attempt was lost:
        return it.
        """
        kind, namespace, name = kind_of(body), body["metadata"]["namespace"], body["metadata"]["name"]
        query = {"fieldManager": FIELD_MANAGER}
        try:
            return await self._call("create", kind, namespace, method="POST", query=query, body=body)
        except Conflict:
            found = await self.get(kind, namespace, name)
            if found is None or controller_uid(found) != controller_uid(body) or not controller_uid(body):
                raise
            return found

    async def apply(self, body: Raw, *, force: bool) -> Raw:
        """Server-side apply: the fields in ``body`` become ours; other fields stay.

        With ``force`` whoever set them; without, Conflict if somebody else has set one to another value.
        Conflict too if metadata.uid is given and the object has another one.
        """
        kind = kind_of(body)
        return await self._call(
            "patch",
            kind,
            body["metadata"]["namespace"],
            body["metadata"]["name"],
            method="PATCH",
            query={"fieldManager": FIELD_MANAGER, "force": str(force).lower()},
            body=body,
            content="application/apply-patch+yaml",
        )

    async def merge(self, kind: Kind, namespace: str, name: str, patch: Raw) -> Raw:
        """Merge patch. Conflict if it has a metadata.uid or resourceVersion that the object no longer has."""
        return await self._call(
            "patch",
            kind,
            namespace,
            name,
            method="PATCH",
            query={"fieldManager": FIELD_MANAGER},
            body=patch,
            content="application/merge-patch+json",
        )

    async def set_status(self, kind: Kind, namespace: str, name: str, uid: str, status: Raw) -> Raw:
        """Replace the whole status of an object. Invalid if that name belongs to another uid by now."""
        return await self._call(
            "patch",
            kind,
            namespace,
            name,
            subresource="status",
            method="PATCH",
            query={"fieldManager": FIELD_MANAGER},
            body=[
                {"op": "test", "path": "/metadata/uid", "value": uid},
                {"op": "add", "path": "/status", "value": status},
            ],
            content="application/json-patch+json",
        )

    async def replace(self, body: Raw) -> Raw:
        """Write the whole object, in one attempt; Conflict if it has changed since it was read."""
        namespace, name = body["metadata"]["namespace"], body["metadata"]["name"]
        return await self._call("update", kind_of(body), namespace, name, method="PUT", body=body, attempts=1)

    async def delete(
        self, kind: Kind, namespace: str, name: str, uid: str = "", grace_seconds: int | None = None
    ) -> Raw | None:
        """Delete the object with this uid -> the object if it terminates later, None if it is gone."""
        options: Raw = {"propagationPolicy": "Background"}
        if uid:
            options["preconditions"] = {"uid": uid}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        try:
            found = await self._call("delete", kind, namespace, name, method="DELETE", body=options)
        except NotFound:
            return None
        except Conflict:
            standing = await self.get(kind, namespace, name)
            if standing is not None and (not uid or standing["metadata"]["uid"] == uid):
                raise
            return None
        return found if "deletionTimestamp" in (found.get("metadata") or {}) else None

    # ── One call ──────────────────────────────────────────────────────────────────────────────────

    async def _call(
        self,
        verb: str,
        kind: Kind,
        namespace: str | None,
        name: str | None = None,
        *,
        subresource: str = "",
        method: str = "GET",
        query: dict[str, str] | None = None,
        body: Any = None,
        content: str = "application/json",
        accept: str = _JSON,
        limit: float = CALL_TIMEOUT,
        attempts: int = ATTEMPTS,
    ) -> Raw:
        path = kind.path(namespace, name, subresource)
        url = self.credentials.host + path + (f"?{urlencode(query)}" if query else "")
        renewed = False
        guarded = verb not in ("get", "list") and kind is not LEASE
        for attempt in range(1, attempts + 1):
            pause = min(BACKOFF * 2 ** (attempt - 1), LONGEST_PAUSE) * random.uniform(0.5, 1.5)
            try:
                async with self._slots:
                    if guarded and not self.may_write():
                        raise NotLeading(f"{verb} {path}: the Lease is not held")
                    code, headers, data = await self._send(method, url, accept, content, body, limit)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                self._counted(verb, kind, 0)
                if attempt == attempts:
                    what = str(error) or f"no answer in {limit:g} s"
                    raise Unreachable(f"{what} ({attempts} attempts)", f"{verb} {path}") from error
            else:
                self._counted(verb, kind, code)
                if code < 400:
                    return data
                if code == 401 and not renewed:
                    # Tokens of exec plugins and OIDC expire; the next attempt uses a new one.
                    renewed = True
                    await self._renew()
                elif (code != 429 and code < 500) or attempt == attempts:
                    raise _refusal(verb, kind, path, code, data, name or "", body)
                elif (wanted := headers.get("Retry-After", "")).isdigit():
                    pause = max(pause, min(float(wanted), LONGEST_PAUSE))
            await asyncio.sleep(pause)
        raise Unreachable(f"unauthorized ({attempts} attempts)", f"{verb} {path}")

    def _counted(self, verb: str, kind: Kind, code: int) -> None:
        if self._count is not None:
            self._count(verb, kind.name, code)

    async def _send(
        self, method: str, url: str, accept: str, content: str, body: Any, limit: float
    ) -> tuple[int, Any, Raw]:
        headers = {"Accept": accept, "Content-Type": content, "User-Agent": FIELD_MANAGER}
        if authorization := await self.authorization():
            headers["Authorization"] = authorization
        async with asyncio.timeout(limit):
            response = await self._client.call_api(
                method, url, headers, body, _request_timeout=aiohttp.ClientTimeout(total=limit)
            )
            data = await response.read()  # type: ignore[no-untyped-call]  # the client has no types there
        return response.status, response.headers, _parsed(data)

    async def authorization(self) -> str | None:
        """The Authorization header for the next request, None for client certificates."""
        header = await self.credentials.get_api_key_with_prefix("BearerToken", alias="authorization")
        if header is None and self.credentials.username:
            return str(self.credentials.get_basic_auth_token())
        return None if header is None else str(header)

    async def _renew(self) -> None:
        if self._load is not None:
            try:
                fresh = await self._load()
            except SettingsError as error:  # a file that cannot be read at the moment
                raise Unreachable(f"the credentials cannot be renewed: {error}") from error
            self.credentials.api_key = fresh.api_key
            self.credentials.refresh_api_key_hook = fresh.refresh_api_key_hook


def _parsed(data: bytes) -> Raw:
    try:
        found = json.loads(data) if data else {}
    except ValueError:  # a proxy's page
        found = {"message": data[:500].decode(errors="replace")}
    return found if isinstance(found, dict) else {"message": str(found)}


def _refusal(
    verb: str, kind: Kind, path: str, code: int, data: Raw, name: str = "", body: Any = None
) -> ApiError:
    """The error for an answer. ``body`` is what was sent."""
    message, details = str(data.get("message") or f"HTTP status {code}"), data.get("details")
    sent = body if isinstance(body, dict) else {}
    # Not Conflict or NotFound for a webhook's denial, for then it says nothing of what is there.
    of_kind = ApiError if message.startswith(_WEBHOOK) else _ERRORS.get(code, ApiError)
    return of_kind(
        code,
        str(data.get("reason") or ""),
        message,
        call=f"{verb} {path}",
        verb=verb,
        kind=kind.name,
        name=name or str((sent.get("metadata") or {}).get("name") or ""),
        details=details if isinstance(details, dict) else {},
        body={} if kind is SECRET else sent,
    )
