"""The operator with 1,000 services and 2,000 agents: ``python benchmarks/operator_scale.py``.

A real etcd and API server and a real operator process; the agents are one process that listens on the
whole loopback network and answers statuses, a tenth of them busy with requests that change all the time.
What a kubelet would write of the pods is written here, once. Measured, as a user of the API sees it:

- how long all services take to become Ready after they were all created at once;
- the time from a change of a spec to the status that has observed it, at a steady rate of changes;
- what the operator writes while nothing happens, and what a new one writes when it takes over;
- the operator's memory and CPU time through all of that.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import uuid
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import proc
import report
import yaml
from aiohttp import web

from blockyard.agent.protocol import AgentStatus, TierStatus
from blockyard.operator.kube import LLM_SERVICE, POD, Kube, NotFound, Raw, load_credentials
from blockyard.operator.settings import OperatorSettings

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.cluster import binaries  # noqa: E402 -- the control plane of the tests
from tests.cluster.control_plane import ControlPlane  # noqa: E402

NAMESPACE = "scale"
BUSY_SHARE = 0.1
LIMIT = 1800.0  # seconds for any one phase
MIB = 2**20


# ── Agents ────────────────────────────────────────────────────────────────────────────────────────────


class Agents:
    """Statuses for every address of 127.0.0.0/8, by the address that a client has connected to."""

    def __init__(self) -> None:
        self._statuses: dict[str, AgentStatus] = {}
        self._dice = random.Random(0)
        self.served = 0

    async def start(self) -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/status", self._status)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "0.0.0.0", 8000, backlog=4096).start()
        return runner

    async def _status(self, request: web.Request) -> web.Response:
        host = request.host
        status = self._statuses.get(host)
        if status is None:
            tier = TierStatus(total=1000, free=1000, block_bytes=MIB)
            status = AgentStatus(
                version=1, incarnation=uuid.uuid4().hex, state="ready", model="m", device_tier=tier
            )
            self._statuses[host] = status
        elif "since" in request.query:
            if zlib.crc32(host.encode()) % 100 < 100 * BUSY_SHARE:
                active = self._dice.randrange(1000)
                tier = TierStatus(total=1000, free=1000 - active, active=active, block_bytes=MIB)
                changes = {"version": status.version + 1, "device_tier": tier, "running": active // 50}
                status = self._statuses[host] = status.model_copy(update=changes)
            else:
                await asyncio.sleep(float(request.query["wait"]))
        self.served += 1
        return web.Response(text=status.model_dump_json(), content_type="application/json")


# ── Kubelet ───────────────────────────────────────────────────────────────────────────────────────────


async def watch(kube: Kube, kind: Any, since: int) -> AsyncIterator[Raw]:
    """Events of one kind in the namespace, for ever."""
    url = f"{kube.credentials.host}{kind.path(NAMESPACE)}"
    trust = None if kube.credentials.ssl_ca_cert is None else kube._client.rest_client.ssl_context
    headers = {"Authorization": await kube.authorization() or ""}
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, read_bufsize=1 << 22) as session:
        while True:
            query = {"watch": "true", "resourceVersion": str(since), "allowWatchBookmarks": "true"}
            async with session.get(url, params=query, ssl=trust) as response:  # type: ignore[arg-type]
                async for line in response.content:
                    event: Raw = json.loads(line)
                    since = int(event["object"]["metadata"]["resourceVersion"])
                    if event["type"] in ("ADDED", "MODIFIED"):
                        yield event["object"]


async def play_kubelet(kube: Kube, since: int) -> None:
    """Every pod runs and is ready as soon as it is there, at an address of its own."""
    addresses = (
        f"127.{a}.{b}.{c}" for a, b, c in itertools.product(range(64, 128), range(256), range(1, 255))
    )
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    seen: set[str] = set()
    running: set[asyncio.Task[Raw]] = set()
    slots = asyncio.Semaphore(8)

    async def write(name: str, status: Raw) -> Raw:
        async with slots:
            return await kube._call(
                "patch", POD, POD.path(NAMESPACE, name, "status"), method="PATCH", body={"status": status},
                content="application/merge-patch+json",
            )  # fmt: skip

    async for pod in watch(kube, POD, since):
        if pod["metadata"]["uid"] in seen:
            continue
        seen.add(pod["metadata"]["uid"])
        address = next(addresses)
        container = {"name": "agent", "ready": True, "restartCount": 0, "image": "i", "imageID": "i"}
        conditions = [
            {"type": name, "status": "True", "lastTransitionTime": now} for name in ("PodScheduled", "Ready")
        ]
        status = {
            "phase": "Running",
            "podIP": address,
            "podIPs": [{"ip": address}],
            "conditions": conditions,
            "containerStatuses": [{**container, "state": {"running": {"startedAt": now}}}],
        }
        task = asyncio.create_task(write(pod["metadata"]["name"], status))
        running.add(task)
        task.add_done_callback(running.discard)


class Statuses:
    """The newest status of each service, and who waits for one."""

    def __init__(self) -> None:
        self.newest: dict[str, Raw] = {}
        self._changed = asyncio.Condition()

    async def follow(self, kube: Kube, since: int) -> None:
        async for found in watch(kube, LLM_SERVICE, since):
            async with self._changed:
                self.newest[found["metadata"]["name"]] = found
                self._changed.notify_all()

    async def observed(self, name: str, generation: int) -> float:
        """When the status of this generation came."""

        def holds() -> bool:
            status = self.newest.get(name, {}).get("status") or {}
            return int(status.get("observedGeneration", 0)) >= generation

        async with self._changed:
            await self._changed.wait_for(holds)
        return time.perf_counter()

    async def all_ready(self, count: int, replicas: int) -> None:
        def ready(found: Raw) -> bool:
            status = found.get("status") or {}
            condition = next((one for one in status.get("conditions", ()) if one["type"] == "Ready"), {})
            return condition.get("status") == "True" and status["readyReplicas"] == replicas

        async with self._changed:
            await self._changed.wait_for(lambda: sum(map(ready, self.newest.values())) == count)


# ── The operator ──────────────────────────────────────────────────────────────────────────────────────


class Operator:
    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        self.log = folder / f"operator-{uuid.uuid4().hex[:4]}.log"
        environment = {
            **os.environ,
            "KUBECONFIG": str(kubeconfig),
            "BLOCKYARD_OPERATOR_AGENT_IMAGE": "agent:1",
            "BLOCKYARD_OPERATOR_HOST": "127.0.0.1",
            "BLOCKYARD_OPERATOR_PORT": "0",
            "BLOCKYARD_OPERATOR_LEASE_NAMESPACE": NAMESPACE,
        }
        command = [sys.executable, "-m", "blockyard.operator.main"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stderr=log, env=environment)

    async def metrics(self) -> str:
        while not (match := re.search(r"\('127.0.0.1', ([0-9]+)\)", self.log.read_text())):
            assert self.process.poll() is None, self.log.read_text()
            await asyncio.sleep(0.1)
        url = f"http://127.0.0.1:{match[1]}/metrics"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return await response.text()

    async def until_acting(self) -> None:
        for _ in range(int(LIMIT / 0.2)):
            if await self.total("blockyard_operator_lease_held"):
                return
            await asyncio.sleep(0.2)

    async def until_looked_at(self, services: int) -> None:
        """Until each service has had a round and nothing is due."""
        for _ in range(int(LIMIT / 0.2)):
            rounds = await self.total("blockyard_operator_reconcile_seconds_count")
            if rounds >= services and not await self.total("blockyard_operator_queue_depth"):
                return
            await asyncio.sleep(0.2)

    async def total(self, name: str) -> float:
        lines = (await self.metrics()).splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{name}(_total)?[{{ ]", line)
        )

    async def writes(self) -> float:
        """Without the Lease's."""
        pattern = r'api_writes_total\{kind="(?!Lease)\w+"\} ([0-9.e+]+)$'
        return sum(map(float, re.findall(pattern, await self.metrics(), re.MULTILINE)))

    async def buckets(self, name: str) -> dict[float, float]:
        """A histogram of the operator: rounds (successful ones) by the upper bound of their seconds."""
        bucket = f"blockyard_operator_{name}_seconds_bucket"
        pattern = rf'^{bucket}\{{le="([0-9.+Inf]+)"(?:,result="ok")?\}} ([0-9.e+]+)$'
        return {
            float(le): float(count) for le, count in re.findall(pattern, await self.metrics(), re.MULTILINE)
        }

    def memory(self) -> float:
        """Resident, in MiB."""
        return int(re.findall(r"VmRSS:\s+([0-9]+)", self._proc("status"))[0]) / 1024

    def peak_memory(self) -> float:
        return int(re.findall(r"VmHWM:\s+([0-9]+)", self._proc("status"))[0]) / 1024

    def cpu(self) -> float:
        """Seconds used so far."""
        return proc.cpu_seconds(self.process.pid)

    def _proc(self, name: str) -> str:
        return Path(f"/proc/{self.process.pid}/{name}").read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def quantile(buckets: dict[float, float], share: float) -> float:
    """The upper bound of the bucket in which the share lies."""
    return next(le for le, count in buckets.items() if count >= share * max(buckets.values()))


# ── The run ───────────────────────────────────────────────────────────────────────────────────────────


def service(number: int, replicas: int) -> Raw:
    return {
        "apiVersion": "serving.blockyard.dev/v1alpha1",
        "kind": "LLMService",
        "metadata": {"name": f"s{number}", "namespace": NAMESPACE},
        "spec": {
            "model": {"hub": {"name": "owner/name"}},
            "device": "cpu",
            "replicas": replicas,
            "gateway": {"replicas": 0},
        },
    }


async def prepare(kube: Kube) -> None:
    """CRDs, the namespace, and the account that a controller would have made."""
    for name in ("llmservices", "kvmoves"):
        body = yaml.safe_load((ROOT / f"crds/{name}.yaml").read_text())
        path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        await kube._call("create", LLM_SERVICE, path, method="POST", body=body)
    spaces = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    await kube._call("create", LLM_SERVICE, "/api/v1/namespaces", method="POST", body=spaces)
    account = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": "default", "namespace": NAMESPACE},
    }
    await kube.create(account)


async def newest_version(kube: Kube) -> int:
    """Of the list of services, as soon as the API server has read their definition."""
    for _ in range(120):
        with contextlib.suppress(NotFound):
            async for page in kube.pages(LLM_SERVICE, NAMESPACE):
                return page.version
        await asyncio.sleep(0.5)
    raise TimeoutError("LLMServices are not served")


async def measure(control_plane: ControlPlane, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    kubeconfig = control_plane.access.write_kubeconfig(folder / "kubeconfig")
    kube = Kube(await load_credentials(OperatorSettings(agent_image="i", kubeconfig=kubeconfig)))
    await prepare(kube)
    since = await newest_version(kube)
    runner = await Agents().start()
    statuses = Statuses()
    tasks = [
        asyncio.create_task(play_kubelet(kube, since)),
        asyncio.create_task(statuses.follow(kube, since)),
    ]
    operator = Operator(kubeconfig, folder)
    try:
        await operator.until_acting()
        return await phases(kube, kubeconfig, folder, statuses, operator, options)
    finally:
        operator.kill()
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        for end in ended:
            if isinstance(end, Exception):
                print(f"a task of the benchmark failed: {end!r}")
        await runner.cleanup()
        await kube.close()


async def phases(
    kube: Kube,
    kubeconfig: Path,
    folder: Path,
    statuses: Statuses,
    operator: Operator,
    options: argparse.Namespace,
) -> dict[str, Any]:
    found: dict[str, Any] = {"services": options.services, "agents": options.services * options.replicas}
    found["memory_empty_mib"] = operator.memory()

    begin = time.perf_counter()
    numbers = iter(range(options.services))

    async def create() -> None:
        for number in numbers:
            await kube.create(service(number, options.replicas))

    await asyncio.gather(*(create() for _ in range(8)))
    created = time.perf_counter() - begin
    await asyncio.wait_for(statuses.all_ready(options.services, options.replicas), LIMIT)
    found["all_created_s"], found["all_ready_s"] = created, time.perf_counter() - begin
    found["memory_ready_mib"] = operator.memory()
    show(found)

    await asyncio.sleep(40)  # load reports are told within 30 s
    cpu, writes, polls = (
        operator.cpu(),
        await operator.writes(),
        await operator.total("blockyard_operator_polls"),
    )
    await asyncio.sleep(options.seconds)
    found["steady_writes_per_minute"] = (await operator.writes() - writes) * 60 / options.seconds
    polled = await operator.total("blockyard_operator_polls") - polls
    found["steady_polls_per_s"] = polled / options.seconds
    found["steady_cpu_share"] = (operator.cpu() - cpu) / options.seconds
    show(found)

    before = {name: await operator.buckets(name) for name in ("reconcile", "queue")}
    latencies: list[float] = []

    async def change(number: int) -> None:
        name, timeout = f"s{number}", random.randrange(301, 3000)
        begin = time.perf_counter()
        made = await kube.merge(
            LLM_SERVICE, NAMESPACE, name, {"spec": {"drain": {"timeoutSeconds": timeout}}}
        )
        observed = await asyncio.wait_for(statuses.observed(name, made["metadata"]["generation"]), LIMIT)
        latencies.append(observed - begin)

    changes = []
    for number in random.sample(range(options.services), min(options.services, options.changes)):
        changes.append(asyncio.create_task(change(number)))
        await asyncio.sleep(1 / options.rate)
    await asyncio.gather(*changes)
    found["change_rate_per_s"] = options.rate
    for share in (0.5, 0.9, 0.99):
        found[f"change_to_status_p{share * 100:g}_s"] = report.percentile(latencies, share)
    found["change_to_status_max_s"] = max(latencies)
    for name in ("reconcile", "queue"):
        rounds = {le: count - before[name][le] for le, count in (await operator.buckets(name)).items()}
        found[f"{name}_p99_at_most_s"] = quantile(rounds, 0.99)
    found["memory_peak_mib"] = operator.peak_memory()
    show(found)

    operator.kill()
    begin = time.perf_counter()
    heir = Operator(kubeconfig, folder)
    try:
        await heir.until_acting()
        found["takeover_s"] = time.perf_counter() - begin
        await heir.until_looked_at(options.services)
        found["takeover_all_looked_at_s"] = time.perf_counter() - begin
        found["takeover_writes"] = await heir.writes()
        found["takeover_memory_mib"] = heir.memory()
    finally:
        heir.kill()
    show(found)
    return found


def show(found: dict[str, Any]) -> None:
    print("\n" + "\n".join(f"{name:32} {value:10.2f}" for name, value in found.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--services", type=int, default=1000)
    parser.add_argument("--replicas", type=int, default=2, help="agents of each service")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the steady phase")
    parser.add_argument("--changes", type=int, default=500)
    parser.add_argument("--rate", type=float, default=10.0, help="changes a second")
    options = parser.parse_args()
    programs = binaries.prepare(lambda line: print(line, flush=True))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        control_plane = ControlPlane(folder / "control-plane", programs)
        try:
            # The benchmark does not need them, and there are only two cores.
            for name in ("kube-controller-manager", "kube-scheduler"):
                os.kill(control_plane.pids[name], 9)
            found = asyncio.run(measure(control_plane, folder, options))
        finally:
            control_plane.stop()
    report.save("operator_scale", found)


if __name__ == "__main__":
    main()
