"""Fake nodes with real processes: what plays kubelet where there is none.

The scheduler, the controllers and the API server are real; a node here is a Node object whose Lease this
renews, and the pods that the scheduler binds to it are led by pod.py: their containers are processes of this
machine, each pod with a loopback address of its own. So a pod's readiness, its logs, its restarts and its end
are those of the real program in it.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp

from .api import Api, ApiError, Raw
from .container import Container, Image, timestamp
from .network import PodNetwork
from .pod import Host, Pod
from .process import sweep

HEARTBEAT = 10.0  # seconds between two renewals of a node's Lease
LEASE_SECONDS = 40
LEASES = "kube-node-lease"


@dataclass
class _Node:
    name: str
    host: Host
    heart: asyncio.Task[None]


class NodeStandIn:
    """All fake nodes of a test run. Its methods belong to the event loop in which it was started.

    ``images`` says how to run an image, ``folders`` where a claim, an image volume or a host path is on this
    machine; both may be filled later. ``patience`` stretches the probes' timeouts, ``backoff`` and
    ``longest_backoff`` (seconds) shorten what a kubelet waits between restarts (10 and 300).
    """

    def __init__(
        self,
        api: Api,
        folder: Path,
        network: PodNetwork,
        *,
        patience: float = 10.0,
        backoff: float = 1.0,
        longest_backoff: float = 10.0,
    ) -> None:
        self.images: dict[str, Image] = {}
        self.folders: dict[str, Path] = {}
        self._api = api
        self._folder = folder
        self._network = network
        self._timing = (patience, backoff, longest_backoff)
        self._mark = f"{secrets.token_hex(8)}/"
        self._nodes: dict[str, _Node] = {}
        self._pods: dict[str, Pod] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ended: list[Pod] = []  # for their logs
        self._lived: set[str] = set()  # uids of all pods there have been
        self.errors: list[BaseException] = []  # of the stand-in itself
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises ApiError if this API server refuses the network's addresses in endpoints."""
        probe: Raw = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"generateName": "node-stand-in-", "namespace": "default"},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [self._network.take()]}],
        }
        path = await self._api.path("EndpointSlice", "default")
        await self._api.call("POST", path, probe, query={"dryRun": "All"})
        self._watch = asyncio.create_task(self._follow_pods())
        self._watch.add_done_callback(self._keep_error)

    async def close(self) -> None:
        """End all processes. Raises what went wrong in the stand-in itself while it ran."""
        tasks = [*self._tasks.values(), *(node.heart for node in self._nodes.values())]
        if self._watch:
            tasks.append(self._watch)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        sweep(self._mark)
        for name in list(self._nodes):
            await self._delete_node(name)
        if self.errors:
            raise BaseExceptionGroup("errors of the node stand-in", self.errors)

    # -- nodes ----------------------------------------------------------------------------------------------

    async def add(
        self,
        name: str,
        *,
        gpus: int = 1,
        cpu: str = "64",
        memory: str = "256Gi",
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """A new node; returns when pods can be scheduled to it."""
        node = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {
                "name": name,
                "labels": {
                    "kubernetes.io/hostname": name,
                    "kubernetes.io/os": "linux",
                    "kubernetes.io/arch": "amd64",
                    **(labels or {}),
                },
            },
        }
        made = await self._api.create(node)
        await self._api.create(
            {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {
                    "name": name,
                    "namespace": LEASES,
                    "ownerReferences": [
                        {"apiVersion": "v1", "kind": "Node", "name": name, "uid": made["metadata"]["uid"]}
                    ],
                },
                "spec": {
                    "holderIdentity": name,
                    "leaseDurationSeconds": LEASE_SECONDS,
                    "renewTime": _precise_now(),
                },
            }
        )
        resources = {"cpu": cpu, "memory": memory, "pods": "110", "ephemeral-storage": "1Ti"}
        if gpus:
            resources["nvidia.com/gpu"] = str(gpus)
        await self._write_node(
            name,
            {
                "capacity": resources,
                "allocatable": resources,
                "addresses": [{"type": "InternalIP", "address": self._network.host}],
                "conditions": [_ready_condition("True", "KubeletReady", "the node stand-in is there")],
            },
        )
        patience, backoff, longest_backoff = self._timing
        host = Host(
            api=self._api,
            node=name,
            folder=self._folder / name,
            mark=f"{self._mark}{name}/",
            network=self._network,
            images=self.images,
            folders=self.folders,
            patience=patience,
            backoff=backoff,
            longest_backoff=longest_backoff,
        )
        self._nodes[name] = _Node(name, host, asyncio.create_task(self._beat(name)))
        await self._api.wait("Node", name, None, lambda node: bool(node and not node["spec"].get("taints")))

    async def remove(self, name: str) -> None:
        """The node is gone: its processes die, nothing is written about them, its object is deleted."""
        await self._crash(name)
        await self._delete_node(name)

    async def fail(self, name: str) -> None:
        """The node stops to answer: its processes die, nothing is written about them, its object stays.

        What the node controller would do after its grace period is done at once: the node becomes Unknown and
        its pods not ready.
        """
        pods = [pod for pod in self._pods.values() if pod.host.node == name]
        await self._crash(name)
        condition = _ready_condition("Unknown", "NodeStatusUnknown", "Kubelet stopped posting node status.")
        await self._write_node(name, {"conditions": [condition]})
        unready = {"conditions": [{"type": "Ready", "status": "False", "lastTransitionTime": timestamp()}]}
        for pod in pods:
            try:
                await self._api.patch(
                    "Pod", pod.name, pod.namespace, {"status": unready}, how="strategic", subresource="status"
                )
            except ApiError as error:
                if error.code != 404:
                    raise

    async def _crash(self, name: str) -> None:
        node = self._nodes.pop(name)
        node.heart.cancel()
        lost = [uid for uid, pod in self._pods.items() if pod.host is node.host]
        tasks = [self._tasks[uid] for uid in lost if uid in self._tasks]
        for task in tasks:
            task.cancel()
        sweep(node.host.mark)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _delete_node(self, name: str) -> None:
        self._nodes.pop(name, None)
        await self._api.delete("Node", name)

    async def _beat(self, name: str) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT)
            try:
                await self._api.patch("Lease", name, LEASES, {"spec": {"renewTime": _precise_now()}})
            except (aiohttp.ClientError, TimeoutError, ApiError):
                continue  # the next one follows long before the Lease ends

    async def _write_node(self, name: str, status: Raw) -> None:
        await self._api.patch("Node", name, None, {"status": status}, how="strategic", subresource="status")

    # -- pods -----------------------------------------------------------------------------------------------

    def pod(self, name: str, namespace: str) -> Pod:
        """The pod of that name that runs here now."""
        for uid, pod in self._pods.items():
            if (pod.name, pod.namespace) == (name, namespace) and uid in self._tasks:
                return pod
        raise LookupError(f"no pod {namespace}/{name} runs on {sorted(self._nodes)}")

    def container(self, pod: str, namespace: str, name: str | None = None) -> Container:
        """A container of a pod: the first, if it is not named."""
        for container in self.pod(pod, namespace).main:
            if name in (None, container.name):
                return container
        raise LookupError(f"pod {namespace}/{pod} has no container {name}")

    def kill(self, pod: str, namespace: str, name: str | None = None) -> int:
        """kill -9 of a container's main process, as a crash or the kernel would; the pid that it had."""
        container = self.container(pod, namespace, name)
        pid = container.pid
        if pid is None:
            raise LookupError(
                f"container {container.name} of pod {namespace}/{pod} does not run: {container.state}"
            )
        container.signal(signal.SIGKILL)
        return pid

    def logs(self, namespace: str | None = None) -> dict[str, str]:
        """Logs by "namespace/pod (uid)", of pods that are gone too."""
        return {
            f"{pod.namespace}/{pod.name} ({pod.uid})": pod.logs()
            for pod in [*self._ended, *self._pods.values()]
            if namespace in (None, pod.namespace)
        }

    async def _follow_pods(self) -> None:
        async for event, manifest in self._api.watch("Pod", fields="spec.nodeName!="):
            if event == "SYNCED":
                continue
            uid = manifest["metadata"]["uid"]
            pod = self._pods.get(uid)
            if pod is None and event != "DELETED" and uid not in self._lived:  # not a late event
                if node := self._nodes.get(manifest["spec"]["nodeName"]):
                    self._begin(manifest, node)
            elif pod and event == "DELETED":
                pod.removed()
            elif pod:
                pod.update(manifest)

    def _begin(self, manifest: Raw, node: _Node) -> None:
        pod = Pod(manifest, node.host)
        self._pods[pod.uid] = pod
        self._lived.add(pod.uid)
        task = asyncio.create_task(pod.live())
        self._tasks[pod.uid] = task

        def ended(task: asyncio.Task[None]) -> None:
            self._ended.append(self._pods.pop(pod.uid))
            del self._tasks[pod.uid]
            self._keep_error(task)

        task.add_done_callback(ended)

    def _keep_error(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self.errors.append(error)


def _ready_condition(status: str, reason: str, message: str) -> dict[str, Any]:
    now = timestamp()
    return {
        "type": "Ready",
        "status": status,
        "reason": reason,
        "message": message,
        "lastHeartbeatTime": now,
        "lastTransitionTime": now,
    }


def _precise_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
