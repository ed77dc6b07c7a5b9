"""One pod's life on a fake node, as a kubelet leads it.

The pod's containers are local processes. This owns them, the pod's folder and its status; what a kubelet
would not do (sandboxes, resource limits, users, preStop hooks, sidecar containers) is not played, and a pod
that asks for a volume, an environment source or a probe that is not played fails with a message that says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from .api import Api, ApiError, Raw
from .container import Container, Image, timestamp
from .environment import CannotStart, environment, expand
from .network import PodNetwork
from .probes import Probe
from .process import sweep
from .volumes import Volumes

RETRY = 0.5  # seconds between attempts to start what cannot be started yet, or to write a status
REFRESH = 2.0  # seconds between two looks at Secrets, ConfigMaps and tokens that are mounted
STEADY = 600.0  # seconds after which a container's earlier crashes are forgotten
HICCUPS = (ApiError, aiohttp.ClientError, TimeoutError)  # of the API server: what failed is done again
# Programs have the service account's folder built in, and nothing can be mounted there.
ACCOUNT_SETTINGS = ("BLOCKYARD_GATEWAY_SERVICEACCOUNT", "BLOCKYARD_OPERATOR_SERVICEACCOUNT")


@dataclass(frozen=True)
class Host:
    """What pods find on their node."""

    api: Api
    node: str
    folder: Path
    mark: str  # of all processes of the node
    network: PodNetwork
    images: Mapping[str, Image]
    folders: Mapping[str, Path]  # claim name, image reference or host path -> folder of this machine
    patience: float
    backoff: float  # seconds before the second restart; doubled from there
    longest_backoff: float


class Pod:
    """A pod bound to a fake node, from the moment it is seen there until its object is gone."""

    def __init__(self, manifest: Raw, host: Host) -> None:
        self.manifest = manifest
        self.host = host
        metadata = manifest["metadata"]
        self.name: str = metadata["name"]
        self.namespace: str = metadata["namespace"]
        self.uid: str = metadata["uid"]
        self.address = "" if manifest["spec"].get("hostNetwork") else host.network.take()
        self.folder = host.folder / "pods" / f"{self.namespace}_{self.name}_{self.uid}"
        self.mark = f"{host.mark}{self.uid}/"
        spec = manifest["spec"]
        self._init = [self._container(entry) for entry in spec.get("initContainers", [])]
        self.main = [self._container(entry) for entry in spec["containers"]]
        self._volumes = Volumes(
            host.api, self._find, self.folder / "volumes", host.folder / "root", host.folders
        )
        self._begun = timestamp()
        self._mounted = False
        self._phase = ""  # Succeeded or Failed once the pod has come to its end
        self._conditions: dict[str, Raw] = {}
        self._written: Raw | None = None
        self._dirty = asyncio.Event()
        self._seen = asyncio.Event()  # a newer manifest, or the deletion
        self._gone = False

    @property
    def containers(self) -> list[Container]:
        return [*self._init, *self.main]

    def update(self, manifest: Raw) -> None:
        self.manifest = manifest
        self._seen.set()
        self._dirty.set()

    def removed(self) -> None:
        """The object is gone: somebody deleted it by force."""
        self._gone = True
        self._seen.set()

    def logs(self) -> str:
        return "".join(f"--- {self.name}/{one.name}\n{one.logs()}" for one in self.containers)

    async def live(self) -> None:
        """Run the pod until its object is deleted. Cancelled: the processes end and nothing is written."""
        try:
            async with asyncio.TaskGroup() as group:
                writer = group.create_task(self._write_changes())
                life = group.create_task(self._run())
                while not self._told_to_end():
                    await self._next_change()
                await self._end(life)
                writer.cancel()
        finally:
            sweep(self.mark)

    # -- life -----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Start what the manifest says and keep it running, to the pod's own end if it has one."""
        if self.manifest.get("status", {}).get("phase") in ("Succeeded", "Failed"):
            self._phase = self.manifest["status"]["phase"]
            return
        self._dirty.set()
        await self._mount()
        for container in self._init:
            if not await self._keep(container, always=False):
                self._finish("Failed")
                return
        async with asyncio.TaskGroup() as group:
            refresh = group.create_task(self._refresh())
            kept = [group.create_task(self._keep(one, always=True)) for one in self.main]
            succeeded = await asyncio.gather(*kept)
            refresh.cancel()
        self._finish("Succeeded" if all(succeeded) else "Failed")

    async def _keep(self, container: Container, *, always: bool) -> bool:
        """Run a container as often as the restart policy says; at its last end, whether it succeeded."""
        policy = self.manifest["spec"].get("restartPolicy", "Always")
        crashes = 0
        while True:
            variables = await self._start(container)
            began = time.monotonic()
            probes = asyncio.create_task(self._probe(container, variables))
            exited = asyncio.create_task(container.wait())
            try:
                await asyncio.wait({probes, exited}, return_when=asyncio.FIRST_COMPLETED)
                if probes.done():
                    probes.result()  # raises what went wrong in the stand-in itself
                code = await exited
            finally:
                probes.cancel()
                exited.cancel()
            self._dirty.set()
            if code == 0 and (policy != "Always" or not always):
                return True
            if policy == "Never":
                return False
            crashes = 1 if time.monotonic() - began > STEADY else crashes + 1
            if crashes > 1:
                pause = min(self.host.backoff * 2 ** (crashes - 2), self.host.longest_backoff)
                where = f"container={container.name} pod={self.name}_{self.namespace}({self.uid})"
                container.waits("CrashLoopBackOff", f"back-off {pause:g}s restarting failed {where}")
                self._dirty.set()
                await asyncio.sleep(pause)

    async def _start(self, container: Container) -> Mapping[str, str]:
        """Start the process as soon as it can be started; the environment that it got."""
        while True:
            try:
                command, variables = await self._command(container)
                await container.start(command, variables)
                self._dirty.set()
                return variables
            except CannotStart as problem:
                waits = container.state.get("waiting", {}).get("reason")
                again = problem.reason == "ErrImagePull" and waits in ("ErrImagePull", "ImagePullBackOff")
                container.waits("ImagePullBackOff" if again else problem.reason, str(problem))
                self._dirty.set()
            except HICCUPS:
                pass
            await asyncio.sleep(RETRY)

    async def _command(self, container: Container) -> tuple[list[str], dict[str, str]]:
        """Command line and environment, with mount paths made local. Raises CannotStart."""
        spec = container.spec
        if spec.get("restartPolicy"):
            raise CannotStart("CreateContainerError", "the node stand-in plays no sidecar containers")
        image = self.host.images.get(spec["image"])
        if image is None:
            raise CannotStart("ErrImagePull", f"the node stand-in has no image {spec['image']}")
        server = urlsplit(self.host.api.access.server)
        variables = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
            "LANG": "C.UTF-8",
            "HOME": str(container.folder),
            "HOSTNAME": self.name,
            "KUBERNETES_SERVICE_HOST": server.hostname or "",
            "KUBERNETES_SERVICE_PORT": str(server.port or 443),
        }
        variables |= {**image.env}
        if (account := self._volumes.token_folder(spec)) is not None:
            variables |= {name: str(account) for name in ACCOUNT_SETTINGS}
        given = await environment(spec, self._with_addresses(), self._find)
        variables |= {name: self._volumes.local(spec, value) for name, value in given.items()}
        command = [self._volumes.local(spec, expand(word, given)) for word in image.command(spec)]
        if not command:
            raise CannotStart(
                "CreateContainerError", f"neither the pod nor image {spec['image']} has a command"
            )
        return command, variables

    async def _probe(self, container: Container, variables: Mapping[str, str]) -> None:
        """Ask the container's probes until it ends, and do what follows from their answers."""

        async def execute(command: list[str], limit: float) -> bool:
            return await container.execute(command, variables, limit)

        def probe(name: str) -> Probe | None:
            if not (spec := container.spec.get(name)):
                return None
            return Probe(
                spec,
                address=self._ip,
                container=container.spec,
                execute=execute,
                patience=self.host.patience,
            )

        async def keep_alive(asked: Probe) -> None:
            async for alive in asked.results():
                if not alive:
                    await container.end(self._grace(asked.grace))

        async def tell_ready(asked: Probe) -> None:
            async for ready in asked.results():
                if ready != container.ready:
                    container.ready = ready
                    self._dirty.set()

        if startup := probe("startupProbe"):
            async for up in startup.results():
                if up:
                    break
                await container.end(self._grace(startup.grace))
        container.started = True
        readiness, liveness = probe("readinessProbe"), probe("livenessProbe")
        container.ready = readiness is None
        self._dirty.set()
        async with asyncio.TaskGroup() as group:
            if readiness:
                group.create_task(tell_ready(readiness))
            if liveness:
                group.create_task(keep_alive(liveness))
            await asyncio.Event().wait()  # it is cancelled when the container has ended

    async def _mount(self) -> None:
        while True:
            try:
                await self._volumes.mount(self._with_addresses())
                break
            except CannotStart as problem:
                for container in self.containers:
                    container.waits(problem.reason, str(problem))
                self._dirty.set()
            except HICCUPS:
                pass
            await asyncio.sleep(RETRY)
        self._mounted = True
        for container in self.main if self._init else []:
            container.state = {"waiting": {"reason": "PodInitializing"}}
        self._dirty.set()

    async def _refresh(self) -> None:
        """Follow changes of what is mounted; what is missing now stays as it was, as on a real node."""
        while True:
            await asyncio.sleep(REFRESH)
            with contextlib.suppress(CannotStart, *HICCUPS):
                await self._volumes.mount(self._with_addresses())

    def _finish(self, phase: str) -> None:
        self._phase = phase
        self._dirty.set()

    # -- end ------------------------------------------------------------------------------------------------

    def _told_to_end(self) -> bool:
        return self._gone or "deletionTimestamp" in self.manifest["metadata"]

    async def _next_change(self) -> None:
        await self._seen.wait()
        self._seen.clear()

    async def _end(self, life: asyncio.Task[None]) -> None:
        """SIGTERM, the grace period, SIGKILL, the last status, and then the object goes."""
        readiness = [
            asyncio.create_task(self._follow_readiness(one)) for one in self.containers if one.pid is not None
        ]
        life.cancel()
        await asyncio.wait({life})
        try:
            await self._stop_containers()
        finally:
            for task in readiness:
                task.cancel()
        sweep(self.mark)
        for container in self.containers:
            if "running" in container.state:
                await container.wait()
        if self._gone:
            return
        if not self._phase:
            ran = [one for one in self.main if one.exit_code is not None]
            self._phase = "Succeeded" if ran and all(one.exit_code == 0 for one in ran) else "Failed"
        while True:
            if await self._write() and await self._delete():
                return
            await asyncio.sleep(RETRY)

    async def _delete(self) -> bool:
        """Let the object go; False if that must be tried again."""
        try:
            await self.host.api.delete("Pod", self.name, self.namespace, grace=0, uid=self.uid)
        except HICCUPS:
            return False
        return True

    async def _stop_containers(self) -> None:
        """Until all main processes have ended, or have had their time, or the object is gone."""
        began = time.monotonic()
        running = [one for one in self.containers if "running" in one.state]
        ends = asyncio.create_task(_end_all(running))
        try:
            while not ends.done() and not self._gone:
                left = began + self._grace(None) - time.monotonic()
                if left <= 0:
                    return
                seen = asyncio.create_task(self._next_change())  # a second deletion may shorten the time
                await asyncio.wait({ends, seen}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                seen.cancel()
        finally:
            ends.cancel()

    async def _follow_readiness(self, container: Container) -> None:
        """A pod that is ending still says whether it is ready: one that drains is not."""
        if spec := container.spec.get("readinessProbe"):
            probe = Probe(
                spec, address=self._ip, container=container.spec, execute=_never, patience=self.host.patience
            )
            async for ready in probe.results():
                container.ready = ready and container.pid is not None
                self._dirty.set()

    def _grace(self, of_probe: int | None) -> float:
        metadata, spec = self.manifest["metadata"], self.manifest["spec"]
        asked = metadata.get("deletionGracePeriodSeconds", of_probe)
        return float(spec.get("terminationGracePeriodSeconds", 30) if asked is None else asked)

    # -- status ---------------------------------------------------------------------------------------------

    @property
    def _ip(self) -> str:
        return self.address or self.host.network.host

    def _with_addresses(self) -> Raw:
        addresses = {"podIP": self._ip, "hostIP": self.host.network.host}
        return {**self.manifest, "status": {**self.manifest.get("status", {}), **addresses}}

    def _status(self) -> Raw:
        initialized = all(one.exit_code == 0 for one in self._init)
        ready = all(one.ready for one in self.main)
        gates = self.manifest["spec"].get("readinessGates", [])
        told = {one["type"]: one["status"] for one in self.manifest.get("status", {}).get("conditions", [])}
        if self._phase:
            phase = self._phase
        else:
            phase = "Running" if initialized and any(one.ever_started for one in self.main) else "Pending"
        conditions = {
            "PodReadyToStartContainers": self._mounted,
            "Initialized": initialized,
            "ContainersReady": ready,
            "Ready": ready and all(told.get(gate["conditionType"]) == "True" for gate in gates),
        }
        unready = [one.name for one in self.main if not one.ready]
        for kind, holds in conditions.items():
            status = "True" if holds else "False"
            before = self._conditions.get(kind, {})
            condition: Raw = {
                "type": kind,
                "status": status,
                "lastTransitionTime": before.get("lastTransitionTime")
                if before.get("status") == status
                else timestamp(),
            }
            if kind in ("ContainersReady", "Ready"):  # null removes what was there
                why = "PodCompleted" if phase == "Succeeded" else "ContainersNotReady"
                condition["reason"] = None if holds else why
                condition["message"] = None if holds else f"containers with unready status: {unready}"
            self._conditions[kind] = condition
        return {
            "phase": phase,
            "observedGeneration": self.manifest["metadata"].get("generation"),
            "startTime": self._begun,
            "hostIP": self.host.network.host,
            "hostIPs": [{"ip": self.host.network.host}],
            "podIP": self._ip,
            "podIPs": [{"ip": self._ip}],
            "conditions": list(self._conditions.values()),
            "initContainerStatuses": [one.status() for one in self._init],
            "containerStatuses": [one.status() for one in self.main],
        }

    async def _write_changes(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            if not await self._write():
                await asyncio.sleep(RETRY)
                self._dirty.set()

    async def _write(self) -> bool:
        """Write the status if it has changed; False if that must be tried again."""
        status = self._status()
        if status == self._written:
            return True
        change = {"metadata": {"uid": self.uid}, "status": status}
        try:
            await self.host.api.patch(
                "Pod", self.name, self.namespace, change, how="strategic", subresource="status"
            )
        except (aiohttp.ClientError, TimeoutError):
            return False
        except ApiError as error:
            # 404: it is gone. 409: another pod has its name, or others have written too often in between.
            if error.code == 404:
                return True
            if error.code in (409, 429) or error.code >= 500:
                return self._gone
            raise
        self._written = status
        return True

    # -- parts ----------------------------------------------------------------------------------------------

    def _container(self, spec: Raw) -> Container:
        name = spec["name"]
        return Container(spec, folder=self.folder / name, mark=f"{self.mark}{name}/")

    async def _find(self, kind: str, name: str) -> Raw | None:
        return await self.host.api.find(kind, name, self.namespace)


async def _end_all(containers: list[Container]) -> None:
    """SIGTERM to all; until all have ended."""
    async with asyncio.TaskGroup() as group:
        for container in containers:
            group.create_task(container.end(None))


async def _never(_command: Sequence[str], _limit: float) -> bool:
    """Exec probes are not asked of a pod that ends."""
    return False
