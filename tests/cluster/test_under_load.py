"""Clients ask through two gateways all the time while everything behind them changes, breaks and goes.

One service for all tests, which run in the order in which they stand here; each leaves it settled with two
agents. No request may fail, and no attempt may break unless the process that held its connection was killed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from .api import Raw
from .clients import PROMPTS, Clients, ask
from .cluster import Cluster
from .node import NodeStandIn
from .operator_process import (
    STARTING,
    OperatorProcess,
    Service,
    StartOperator,
    condition,
    manifest,
    operators,
    prepare,
    settled,
)
from .rights import operators_account
from .truth import Recorder

NAME = "busy"
GATEWAYS = 2


class Stage:
    """A service on three nodes (two for agents, one for the gateways), its operator and its clients."""

    def __init__(
        self, cluster: Cluster, nodes: NodeStandIn, namespace: str, start: StartOperator, recorder: Recorder
    ) -> None:
        self.cluster, self.nodes, self.namespace = cluster, nodes, namespace
        self.start_operator, self.recorder = start, recorder
        self.operator: OperatorProcess = start()
        self.service = Service(cluster, NAME, namespace)
        self.add_node("a", "agents")
        self.add_node("b", "agents")
        self.add_node("gateways-node", "gateways")

        def on(role: str) -> dict[str, object]:
            return {"spec": {"nodeSelector": {"for": f"{namespace}-{role}"}}}

        gateway = {"replicas": GATEWAYS, "template": on("gateways")}
        cluster.create(manifest(NAME, namespace, gateway=gateway, template=on("agents")))
        self.service.wait(settled(1))
        cluster.wait_for_endpoints(NAME, namespace, GATEWAYS)
        self.clients = Clients(NAME, self.addresses)

    def add_node(self, name: str, role: str) -> None:
        labels = {"for": f"{self.namespace}-{role}"}
        self.cluster.run(self.nodes.add(f"{self.namespace}-{name}", gpus=0, labels=labels))

    def addresses(self) -> list[str]:
        return self.cluster.endpoints(NAME, self.namespace)

    def scale(self, replicas: int) -> None:
        self.cluster.kubectl("scale", f"llms/{NAME}", "-n", self.namespace, f"--replicas={replicas}")
        self.service.wait(settled(replicas))

    def kill(self, pod: Raw) -> None:
        """kill -9 of its process, until it has been started again and is ready."""
        name = pod["metadata"]["name"]
        self.nodes.kill(name, self.namespace)

        def restarted(found: Raw | None) -> bool:
            (status,) = (found or pod)["status"]["containerStatuses"]
            return bool(status["restartCount"] == 1 and status["ready"])

        self.cluster.wait("Pod", name, self.namespace, restarted, limit=STARTING)

    def check(self, *, may_break: bool = False) -> None:
        """The clients are served, and no status has lied; nobody has noticed anything, unless that may be."""
        self.clients.wait_for(2 * len(PROMPTS))
        assert not self.clients.failed, self.clients
        assert may_break or not self.clients.broken, self.clients
        assert all(len(answers) == 1 for answers in self.clients.answers.values()), self.clients.answers
        self.recorder.check()
        self.clients.broken.clear()


@pytest.fixture(scope="module")
def stage(cluster: Cluster, nodes: NodeStandIn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    prepare(cluster, nodes)
    with ExitStack() as stack:
        namespace = stack.enter_context(cluster.namespace())
        account = stack.enter_context(operators_account(cluster, namespace))
        folder = tmp_path_factory.mktemp("load")
        start = stack.enter_context(operators(cluster, namespace, account, folder))
        recorder = stack.enter_context(Recorder(cluster, NAME, namespace))
        made = Stage(cluster, nodes, namespace, start, recorder)
        stack.callback(made.clients.stop)
        yield made
    for node in cluster.items("Node"):
        if node["metadata"]["name"].startswith(f"{namespace}-"):
            cluster.run(nodes.remove(node["metadata"]["name"]))


def test_scaled_out_and_in(stage: Stage) -> None:
    stage.scale(3)
    stage.check()
    stage.scale(1)
    stage.check()
    stage.scale(2)
    stage.check()


def test_rolled_out_agents_and_gateways_with_the_operator_killed_in_the_middle(stage: Stage) -> None:
    service, recorder = stage.service, stage.recorder
    before, old = service.pods() + service.pods("gateway"), service.wait(settled(2))["status"]["revision"]
    seen = len(recorder.seen)
    noted = {"metadata": {"annotations": {"test/roll": "out"}}}
    service.patch(engine={"maxSequences": 3}, gateway={"template": noted})
    service.wait(lambda found: condition(found, "Progressing") == "True")
    stage.operator.kill()
    stage.operator = stage.start_operator(wait=False)
    assert stage.operator.metric("blockyard_operator_lease_held") == 0, "the dead one's Lease still runs"
    stage.operator.wait_until_acting()
    new = service.wait(settled(2))["status"]["revision"]
    for pod in before:
        stage.cluster.wait_until_gone("Pod", pod["metadata"]["name"], stage.namespace)
    assert len(stage.addresses()) == GATEWAYS
    revisions = {pod["metadata"]["labels"]["serving.blockyard.dev/revision"] for pod in service.pods()}
    assert revisions == {new} != {old}
    stage.check()
    statuses = [found["status"] for found in recorder.seen[seen:]]
    assert min(status["readyReplicas"] for status in statuses) == 2, "an old agent went before its successor"
    assert max(status["replicas"] for status in statuses) == 3, "at most maxSurge more than wanted"


def test_an_agent_is_killed_while_it_answers(stage: Stage) -> None:
    (victim, *_) = stage.service.pods()
    stage.service.wait_for_report(victim, lambda report: report["running"] > 0)
    seen = len(stage.recorder.seen)
    stage.kill(victim)
    stage.service.wait(settled(2))
    ready = [condition(found, "Ready") for found in stage.recorder.seen[seen:]]
    assert "False" in ready, "the status has told of it"
    assert victim["metadata"]["uid"] in {pod["metadata"]["uid"] for pod in stage.service.pods()}, (
        "the kubelet starts it again, the operator makes no other"
    )
    stage.check()


def test_a_gateway_is_killed(stage: Stage) -> None:
    """Its connections break with it, and until its readiness falls new ones are still sent to it."""
    (victim, *_) = stage.service.pods("gateway")
    stage.kill(victim)
    stage.service.wait(settled(2))
    stage.check(may_break=True)
    stage.check()


def test_the_operator_is_killed(stage: Stage) -> None:
    """Requests are served without an operator; a new one carries out what was changed meanwhile."""
    stage.operator.kill()
    stage.service.patch(replicas=1)
    stage.check()
    stage.operator = stage.start_operator()
    stage.service.wait(settled(1))
    stage.scale(2)
    stage.check()


def test_a_node_is_lost(stage: Stage) -> None:
    (victim, *_) = stage.service.pods()
    lost = victim["spec"]["nodeName"]
    stage.cluster.run(stage.nodes.remove(lost))
    stage.cluster.wait_until_gone("Pod", victim["metadata"]["name"], stage.namespace)
    stage.service.wait(settled(2))
    assert all(pod["spec"]["nodeName"] != lost for pod in stage.service.pods())
    stage.check()


def test_the_service_is_deleted(stage: Stage) -> None:
    """Open streams are completed, and then nothing is left."""
    stage.clients.stop()
    begun = threading.Barrier(3)

    def stream(address: str) -> str:
        prompt = "Tell me a long story about the sea."
        return ask(address, NAME, prompt, 96, stream=True, begun=lambda: begun.wait(timeout=120))

    with ThreadPoolExecutor() as threads:
        answers = [threads.submit(stream, address) for address in stage.addresses()]
        begun.wait(timeout=120)
        stage.cluster.delete("LLMService", NAME, stage.namespace)
        first, second = (answer.result() for answer in answers)
    assert first == second and first.endswith("[length]")
    stage.service.wait_until_gone()
