"""A rollout where no node has room for one more agent: the old one gives its place, clients wait."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .api import Raw
from .clients import Clients
from .cluster import Cluster
from .node import NodeStandIn
from .operator_process import STARTING, Service, manifest, operators, prepare, reason, settled
from .rights import operators_account
from .truth import Recorder

NAME = "tight"
CPU = "1500m"  # one agent asks for 1, a gateway for a tenth


def test_a_rollout_without_room_for_a_second_agent(
    cluster: Cluster, nodes: NodeStandIn, tmp_path: Path
) -> None:
    prepare(cluster, nodes)
    with cluster.namespace() as namespace, operators_account(cluster, namespace) as account:
        node = f"{namespace}-node"
        cluster.run(nodes.add(node, gpus=0, cpu=CPU))
        with (
            operators(cluster, namespace, account, tmp_path) as start,
            Recorder(cluster, NAME, namespace) as recorder,
        ):
            start()
            rollout = {"whenFull": "Wait", "patienceSeconds": 1}
            gateway = {"replicas": 1, "holdSeconds": int(STARTING)}
            cluster.create(manifest(NAME, namespace, gateway=gateway, rollout=rollout))
            service = Service(cluster, NAME, namespace)
            old = service.wait(settled(1))["status"]["revision"]
            cluster.wait_for_endpoints(NAME, namespace, 1)
            clients = Clients(NAME, lambda: cluster.endpoints(NAME, namespace), count=2, tokens=8)
            clients.wait_for(2)

            service.patch(engine={"maxSequences": 3})
            service.wait(progressing("free a GPU, or set rollout.whenFull to Drain"))
            assert "0 of 1 agents run revision" in reason(recorder.seen[-1], "Progressing")[1]
            assert {pod["metadata"]["labels"]["serving.blockyard.dev/revision"] for pod in service.pods()} > {
                old
            }
            clients.wait_for(2)
            assert not clients.broken, "the old agent serves while nothing happens"

            service.patch(rollout={"whenFull": "Drain"})
            service.wait(progressing("so this one gives its place"))
            new = service.wait(settled(1))["status"]["revision"]
            assert new != old
            clients.wait_for(4)
            clients.stop()
            assert not clients.broken and not clients.failed, clients
            decisions = service.wait(settled(1))["status"]["decisions"]
            assert any("so this one gives its place" in decision["message"] for decision in decisions)

            cluster.delete("LLMService", NAME, namespace)
            service.wait_until_gone()
        cluster.run(nodes.remove(node))


def progressing(words: str) -> Callable[[Raw | None], bool]:
    return lambda found: words in reason(found, "Progressing")[1]
