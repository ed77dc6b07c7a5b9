"""The operator on a real control plane, real agents in its pods: what it makes, changes, heals, takes away.

A recorder follows every status that is written, and each must be true of itself.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .api import Raw
from .cluster import Cluster
from .node import NodeStandIn
from .operator_process import (
    STARTING,
    OperatorProcess,
    Service,
    condition,
    manifest,
    prepare,
    reason,
    settled,
)
from .rights import operators_account

StartOperator = Callable[..., OperatorProcess]


@pytest.fixture(scope="module", autouse=True)
def _prepared(cluster: Cluster, nodes: NodeStandIn) -> None:
    prepare(cluster, nodes)


@pytest.fixture
def node(cluster: Cluster, nodes: NodeStandIn, namespace: str) -> Iterator[str]:
    """One node for this test's pods."""
    name = f"{namespace}-a"
    cluster.run(nodes.add(name, gpus=0, labels={"test": namespace}))
    yield name
    if cluster.find("Node", name) is not None:
        cluster.run(nodes.remove(name))


@pytest.fixture
def account(cluster: Cluster, namespace: str) -> Iterator[Path]:
    """A kubeconfig of the chart's ServiceAccount; afterwards nothing may have been refused to it."""
    yield from operators_account(cluster, namespace)


@pytest.fixture
def start(cluster: Cluster, namespace: str, account: Path, tmp_path: Path) -> Iterator[StartOperator]:
    """Operators of the test's namespace; they end with it, after its services."""
    started: list[OperatorProcess] = []

    def begin(**settings: str) -> OperatorProcess:
        wait = settings.pop("wait", "yes") == "yes"
        started.append(OperatorProcess(account, namespace, tmp_path, wait=wait, **settings))
        return started[-1]

    yield begin
    for service in cluster.items("LLMService", namespace):
        cluster.patch("LLMService", service["metadata"]["name"], namespace, {"metadata": {"finalizers": []}})
        cluster.delete("LLMService", service["metadata"]["name"], namespace)
    codes = [operator.stop() for operator in started]
    tracebacks = [operator.text() for operator in started if "Traceback" in operator.text()]
    assert not tracebacks, tracebacks[0]
    assert set(codes) <= {0, -signal.SIGKILL}, codes


class Recorder:
    """Follows a service and checks each of its statuses."""

    def __init__(self, cluster: Cluster, name: str, namespace: str) -> None:
        self._cluster, self._name, self._namespace = cluster, name, namespace
        self.seen: list[Raw] = []
        self.problems: list[str] = []
        self._stop = asyncio.Event()
        self._ended = threading.Event()

    async def follow(self) -> None:
        async for event, found in self._cluster.api.watch("LLMService", self._namespace):
            if event not in ("SYNCED", "DELETED") and found["metadata"]["name"] == self._name:
                self.seen.append(found)
                self.problems += untruths(found)

    def __enter__(self) -> Recorder:
        self._task = asyncio.run_coroutine_threadsafe(self.follow(), self._cluster._loop)
        return self

    def __exit__(self, *_: object) -> None:
        self._task.cancel()
        assert not self.problems, self.problems
        assert self.seen, "no status was ever seen"


def untruths(found: Raw) -> list[str]:
    """What a status says that cannot be."""
    status, generation = found.get("status") or {}, found["metadata"]["generation"]
    if not status:
        return []
    conditions = {one["type"]: one for one in status["conditions"]}
    wrong = {
        "a future generation": status["observedGeneration"] > generation,
        "a condition of another generation": any(
            one["observedGeneration"] != status["observedGeneration"] for one in conditions.values()
        ),
        "more ready than there are": status["readyReplicas"] > status["replicas"],
        "more updated than there are": status["updatedReplicas"] > status["replicas"],
        "ready without ready agents": conditions["Ready"]["status"] == "True"
        and status["readyReplicas"] == 0
        and conditions["Ready"]["reason"] != "ScaledToZero",
        "stable while agents are missing": conditions["Progressing"]["reason"] == "Stable"
        and status["observedGeneration"] == generation
        and status["replicas"] != found["spec"]["replicas"],
        "conditions missing": set(conditions) != {"Ready", "Progressing", "Degraded", "Balanced"},
    }
    return [f"{words}: {status}" for words, holds in wrong.items() if holds]


@pytest.mark.usefixtures("node")
def test_apply_chat_scale_out_and_in_and_delete(
    cluster: Cluster, namespace: str, start: StartOperator
) -> None:
    operator = start()
    service = Service(cluster, "chat", namespace)
    cluster.create(manifest("chat", namespace))
    with Recorder(cluster, "chat", namespace):
        found = service.wait(settled(1))
        (pod,) = service.pods()
        assert service.chat(pod, "Say hello.")
        assert found["metadata"]["finalizers"] == ["serving.blockyard.dev/drain"]
        assert pod["metadata"]["ownerReferences"][0]["uid"] == found["metadata"]["uid"]

        cluster.kubectl("scale", "llms/chat", "-n", namespace, "--replicas=3")
        service.wait(settled(3))
        assert all(service.chat(each, "Say hello.") for each in service.pods())
        assert len(cluster.wait_for_endpoints("chat-agents", namespace, 3)) == 3

        cluster.kubectl("scale", "llms/chat", "-n", namespace, "--replicas=1")
        service.wait(settled(1))
        (left,) = cluster.wait_for_endpoints("chat-agents", namespace, 1)
        assert left.split(":")[0] in {each["status"]["podIP"] for each in service.pods()}

        writes = operator.writes()
        assert operator.get("/healthz")[0] == 200
        cluster.delete("LLMService", "chat", namespace)
        service.wait(lambda found: found is None, limit=STARTING)
    for kind in ("Pod", "Service", "PodDisruptionBudget", "NetworkPolicy", "Secret"):
        for child in cluster.items(kind, namespace, labels="serving.blockyard.dev/service=chat"):
            name = child["metadata"]["name"]
            cluster.wait(kind, name, namespace, lambda found: found is None)
    assert operator.writes() > writes


@pytest.mark.usefixtures("node")
def test_a_steady_service_costs_no_writes(cluster: Cluster, namespace: str, start: StartOperator) -> None:
    operator = start()
    service = Service(cluster, "idle", namespace)
    cluster.create(manifest("idle", namespace))
    found = service.wait(settled(1))

    async def told(reason: str) -> None:
        """Until there is such an event: the last that is written of the way here."""
        async for event, each in cluster.api.watch("Event", namespace):
            if event != "SYNCED" and each["reason"] == reason:
                return

    cluster.run(asyncio.wait_for(told("Ready"), 60))
    before, polls = operator.writes(), operator.metric("blockyard_operator_polls")

    async def quiet(seconds: float) -> list[str]:
        """What changes of the service and its children meanwhile."""
        changes: list[str] = []

        async def follow(kind: str) -> None:
            synced = False
            async for event, each in cluster.api.watch(kind, namespace):
                synced = synced or event == "SYNCED"
                if synced and event != "SYNCED":
                    changes.append(f"{event} {kind} {each['metadata']['name']}")

        tasks = [asyncio.create_task(follow(kind)) for kind in ("LLMService", "Pod", "Service", "Secret")]
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        return changes

    assert cluster.run(quiet(45)) == []
    assert operator.writes() == before
    assert operator.metric("blockyard_operator_polls") > polls, "it has looked all the time"
    assert cluster.get("LLMService", "idle", namespace) == found


@pytest.mark.usefixtures("node")
def test_a_rolling_update_goes_on_where_a_killed_operator_left_it(
    cluster: Cluster, namespace: str, start: StartOperator
) -> None:
    first = start()
    service = Service(cluster, "roll", namespace)
    cluster.create(manifest("roll", namespace, replicas=2))
    with Recorder(cluster, "roll", namespace) as recorder:
        old = service.wait(settled(2))["status"]["revision"]
        before = {pod["metadata"]["name"] for pod in service.pods()}
        service.patch(engine={"maxSequences": 3})
        service.wait(lambda found: condition(found, "Progressing") == "True")
        first.kill()
        second = start(wait="no")
        assert second.metric("blockyard_operator_lease_held") == 0, "the dead one's Lease is still running"
        second.wait_until_acting()
        new = service.wait(settled(2))["status"]["revision"]
        assert old != new
        for name in before:
            cluster.wait("Pod", name, namespace, lambda found: found is None)
        ready = [found["status"]["readyReplicas"] for found in recorder.seen if "status" in found]
        assert min(ready[ready.index(2) :]) == 2, "an old agent went before a new one was ready"
        assert max(found["status"]["replicas"] for found in recorder.seen if "status" in found) <= 3
    assert all(pod["metadata"]["labels"]["serving.blockyard.dev/revision"] == new for pod in service.pods())


@pytest.mark.usefixtures("node")
def test_a_killed_agent_and_a_lost_node_are_healed(
    cluster: Cluster, namespace: str, nodes: NodeStandIn, start: StartOperator
) -> None:
    start()
    service = Service(cluster, "heal", namespace)
    cluster.create(manifest("heal", namespace))
    with Recorder(cluster, "heal", namespace):
        service.wait(settled(1))
        (pod,) = service.pods()
        nodes.kill(pod["metadata"]["name"], namespace)
        service.wait(lambda found: condition(found, "Ready") == "False")
        service.wait(settled(1))
        (again,) = service.pods()
        assert again["metadata"]["uid"] == pod["metadata"]["uid"], "the kubelet restarts it, not the operator"
        assert service.chat(again, "Say hello.")

        cluster.run(nodes.add(f"{namespace}-b", gpus=0, labels={"test": namespace}))
        lost = again["spec"]["nodeName"]
        cluster.run(nodes.remove(lost))
        service.wait(lambda found: any(line["node"] not in ("", lost) for line in found["status"]["agents"]))
        service.wait(settled(1))
        (moved,) = service.pods()
        assert moved["spec"]["nodeName"] != lost
        assert service.chat(moved, "Say hello.")


@pytest.mark.usefixtures("node")
def test_what_cannot_be_scheduled_is_said_in_the_schedulers_words(
    cluster: Cluster, namespace: str, start: StartOperator
) -> None:
    start()
    service = Service(cluster, "stuck", namespace)
    nowhere = {"spec": {"nodeSelector": {"no-such": "label"}}}
    cluster.create(manifest("stuck", namespace, template=nowhere))
    found = service.wait(lambda found: reason(found, "Ready")[0] == "Unschedulable")
    assert "node(s) didn't match Pod's node affinity/selector" in reason(found, "Ready")[1]
    assert condition(found, "Degraded") == "True"
    told = cluster.kubectl("describe", "llms/stuck", "-n", namespace)
    assert "Unschedulable" in told and "AgentCreated" in told
    service.patch(template={"spec": {"nodeSelector": None}}, replicas=0)
    service.wait(lambda found: reason(found, "Ready")[0] == "ScaledToZero")


@pytest.mark.usefixtures("node")
def test_a_template_that_does_not_fit_is_said_and_stops_nothing_else(
    cluster: Cluster, namespace: str, start: StartOperator
) -> None:
    operator = start()
    bad, good = Service(cluster, "bad", namespace), Service(cluster, "good", namespace)
    cluster.create(manifest("bad", namespace, replicas=0, template={"spec": {"containers": "none"}}))
    cluster.create(manifest("good", namespace, replicas=0))
    found = bad.wait(lambda found: condition(found, "Ready") == "False")
    assert reason(found, "Ready")[0] in ("InvalidSpec", "Refused"), found["status"]
    good.wait(lambda found: reason(found, "Ready")[0] == "ScaledToZero")
    cluster.delete("LLMService", "bad", namespace)
    bad.wait(lambda found: found is None)
    assert operator.get("/healthz")[0] == 200


@pytest.mark.usefixtures("node")
def test_load_scales_out_and_calm_scales_in(cluster: Cluster, namespace: str, start: StartOperator) -> None:
    start()
    service = Service(cluster, "scaled", namespace)
    engine = {"threads": 1, "maxSequences": 1, "maxModelLen": 1024}
    scaling = {"maxReplicas": 2, "scaleInDelaySeconds": 5}
    cluster.create(manifest("scaled", namespace, engine=engine, autoscaling=scaling))
    calm = threading.Event()

    def ask(pod: Raw) -> None:
        while not calm.is_set():
            service.chat(pod, "Say hello.")

    with Recorder(cluster, "scaled", namespace), ThreadPoolExecutor(3) as clients:
        service.wait(settled(1))
        (pod,) = service.pods()
        asking = [clients.submit(ask, pod) for _ in range(3)]
        try:
            service.wait(settled(2))
        finally:
            calm.set()
        for each in asking:
            each.result()
        found = service.wait(settled(1))
    messages = [each["message"] for each in found["status"]["decisions"] if each["action"] == "Scale"]
    assert [message.partition(":")[0] for message in messages] == [
        "replicas from 2 to 1",
        "replicas from 1 to 2",
    ]
    assert "Scaled" in cluster.kubectl("describe", "llms/scaled", "-n", namespace)
