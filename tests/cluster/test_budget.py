"""The PodDisruptionBudget keeps every undrained agent, in the states in which it could slip through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blockyard.operator import children
from blockyard.operator.children import Defaults
from blockyard.operator.observed import UNDRAINED, Service

from ..operator.manifests import llm_service
from .cluster import Cluster

ROOT = Path(__file__).parents[2]
DEFAULTS = Defaults(image="agent:1", namespace="blockyard-system")


def set_ready(cluster: Cluster, namespace: str, pod: str, ready: str) -> None:
    """Play the kubelet: the pod runs, and is ready or not."""
    conditions = [{"type": "Ready", "status": ready}]
    status = {"phase": "Running", "conditions": conditions}
    cluster.kubectl(
        *("patch", "pod", pod, "-n", namespace, "--subresource=status", "--type=merge"),
        *("-p", json.dumps({"status": status})),
    )


def wait_for_budget(cluster: Cluster, namespace: str, healthy: int) -> None:
    def seen(budget: dict[str, Any] | None) -> bool:
        status = (budget or {}).get("status") or {}
        return bool(status.get("currentHealthy") == healthy and status.get("observedGeneration"))

    cluster.wait("PodDisruptionBudget", "llm-agents", namespace, seen)


def test_an_undrained_agent_is_never_evicted_and_a_released_one_always(
    cluster: Cluster, namespace: str
) -> None:
    """With one replica wanted and two ready, as in a surge; and while one of them drains and is not ready."""
    for file in ("llmservices", "kvmoves"):
        cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / f"crds/{file}.yaml"))
    cluster.kubectl("wait", "--for=condition=Established", "crd/llmservices.serving.blockyard.dev")
    manifest = llm_service()
    manifest["metadata"]["namespace"] = namespace
    service = Service.of(cluster.create(manifest))
    (budget,) = [
        each for each in children.companions(service, DEFAULTS) if each["kind"] == "PodDisruptionBudget"
    ]
    cluster.create(budget)
    for name in ("llm-aaaaa", "llm-bbbbb"):
        pod = children.agent_pod(service, name, "0123456789", DEFAULTS)
        pod["spec"]["schedulerName"] = "nobody"  # no scheduler takes it, since the test needs no node
        cluster.create(pod)
        set_ready(cluster, namespace, name, "True")
    wait_for_budget(cluster, namespace, healthy=2)
    assert not cluster.evict("llm-aaaaa", namespace), "one more is ready than the budget wants"

    set_ready(cluster, namespace, "llm-aaaaa", "False")
    wait_for_budget(cluster, namespace, healthy=1)
    assert not cluster.evict("llm-aaaaa", namespace), "it drains, and another one is ready"

    cluster.patch("Pod", "llm-aaaaa", namespace, {"metadata": {"labels": {UNDRAINED: None}}})
    assert cluster.evict("llm-aaaaa", namespace), "it is released"
    assert not cluster.evict("llm-bbbbb", namespace)
