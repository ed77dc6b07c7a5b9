"""The local runtime: an LLMService on one machine, without Kubernetes.

It takes the same manifest and uses the same pure functions as in a cluster (``children`` for an agent's
settings, ``autoscale`` for the number of agents, ``replicas`` for which are created and removed, ``status``
for the status), with processes in place of pods. A change of the manifest's file is followed with a rolling
update of the agents; the gateway keeps the settings that it was started with.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .. import autoscale, children, reasons, replicas, status
from ..autoscale import Scale
from ..children import Defaults, TemplateError
from ..fleet import Fleet
from ..observed import UNSCHEDULABLE, Node, Observed, Pod, Service
from ..refusals import Refusal
from ..replicas import Action, Create, Delete, Drain, Release
from ..workqueue import WorkQueue
from .manifest import Machine, ManifestError, check_runs_here, read
from .process import LocalProcess

log = logging.getLogger("blockyard.local")

NODE = Node("this-machine")
DEFAULTS = Defaults(image="local", namespace="local")
TICK = 1.0  # seconds between rounds without an event, which look at deadlines and the manifest
STATE = "state.json"
EXIT_GRACE = 10.0  # seconds a process gets beyond its own grace period
# Settings for containers only; on one machine the agent's own defaults are right.
IN_CONTAINERS = {"BLOCKYARD_CACHE", "BLOCKYARD_TOKEN_DIR", "HF_HOME", "HOME"}


@dataclass(slots=True)
class LocalAgent:
    """What is known of one agent besides its process, as a pod's metadata would hold it."""

    name: str
    uid: str
    revision: str
    process: LocalProcess
    gpus: tuple[int, ...]
    created: float
    undrained: bool = True
    draining_since: float | None = None
    drain_reason: str = ""
    ending: asyncio.Task[None] | None = None

    def pod(self, fleet: Fleet) -> Pod:
        """The agent as the pod that it would be in a cluster."""
        address = urlsplit(self.process.url)
        report = fleet.report(self.uid)
        said = None if report is None or report.error else report.status
        crashed = self.process.restarts > 0 and not self.process.running
        return Pod(
            name=self.name,
            uid=self.uid,
            node=NODE.name,
            ip=address.hostname or "",
            port=address.port or 0,
            phase="Running",
            ready=self.process.running and said is not None and said.state == "ready",
            running=self.process.running,
            revision=self.revision,
            created=self.created,
            scheduled=self.created,
            deleting=self.ending is not None,
            undrained=self.undrained,
            draining_since=self.draining_since,
            drain_reason=self.drain_reason,
            restarts=self.process.restarts,
            problem="CrashLoopBackOff" if crashed else "",
            message=self.process.last_words if crashed else "",
            report=report,
        )


@dataclass(slots=True)
class LocalRuntime:
    """Runs one manifest's service. ``folder`` holds logs, the gateway's list of agents, and the state."""

    manifest: Path
    machine: Machine
    folder: Path
    port: int
    on_status: Callable[[dict[str, Any]], None]
    service: Service = field(init=False)
    gateway: LocalProcess | None = None
    agents: dict[str, LocalAgent] = field(default_factory=dict)  # by name
    unplaced: dict[str, Pod] = field(default_factory=dict)  # by name: agents for which no GPUs are free
    status: dict[str, Any] = field(default_factory=dict)
    problem: str = ""  # why the newest version of the manifest is not used
    _token: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    _stamp: int = 0
    _listed: str = ""
    _written: str = ""
    _fleet: Fleet = field(init=False)
    _queue: WorkQueue = field(init=False)

    def __post_init__(self) -> None:
        self._stamp = self.manifest.stat().st_mtime_ns if self.manifest.exists() else 0
        self.service = read(self.manifest)
        check_runs_here(self.service, self.machine)

    async def run(self, stop: asyncio.Event) -> None:
        """Run until ``stop`` is set; then end the gateway and all agents, in this order."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._queue = WorkQueue()
        self._fleet = Fleet(self._queue)
        try:
            self._list_agents()
            self._start_gateway()
            stopping = asyncio.create_task(stop.wait())
            while not stopping.done():
                self._read_again()
                await self._round()
                due = asyncio.create_task(self._due())
                await asyncio.wait({stopping, due}, timeout=TICK, return_when=asyncio.FIRST_COMPLETED)
                due.cancel()
                await asyncio.gather(due, return_exceptions=True)
        finally:
            await self._end()

    async def _due(self) -> None:
        key, _ = await self._queue.take()
        self._queue.done(key)

    @property
    def _key(self) -> tuple[str, str]:
        return self.service.namespace, self.service.name

    def resource(self) -> dict[str, Any]:
        """The LLMService as an API server would show it."""
        spec = self.service.spec
        assert spec is not None
        metadata = {
            "name": self.service.name,
            "namespace": self.service.namespace,
            "generation": self.service.generation,
        }
        outside = spec.model_dump(mode="json", by_alias=True)
        return {"metadata": metadata, "spec": outside, "status": self.status}

    def _changed(self) -> None:
        self._queue.add(self._key)

    # ── The manifest ──────────────────────────────────────────────────────────────────────────────

    def _read_again(self) -> None:
        """Follow the manifest's file. A version that cannot run here is reported, and the one before stays in
        force.
        """
        try:
            stamp = self.manifest.stat().st_mtime_ns
        except OSError:
            return
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            service = read(self.manifest, self.service.generation + 1)
            check_runs_here(service, self.machine)
            if service.name != self.service.name:
                raise ManifestError(f"{self.manifest}: metadata.name cannot change; stop and start again")
        except ManifestError as error:
            self.problem = str(error)
            log.warning("the change is not followed: %s", error)
            return
        self.problem = ""
        spec, before = service.spec, self.service.spec
        assert spec is not None and before is not None
        if spec.autoscaling is not None and "replicas" not in spec.model_fields_set:
            service = _with_replicas(service, before.replicas)  # as kubectl apply would
        self.service = service

    # ── One round ─────────────────────────────────────────────────────────────────────────────────

    async def _round(self) -> None:
        spec = self.service.spec
        assert spec is not None
        for name, agent in list(self.agents.items()):
            if agent.ending is not None and agent.ending.done():
                del self.agents[name]
        self._place()
        pods = {agent.uid: agent.pod(self._fleet) for agent in self.agents.values()}
        pods |= {pod.uid: pod for pod in self.unplaced.values()}
        self._fleet.follow(self._key, pods, (self._token,))
        observed = Observed(
            service=replace(self.service, status=self.status),
            pods=tuple(pods.values()),
            nodes={NODE.name: NODE},
            revision=children.revision(spec, DEFAULTS),
            gateway_ready=spec.gateway.replicas if self.gateway is not None and self.gateway.running else 0,
            now=time.time(),
            refused=Refusal(reasons.INVALID_SPEC, self.problem) if self.problem else None,
        )
        scale = autoscale.plan(observed)
        actions: list[Action | Scale] = [scale] if scale is not None else [*replicas.plan(observed)]
        for action in actions:
            match action:
                case Scale():
                    self._scale(action.replicas)
                case Create():
                    self._create(action.name, observed.revision)
                case Drain():
                    await self._drain(self.agents[action.pod.name], action)
                case Release():
                    self.agents[action.pod.name].undrained = False
                case Delete() if action.pod.name in self.unplaced:
                    del self.unplaced[action.pod.name]
                case Delete():
                    self._delete(self.agents[action.pod.name], force=action.force)
        found = status.compute(observed, actions, self.status)
        found["url"] = f"http://127.0.0.1:{self.port}"
        if found != self.status:
            self.status = found
        self._list_agents()
        self._write_state()
        self.on_status(self.resource())

    def _scale(self, number: int) -> None:
        scaled = _with_replicas(self.service, number)
        self.service = replace(scaled, generation=scaled.generation + 1)
        self._changed()

    def _create(self, name: str, revision: str) -> None:
        """A process with GPUs of its own; while too few are free, a pod that waits as in a cluster."""
        spec = self.service.spec
        assert spec is not None
        free = self._free_gpus()
        if spec.device == "cuda" and len(free) < spec.tensor_parallel:
            now, words = time.time(), f"Insufficient GPUs: {spec.tensor_parallel} wanted, {len(free)} free"
            self.unplaced[name] = Pod(
                name,
                secrets.token_hex(8),
                revision=revision,
                created=now,
                problem=UNSCHEDULABLE,
                message=words,
                unschedulable_since=now,
            )
            self._changed()
            return
        gpus = free[: spec.tensor_parallel] if spec.device == "cuda" else ()
        try:
            environment = self._environment(name, revision, gpus)
        except TemplateError as error:
            self.problem = str(error)
            return
        command = [sys.executable, "-m", "blockyard.cli", "agent"]
        process = LocalProcess(name, command, environment, self.folder / f"{name}.log", self._changed)
        self.agents[name] = LocalAgent(name, secrets.token_hex(8), revision, process, gpus, time.time())

    def _place(self) -> None:
        """Start what has waited for GPUs that are free now, as a scheduler would."""
        spec = self.service.spec
        assert spec is not None
        for name, pod in list(self.unplaced.items()):
            if len(self._free_gpus()) >= spec.tensor_parallel:
                del self.unplaced[name]
                self._create(name, pod.revision)

    def _free_gpus(self) -> tuple[int, ...]:
        taken = {gpu for agent in self.agents.values() for gpu in agent.gpus}
        return tuple(gpu for gpu in self.machine.gpus if gpu not in taken)

    def _environment(self, name: str, revision: str, gpus: tuple[int, ...]) -> dict[str, str]:
        """This process's environment without settings of Blockyard, plus the environment of the container."""
        spec = self.service.spec
        assert spec is not None
        container = children.agent_pod(self.service, name, revision, DEFAULTS)["spec"]["containers"][0]
        given = {
            each["name"]: each["value"]
            for each in container["env"]
            if "value" in each and each["name"] not in IN_CONTAINERS
        }
        inherited = {key: value for key, value in os.environ.items() if not _is_setting(key)}
        if spec.model.cache_host_path is not None:
            given["BLOCKYARD_CACHE"] = spec.model.cache_host_path
        if spec.model.host_path is not None:
            given["BLOCKYARD_MODEL"] = spec.model.host_path.path
        if spec.device == "cuda":
            given["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        local = {"BLOCKYARD_HOST": "127.0.0.1", "BLOCKYARD_PORT": "0", "BLOCKYARD_TOKEN": self._token}
        return {**inherited, **given, **local, "PYTHONUNBUFFERED": "1"}

    async def _drain(self, agent: LocalAgent, action: Drain) -> None:
        if agent.draining_since is None:
            agent.draining_since = time.time()
        agent.drain_reason = action.reason
        if error := await self._fleet.drain(agent.uid, action.timeout_s):
            log.warning("%s", error)

    def _delete(self, agent: LocalAgent, *, force: bool) -> None:
        if agent.ending is None:
            spec = self.service.spec
            assert spec is not None
            grace = 0.0 if force else spec.drain.timeout_seconds + EXIT_GRACE
            agent.ending = asyncio.create_task(agent.process.stop(grace))
            agent.ending.add_done_callback(lambda _: self._changed())

    # ── The gateway ───────────────────────────────────────────────────────────────────────────────

    def _start_gateway(self) -> None:
        spec = self.service.spec
        assert spec is not None
        settings: dict[str, object] = {
            "HOST": "127.0.0.1",
            "PORT": self.port,
            "AGENTS_FILE": self.folder / "agents.json",
            "TOKEN": self._token,
            "GRACE_PERIOD": spec.drain.timeout_seconds,
            "PATIENCE": spec.gateway.hold_seconds,
            "REQUESTS_PER_MINUTE": spec.gateway.limits.requests_per_minute,
            "CONCURRENT_REQUESTS": spec.gateway.limits.concurrent_requests,
            "KEYS_DIR": None if spec.auth is None else self.machine.keys,
        }
        given = {f"BLOCKYARD_GATEWAY_{name}": str(v) for name, v in settings.items() if v is not None}
        inherited = {key: value for key, value in os.environ.items() if not _is_setting(key)}
        self.gateway = LocalProcess(
            "gateway",
            [sys.executable, "-m", "blockyard.cli", "gateway"],
            {**inherited, **given, "PYTHONUNBUFFERED": "1"},
            self.folder / "gateway.log",
            self._changed,
        )

    def _list_agents(self) -> None:
        """Write the agents' addresses for the gateway, which asks each of them whether it is ready."""
        listed = json.dumps(
            [
                {"name": agent.name, "url": agent.process.url}
                for agent in self.agents.values()
                if agent.process.url and agent.ending is None
            ]
        )
        if listed != self._listed:
            _replace(self.folder / "agents.json", listed)
            self._listed = listed

    def _write_state(self) -> None:
        """Write the state file, from which ``running_services`` reads the service in other processes."""
        pids = {name: agent.process.pid for name, agent in self.agents.items()}
        state = json.dumps({"pid": os.getpid(), "agents": pids, "service": self.resource()})
        if state != self._written:
            _replace(self.folder / STATE, state)
            self._written = state

    # ── The end ───────────────────────────────────────────────────────────────────────────────────

    async def _end(self) -> None:
        """Stop the gateway first, so that no new requests come, then the agents."""
        spec = self.service.spec
        grace = EXIT_GRACE + (0 if spec is None else spec.drain.timeout_seconds)
        if self.gateway is not None:
            await self.gateway.stop(grace)
        await asyncio.gather(*(agent.process.stop(grace) for agent in self.agents.values()))
        await self._fleet.close()
        (self.folder / STATE).unlink(missing_ok=True)

    def kill(self) -> None:
        """End every process at once."""
        for process in [self.gateway, *(agent.process for agent in self.agents.values())]:
            if process is not None:
                process.kill()


def running_services(runs: Path) -> list[dict[str, Any]]:
    """The services of all local runtimes that are alive, as resources, by name."""
    found = []
    for file in sorted(runs.glob(f"*/{STATE}")):
        try:
            state = json.loads(file.read_text())
            os.kill(state["pid"], 0)
        except (OSError, ValueError, KeyError):  # the runtime has just ended, or was killed
            continue
        found.append(state["service"])
    return found


def _with_replicas(service: Service, number: int) -> Service:
    """The service, with so many agents wanted."""
    assert service.spec is not None
    return replace(service, spec=service.spec.model_copy(update={"replicas": number}))


def _replace(file: Path, text: str) -> None:
    """Replace a file in one step, so that no reader sees it half-written."""
    fresh = file.with_name(f".{file.name}")
    fresh.write_text(text)
    fresh.replace(file)


def _is_setting(name: str) -> bool:
    """Whether a variable of this process is a setting of Blockyard. Such variables are meant for commands
    that a user starts, not for the manifest's agents.
    """
    return name.startswith("BLOCKYARD_") and name != "BLOCKYARD_CACHE" and name != "BLOCKYARD_CPU_KERNELS"
