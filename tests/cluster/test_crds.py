"""A real API server takes the CRDs, fills in defaults, and refuses what cannot work with words that help."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..operator.manifests import CHANGES, MOVES, NAMES, SERVICES, Raw, kv_move, llm_service
from .api import ApiError
from .cluster import Cluster

ROOT = Path(__file__).parents[2]
BROKEN = SERVICES | NAMES | MOVES


@pytest.fixture(scope="module")
def crds(cluster: Cluster) -> Cluster:
    """The cluster, with our kinds."""
    for file in sorted((ROOT / "crds").glob("*.yaml")):
        cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(file))
        name = f"{file.stem}.serving.blockyard.dev"
        cluster.kubectl("wait", "--for=condition=Established", "--timeout=60s", f"crd/{name}")
        found = cluster.get("CustomResourceDefinition", name)
        conditions = {each["type"]: each["status"] for each in found["status"]["conditions"]}
        assert conditions.get("NonStructuralSchema", "False") == "False"
    return cluster


def create(cluster: Cluster, namespace: str, manifest: Raw) -> Raw:
    whole = copy.deepcopy(manifest)
    whole["metadata"]["namespace"] = namespace
    return cluster.create(whole)


@pytest.mark.parametrize("wrong", BROKEN)
def test_what_cannot_work_is_refused_and_the_field_named(crds: Cluster, namespace: str, wrong: str) -> None:
    manifest, path, words = BROKEN[wrong]
    with pytest.raises(ApiError) as refusal:
        create(crds, namespace, manifest)
    assert refusal.value.code in (400, 422)
    assert path in str(refusal.value) and words in str(refusal.value)


@pytest.mark.parametrize("what", CHANGES)
def test_what_must_not_change_does_not(crds: Cluster, namespace: str, what: str) -> None:
    before, change, words = CHANGES[what]
    made = create(crds, namespace, before)
    with pytest.raises(ApiError) as refusal:
        crds.patch(before["kind"], made["metadata"]["name"], namespace, {"spec": change})
    assert refusal.value.code == 422
    assert words in str(refusal.value)


def test_an_approval_can_be_given(crds: Cluster, namespace: str) -> None:
    create(crds, namespace, kv_move())
    made = crds.patch("KVMove", "move", namespace, {"spec": {"approved": True}})
    assert made["spec"]["approved"] is True


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda file: file.name)
def test_examples_are_taken_with_strict_validation(crds: Cluster, namespace: str, file: Path) -> None:
    crds.kubectl("create", "--validate=strict", "-n", namespace, "-f", str(file))


def test_a_minimal_manifest_comes_back_whole(crds: Cluster, namespace: str) -> None:
    spec = create(crds, namespace, llm_service())["spec"]
    assert (spec["replicas"], spec["tensorParallel"], spec["device"]) == (1, 1, "cuda")
    assert (spec["kv"]["blockTokens"], spec["kv"]["prefixCache"]) == (16, True)
    assert (spec["gateway"]["port"], spec["drain"]["timeoutSeconds"]) == (80, 300)
    assert "template" not in spec and "auth" not in spec


def test_a_template_is_kept_as_it_is(crds: Cluster, namespace: str) -> None:
    """Every field of a PodSpec and the directives of a merge go through."""
    pod: dict[str, Any] = {
        "tolerations": [{"key": "a", "tolerationSeconds": 5}],
        "containers": [{"name": "agent", "env": [{"name": "A", "$patch": "delete"}]}],
    }
    assert create(crds, namespace, llm_service(template={"spec": pod}))["spec"]["template"]["spec"] == pod


def test_it_scales_as_kubectl_and_autoscalers_do(crds: Cluster, namespace: str) -> None:
    create(crds, namespace, llm_service())
    crds.kubectl("scale", "llms/llm", "--replicas=3", "-n", namespace)
    assert crds.get("LLMService", "llm", namespace)["spec"]["replicas"] == 3


def test_a_person_sees_names_columns_and_explanations(crds: Cluster, namespace: str) -> None:
    create(crds, namespace, llm_service())
    create(crds, namespace, kv_move())
    shown = crds.kubectl("get", "blockyard", "-n", namespace)
    assert "llmservice.serving.blockyard.dev/llm" in shown and "kvmove.serving.blockyard.dev/move" in shown
    assert "llmservice.serving.blockyard.dev/llm" in crds.kubectl("get", "all", "-n", namespace)
    for column in ("READY", "REASON", "WANTED", "SERVING", "USED %", "AGE"):
        assert column in crds.kubectl("get", "llms", "-n", namespace)
    assert "PHASE" in crds.kubectl("get", "kvm", "-n", namespace)
    explained = yaml.safe_load(crds.kubectl("get", "llms", "llm", "-n", namespace, "-o", "yaml"))
    assert explained["kind"] == "LLMService"
    assert "Tokens in a KV block" in crds.kubectl("explain", "llms.spec.kv.blockTokens")
