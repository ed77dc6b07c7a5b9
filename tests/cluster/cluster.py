"""A cluster as tests use it: plain calls that wait, on top of the asyncio client and node stand-in."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from .access import Access
from .api import Api, ApiError, Raw
from .control_plane import ControlPlane
from .network import PodNetwork
from .node import NodeStandIn

T = TypeVar("T")
LIMIT = 300.0  # seconds for any one call


class Cluster:
    """The control plane of this test run, or the user's own.

    ``api`` and everything of ``nodes()`` are coroutines of one event loop, which has a thread of its own:
    give them to ``run``.
    """

    def __init__(
        self, access: Access, folder: Path, programs: Mapping[str, Path], control_plane: ControlPlane | None
    ) -> None:
        self.access = access
        self.folder = folder
        self.control_plane = control_plane  # None: the cluster is the user's
        self._programs = programs
        self.kubeconfig = access.write_kubeconfig(folder / "kubeconfig")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cluster", daemon=True)
        self._thread.start()
        self.api = Api(access)
        self._stand_in: NodeStandIn | None = None
        self._network: PodNetwork | None = None

    def close(self) -> None:
        """End the stand-in's processes; raises what went wrong in it."""
        try:
            if self._stand_in:
                self.run(self._stand_in.close())
        finally:
            self.run(self.api.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=30)
            self._loop.close()
            if self._network:
                self._network.close()

    def run(self, work: Coroutine[Any, Any, T], limit: float = LIMIT) -> T:
        """The result of a coroutine, in the cluster's event loop."""
        future = self.start(work)
        try:
            return future.result(limit)
        finally:
            future.cancel()  # where it took too long

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """A coroutine that goes on in the cluster's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def nodes(self) -> NodeStandIn:
        """The node stand-in, started with the first call. ApiError where this API server cannot have one."""
        if self._stand_in is None:
            self._network = PodNetwork()
            stand_in = NodeStandIn(self.api, self.folder / "nodes", self._network)
            self.run(stand_in.start())
            self._stand_in = stand_in
        return self._stand_in

    @property
    def stand_in(self) -> NodeStandIn | None:
        return self._stand_in

    # -- objects --------------------------------------------------------------------------------------------

    def get(self, kind: str, name: str, namespace: str | None = None) -> Raw:
        return self.run(self.api.get(kind, name, namespace))

    def find(self, kind: str, name: str, namespace: str | None = None) -> Raw | None:
        return self.run(self.api.find(kind, name, namespace))

    def items(self, kind: str, namespace: str | None = None, *, labels: str = "") -> list[Raw]:
        return self.run(self.api.items(kind, namespace, labels=labels))

    def create(self, manifest: Raw) -> Raw:
        return self.run(self.api.create(manifest))

    def apply(self, manifest: Raw) -> Raw:
        return self.run(self.api.apply(manifest))

    def patch(self, kind: str, name: str, namespace: str | None, change: Any, *, how: str = "merge") -> Raw:
        return self.run(self.api.patch(kind, name, namespace, change, how=how))

    def delete(self, kind: str, name: str, namespace: str | None = None, **options: Any) -> None:
        self.run(self.api.delete(kind, name, namespace, **options))

    def wait(
        self,
        kind: str,
        name: str,
        namespace: str | None,
        holds: Callable[[Raw | None], bool],
        *,
        limit: float = 120.0,
    ) -> Raw:
        """The first state of an object for which ``holds``; {} where that is its absence."""
        return self.run(self.api.wait(kind, name, namespace, holds, limit=limit), limit + 30) or {}

    def wait_until_gone(self, kind: str, name: str, namespace: str | None, *, limit: float = 120.0) -> None:
        self.wait(kind, name, namespace, lambda found: found is None, limit=limit)

    def endpoints(self, service: str, namespace: str, port: str | None = None) -> list[str]:
        """ "address:port" of a Service's ready endpoints; its first port, if none is named.

        Nothing serves the addresses of Services here, so this is how tests reach what is behind one.
        """
        found = []
        for piece in self.items("EndpointSlice", namespace, labels=f"kubernetes.io/service-name={service}"):
            ports = [one for one in piece.get("ports") or [] if port in (None, one.get("name"))]
            for endpoint in piece.get("endpoints") or [] if ports else []:
                if endpoint["conditions"].get("ready"):
                    found += [f"{address}:{ports[0]['port']}" for address in endpoint["addresses"]]
        return sorted(found)

    def wait_for_endpoints(
        self, service: str, namespace: str, count: int, *, limit: float = 120.0
    ) -> list[str]:
        """The ready endpoints of a Service, as soon as there are so many."""

        async def wait() -> None:
            labels = f"kubernetes.io/service-name={service}"
            pieces: dict[str, int] = {}
            async for event, piece in self.api.watch("EndpointSlice", namespace, labels=labels):
                if event != "SYNCED":
                    ready = [one for one in piece.get("endpoints") or [] if one["conditions"].get("ready")]
                    pieces[piece["metadata"]["name"]] = 0 if event == "DELETED" else len(ready)
                if sum(pieces.values()) == count:
                    return

        with contextlib.suppress(TimeoutError):
            self.run(asyncio.wait_for(wait(), limit), limit + 30)
        found = self.endpoints(service, namespace)
        assert len(found) == count, f"{namespace}/{service} has {found}, not {count} ready endpoints"
        return found

    @contextlib.contextmanager
    def namespace(self) -> Iterator[str]:
        """A namespace with what controllers put into a new one; it is deleted afterwards."""
        made = self.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"generateName": "test-"}})
        name = str(made["metadata"]["name"])
        self.wait("ServiceAccount", "default", name, bool)
        self.wait("ConfigMap", "kube-root-ca.crt", name, bool)
        yield name
        self.delete("Namespace", name)

    def evict(self, pod: str, namespace: str) -> bool:
        """Whether the eviction went through; False if a PodDisruptionBudget forbids it now."""
        try:
            self.run(self.api.evict(pod, namespace))
        except ApiError as error:
            if error.code != 429:
                raise
            return False
        return True

    # -- accounts and programs ------------------------------------------------------------------------------

    def access_of(self, account: str, namespace: str, *, seconds: int = 7200) -> Access:
        """Access with a token of a service account, as a pod of it would have."""
        status = self.run(self.api.token(account, namespace, expirationSeconds=seconds))
        return self.access.with_token(status["token"])

    def kubeconfig_of(self, account: str, namespace: str) -> Path:
        """A kubeconfig file of a service account."""
        path = self.folder / f"{namespace}-{account}.kubeconfig"
        return self.access_of(account, namespace).write_kubeconfig(path, namespace=namespace)

    def kubectl(self, *arguments: str, stdin: str = "", check: bool = True, limit: float = 120.0) -> str:
        """The output of `kubectl`, errors included."""
        return self._program("kubectl", *arguments, stdin=stdin, check=check, limit=limit)

    def helm(self, *arguments: str, check: bool = True, limit: float = 300.0) -> str:
        """The output of `helm`, errors included. Its own files stay in the cluster's folder."""
        return self._program("helm", *arguments, stdin="", check=check, limit=limit)

    def _program(self, name: str, *arguments: str, stdin: str, check: bool, limit: float) -> str:
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        done = subprocess.run(
            [str(self._programs[name]), *arguments],
            env={"KUBECONFIG": str(self.kubeconfig), "HOME": str(home), "PATH": "/usr/bin:/bin"},
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
            check=False,  # what it said must be in the error
        )
        assert not check or done.returncode == 0, f"{name} {' '.join(arguments)}: {done.stdout}"
        return done.stdout
