"""The operator on a real control plane, real agents in its pods: what it makes, says and takes away.

How services live through changes and failures while clients use them is in test_under_load.py.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .api import Raw
from .cluster import Cluster
from .node import NodeStandIn
from .operator_process import (
    Service,
    StartOperator,
    condition,
    manifest,
    operators,
    prepare,
    reason,
    settled,
)
from .rights import operators_account
from .truth import Recorder

QUIET = 45  # seconds; longer than load alone may wait to be written


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
    with operators_account(cluster, namespace) as kubeconfig:
        yield kubeconfig


@pytest.fixture
def start(cluster: Cluster, namespace: str, account: Path, tmp_path: Path) -> Iterator[StartOperator]:
    """Operators of the test's namespace; they end with it, after its services."""
    with operators(cluster, namespace, account, tmp_path) as begin:
        yield begin


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
        shown = service.shown()
        assert f"{namespace}/chat  3 of 3 ready" in shown
        assert all(pod["metadata"]["name"] in shown for pod in service.pods())

        cluster.kubectl("scale", "llms/chat", "-n", namespace, "--replicas=1")
        service.wait(settled(1))
        (left,) = cluster.wait_for_endpoints("chat-agents", namespace, 1)
        assert left.split(":")[0] in {each["status"]["podIP"] for each in service.pods()}

        writes = operator.writes()
        assert operator.get("/healthz")[0] == 200
        cluster.delete("LLMService", "chat", namespace)
        service.wait_until_gone()
    assert operator.writes() > writes


@pytest.mark.usefixtures("node")
def test_a_steady_service_costs_no_writes(
    cluster: Cluster, namespace: str, start: StartOperator, record_property: Callable[[str, object], None]
) -> None:
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

    assert cluster.run(quiet(QUIET)) == []
    record_property("API writes per idle minute", (operator.writes() - before) * 60 / QUIET)
    assert operator.writes() == before
    assert operator.metric("blockyard_operator_polls") > polls, "it has looked all the time"
    assert cluster.get("LLMService", "idle", namespace) == found


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
    bad.wait_until_gone()
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
