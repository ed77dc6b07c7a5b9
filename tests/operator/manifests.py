"""Manifests that cannot work, and what a person must be told: the field, in words of its rule."""

from __future__ import annotations

from typing import Any

Raw = dict[str, Any]
HUB: Raw = {"hub": {"name": "SmolLM2-135M-Instruct"}}


def llm_service(name: str = "llm", **spec: Any) -> Raw:
    """An LLMService that can work, but for ``spec``."""
    return {
        "apiVersion": "serving.blockyard.dev/v1alpha1",
        "kind": "LLMService",
        "metadata": {"name": name},
        "spec": {"model": HUB, **spec},
    }


def kv_move(name: str = "move", **spec: Any) -> Raw:
    """A KVMove that can be made, but for ``spec``; a field that is None is left out."""
    whole = {"service": "llm", "kind": "migrate", "from": "llm-aaaaa", "to": "llm-bbbbb", **spec}
    return {
        "apiVersion": "serving.blockyard.dev/v1alpha1",
        "kind": "KVMove",
        "metadata": {"name": name},
        "spec": {field: value for field, value in whole.items() if value is not None},
    }


def no_model() -> Raw:
    manifest = llm_service()
    del manifest["spec"]["model"]
    return manifest


# What is wrong -> (manifest, the field's path, a word of what is said).
SERVICES: dict[str, tuple[Raw, str, str]] = {
    "no model": (no_model(), "spec.model", ""),
    "a model from nowhere": (llm_service(model={}), "spec.model", "exactly one of hub"),
    "a model from two places": (
        llm_service(model={**HUB, "hostPath": {"path": "/m"}}),
        "spec.model",
        "exactly one of hub",
    ),
    "a claim's path that leads out": (
        llm_service(model={"persistentVolumeClaim": {"claimName": "c", "path": "a/../../b"}}),
        "spec.model.persistentVolumeClaim",
        "must not lead out",
    ),
    "a host path that is relative": (
        llm_service(model={"hostPath": {"path": "models"}}),
        "spec.model.hostPath.path",
        "",
    ),
    "a cache for a model that is not fetched": (
        llm_service(model={"hostPath": {"path": "/m"}, "cacheHostPath": "/c"}),
        "spec.model",
        "cacheHostPath",
    ),
    "a negative count": (llm_service(replicas=-1), "spec.replicas", ""),
    "a count in words": (llm_service(replicas="two"), "spec.replicas", "integer"),
    "a negative budget": (llm_service(kv={"blocks": -5}), "spec.kv.blocks", ""),
    "heads that cannot be split": (
        llm_service(model={**HUB, "heads": 9}, tensorParallel=2),
        "spec",
        "tensorParallel must divide model.heads",
    ),
    "too many ranks for CPUs": (llm_service(device="cpu", tensorParallel=9), "spec", "tensorParallel"),
    "watermarks out of order": (
        llm_service(balance={"lowWatermarkPercent": 85}),
        "spec.balance",
        "lowWatermarkPercent must be below",
    ),
    "fewer at most than at least": (
        llm_service(autoscaling={"minReplicas": 3, "maxReplicas": 2}),
        "spec.autoscaling",
        "minReplicas must not be above",
    ),
    "autoscaling without an end": (llm_service(autoscaling={}), "spec.autoscaling.maxReplicas", ""),
    "autoscaling to nothing": (
        llm_service(autoscaling={"minReplicas": 0, "maxReplicas": 2}),
        "spec.autoscaling.minReplicas",
        "",
    ),
    "more than all": (llm_service(kv={"memoryPercent": 101}), "spec.kv.memoryPercent", ""),
    "a dtype that there is not": (llm_service(engine={"dtype": "int3"}), "spec.engine.dtype", "bfloat16"),
    "a block of 12 tokens": (llm_service(kv={"blockTokens": 12}), "spec.kv.blockTokens", "16"),
    "two sizes of one pool": (llm_service(kv={"blocks": 5, "memory": "1Gi"}), "spec.kv", "memory"),
    "a size that is none": (llm_service(kv={"memory": "lots"}), "spec.kv.memory", ""),
    "a swap to nowhere": (llm_service(kv={"preemption": "Swap"}), "spec.kv", "hostBlocks"),
    "a rollout that cannot begin": (llm_service(rollout={"maxSurge": 0}), "spec.rollout", "maxUnavailable"),
    "keys that nobody checks": (
        llm_service(auth={"secretName": "keys"}, gateway={"replicas": 0}),
        "spec",
        "auth needs gateway.replicas",
    ),
    "a resource that is none": (llm_service(gpuResource="gpu"), "spec.gpuResource", ""),
}
# Only the API server sees the name as a whole.
NAMES: dict[str, tuple[Raw, str, str]] = {
    "a name that is too long for its children": (llm_service("n" * 51), "", "metadata.name"),
    "a name that no Service can have": (llm_service("1st"), "", "metadata.name"),
}
MOVES: dict[str, tuple[Raw, str, str]] = {
    "a move to where it is": (kv_move(to="llm-aaaaa"), "spec", "different agents"),
    "a move to nowhere": (kv_move(to=None), "spec", "set to"),
    "an offload to an agent": (kv_move(kind="offload"), "spec", "leave to out"),
    "a kind that there is not": (kv_move(kind="steal"), "spec.kind", "migrate"),
    "a move of no blocks": (kv_move(blocks=0), "spec.blocks", ""),
}
# What a change must not do: (before, change of the spec, a word of what is said).
CHANGES: dict[str, tuple[Raw, Raw, str]] = {
    "device": (llm_service(), {"device": "cpu"}, "device is immutable"),
    "from": (kv_move(), {"from": "llm-ccccc"}, "from is immutable"),
    "to": (kv_move(), {"to": "llm-ccccc"}, "to is immutable"),
    "to, first set later": (kv_move(kind="drain", to=None), {"to": "llm-ccccc"}, "immutable, except for"),
    "to, taken away": (kv_move(kind="drain"), {"to": None}, "immutable, except for"),
    "blocks, first set later": (kv_move(), {"blocks": 5}, "immutable, except for"),
    "kind": (kv_move(), {"kind": "lend"}, "kind is immutable"),
    "everything beside an approval": (kv_move(), {"approved": True, "service": "x"}, "service is immutable"),
    "an approval": (kv_move(approved=True), {"approved": False}, "cannot be withdrawn"),
}
