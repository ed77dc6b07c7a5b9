"""What an LLMService owns: made from the spec alone, accepted by the agent's and the gateway's settings."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import yaml

from blockyard.agent.gateway.settings import GatewaySettings
from blockyard.agent.settings import AgentSettings
from blockyard.operator import children
from blockyard.operator.children import Defaults, TemplateError
from blockyard.operator.observed import REVISION, REVISION_ENV, SERVICE, UNDRAINED, Pod, Service

EXAMPLES = Path(__file__).parents[2] / "examples"
DEFAULTS = Defaults(image="registry/agent:1", namespace="blockyard-system")
HUB = {"hub": {"name": "owner/model"}}


def service(**spec: Any) -> Service:
    raw = {
        "metadata": {"name": "llm", "namespace": "team", "uid": "uid-1", "generation": 1},
        "spec": {"model": HUB, **spec},
    }
    found = Service.of(raw)
    assert found.problem == ""
    return found


def pod(defaults: Defaults = DEFAULTS, **spec: Any) -> dict[str, Any]:
    return children.agent_pod(service(**spec), "llm-abcde", "0123456789", defaults)


def agent(**spec: Any) -> dict[str, Any]:
    found: dict[str, Any] = pod(**spec)["spec"]["containers"][0]
    return found


def values(container: dict[str, Any]) -> dict[str, str]:
    """The container's environment, as far as it is written out."""
    return {each["name"]: each["value"] for each in container["env"] if "value" in each}


def companion(kind: str, name: str, **spec: Any) -> dict[str, Any]:
    (found,) = [
        each
        for each in children.companions(service(**spec), DEFAULTS)
        if (each["kind"], each["metadata"]["name"]) == (kind, name)
    ]
    return found


# ── Settings ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_agent_takes_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every field of the spec arrives at the agent under a name and in a form that it knows."""
    container = agent(
        device="cpu",
        tensorParallel=2,
        engine={
            "dtype": "bfloat16",
            "maxModelLen": 4096,
            "maxSequences": 32,
            "maxBatchTokens": 512,
            "maxQueue": 7,
            "threads": 3,
            "cudaGraphs": False,
        },
        kv={
            "blockTokens": 32,
            "memoryPercent": 50,
            "memory": "1.5Gi",
            "hostBlocks": 9,
            "prefixCache": False,
            "preemption": "Swap",
            "watermarkPercent": 5,
        },
        drain={"timeoutSeconds": 77},
    )
    for name, value in values(container).items():
        monkeypatch.setenv(name, value)
    known = {f"BLOCKYARD_{name.upper()}" for name in AgentSettings.model_fields}
    known |= {"BLOCKYARD_CACHE", REVISION_ENV}
    assert {each["name"] for each in container["env"] if each["name"].startswith("BLOCKYARD_")} <= known
    settings = AgentSettings.load({})
    wanted = {
        "model": "owner/model",
        "served_model_name": "llm",
        "host": "0.0.0.0",
        "port": 8000,
        "device": "cpu",
        "tensor_parallel": 2,
        "dtype": "bfloat16",
        "max_model_len": 4096,
        "max_num_seqs": 32,
        "max_batch_tokens": 512,
        "max_queue": 7,
        "threads": 3,
        "cuda_graphs": False,
        "block_tokens": 32,
        "memory_fraction": 0.5,
        "kv_bytes": 3 << 29,
        "host_blocks": 9,
        "prefix_cache": False,
        "preemption": "swap",
        "watermark": 0.05,
        "grace_period": 77,
    }
    assert {name: getattr(settings, name) for name in wanted} == wanted


def test_what_the_spec_leaves_open_is_left_to_the_agent() -> None:
    assert (
        not {"BLOCKYARD_KV_BLOCKS", "BLOCKYARD_MAX_MODEL_LEN", "BLOCKYARD_THREADS"} & values(agent()).keys()
    )


def test_the_gateway_takes_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = companion(
        "Deployment",
        "llm-gateway",
        gateway={"limits": {"requestsPerMinute": 60, "concurrentRequests": 4}},
        auth={"secretName": "tenants"},
        drain={"timeoutSeconds": 77},
    )
    container = gateway["spec"]["template"]["spec"]["containers"][0]
    for name, value in values(container).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BLOCKYARD_GATEWAY_NAMESPACE", "team")
    known = {f"BLOCKYARD_GATEWAY_{name.upper()}" for name in GatewaySettings.model_fields}
    assert {each["name"] for each in container["env"]} <= known
    settings = GatewaySettings.load({})
    assert (settings.host, settings.port, settings.service) == ("0.0.0.0", 8080, "llm")
    assert (settings.requests_per_minute, settings.concurrent_requests) == (60, 4)
    assert (settings.keys_dir, settings.grace_period) == (Path("/keys"), 77)


def test_agents_and_gateway_share_the_token_of_the_secret() -> None:
    secret = children.secret(service(), "t0k3n")
    assert base64.b64decode(secret["data"]["token"]) == b"t0k3n"
    gateway = companion("Deployment", "llm-gateway")["spec"]["template"]["spec"]
    for spec, prefix in ((pod()["spec"], "BLOCKYARD"), (gateway, "BLOCKYARD_GATEWAY")):
        (container,) = spec["containers"]
        folder = values(container)[f"{prefix}_TOKEN_DIR"]
        (mount,) = (each for each in container["volumeMounts"] if each["mountPath"] == folder)
        (volume,) = (each for each in spec["volumes"] if each["name"] == mount["name"])
        assert volume["secret"] == {"secretName": secret["metadata"]["name"]}


def test_where_pods_share_a_network_they_listen_on_their_own_address() -> None:
    container = pod(Defaults("i", "n", bind_pod_ip=True))["spec"]["containers"][0]
    by_ip = {"name": "BLOCKYARD_HOST", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    assert by_ip in container["env"]


# ── Agents ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("model", "path", "mount", "source"),
    [
        (HUB, "owner/model", None, None),
        (
            {"persistentVolumeClaim": {"claimName": "c", "path": "a/b.gguf"}},
            "/model/a/b.gguf",
            "/model",
            {"persistentVolumeClaim": {"claimName": "c", "readOnly": True}},
        ),
        (
            {"hostPath": {"path": "/srv/m"}},
            "/model",
            "/model",
            {"hostPath": {"path": "/srv/m", "type": "Directory"}},
        ),
        (
            {"hostPath": {"path": "/srv/m.gguf"}},
            "/model/m.gguf",
            "/model/m.gguf",
            {"hostPath": {"path": "/srv/m.gguf", "type": "File"}},
        ),
        (
            {"image": {"reference": "r/m:1"}},
            "/model",
            "/model",
            {"image": {"reference": "r/m:1", "pullPolicy": "IfNotPresent"}},
        ),
    ],
)
def test_a_model_comes_from(
    model: dict[str, Any], path: str, mount: str | None, source: dict[str, Any] | None
) -> None:
    spec = pod(model=model)["spec"]
    container = spec["containers"][0]
    assert values(container)["BLOCKYARD_MODEL"] == path
    mounts = [each for each in container["volumeMounts"] if each["name"] == "model"]
    volumes = [each for each in spec["volumes"] if each["name"] == "model"]
    assert mounts == ([{"name": "model", "mountPath": mount, "readOnly": True}] if mount else [])
    assert volumes == ([{"name": "model", **source}] if source else [])


def test_a_hub_gets_its_token_and_keeps_its_models_on_the_node() -> None:
    model = {"hub": {"name": "o/m", "secretName": "hub"}, "cacheHostPath": "/var/lib/models"}
    spec = pod(model=model)["spec"]
    token = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
    assert token in spec["containers"][0]["env"]
    path = {"path": "/var/lib/models", "type": "DirectoryOrCreate"}
    assert {"name": "cache", "hostPath": path} in spec["volumes"]


def test_gpus_are_as_many_as_tensor_parallel_asks_for() -> None:
    resources = agent(tensorParallel=4, gpuResource="nvidia.com/mig-1g.10gb")["resources"]
    assert resources["limits"] == {"nvidia.com/mig-1g.10gb": "4"}
    assert resources["requests"]["nvidia.com/mig-1g.10gb"] == "4"
    assert "limits" not in agent(device="cpu")["resources"]
    assert set(agent(device="cpu")["resources"]["requests"]) == {"cpu", "memory"}


def test_ranks_have_shared_memory() -> None:
    assert "/dev/shm" not in [each["mountPath"] for each in agent()["volumeMounts"]]
    assert {"name": "shm", "mountPath": "/dev/shm"} in agent(tensorParallel=2)["volumeMounts"]
    assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in pod(tensorParallel=2)["spec"]["volumes"]


def test_a_pod_is_not_killed_before_its_drain_ends() -> None:
    found = pod(drain={"timeoutSeconds": 900})["spec"]
    assert found["terminationGracePeriodSeconds"] > 900
    assert values(found["containers"][0])["BLOCKYARD_GRACE_PERIOD"] == "900"


def restricted(spec: dict[str, Any]) -> None:
    """The Pod Security Standard "restricted"."""
    security = spec["securityContext"]
    assert security["runAsNonRoot"] is True and security["runAsUser"] > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    allowed = {"configMap", "csi", "downwardAPI", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
    for volume in spec["volumes"]:
        assert set(volume) - {"name"} <= allowed | {"image"}
    for container in spec["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_pods_are_restricted() -> None:
    restricted(pod(tensorParallel=2)["spec"])
    gateway = companion("Deployment", "llm-gateway", auth={"secretName": "k"})["spec"]["template"]["spec"]
    restricted(gateway)
    assert gateway["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
    assert agent(device="cpu")["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod()["spec"]["automountServiceAccountToken"] is False


def test_agents_ask_for_no_names_that_a_service_could_set() -> None:
    """A Service named blockyard would set BLOCKYARD_PORT in every pod of its namespace."""
    assert pod()["spec"]["enableServiceLinks"] is False


def test_what_the_operator_reads_of_a_pod_is_what_it_wrote() -> None:
    made = pod()
    made["metadata"]["uid"] = "u"
    seen = Pod.of(made)
    assert (seen.name, seen.revision, seen.undrained) == ("llm-abcde", "0123456789", True)
    assert not seen.running and not seen.ready


# ── Templates ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_template_changes_what_it_names() -> None:
    template = {
        "metadata": {"annotations": {"a": "1"}, "labels": {"team": "x", SERVICE: "stolen", UNDRAINED: "no"}},
        "spec": {
            "nodeSelector": {"gpu": "h100"},
            "imagePullSecrets": [{"name": "pull"}],
            "containers": [{"name": "agent", "resources": {"requests": {"memory": "64Gi"}}}],
        },
    }
    found = pod(template=template)
    assert found["metadata"]["annotations"] == {"a": "1"}
    labels = found["metadata"]["labels"]
    assert (labels["team"], labels[SERVICE], labels[UNDRAINED]) == ("x", "llm", "true")
    assert found["spec"]["nodeSelector"] == {"gpu": "h100"}
    requests = found["spec"]["containers"][0]["resources"]["requests"]
    assert (requests["memory"], requests["cpu"], requests["nvidia.com/gpu"]) == ("64Gi", "1", "1")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ({"containers": "agent"}, "spec.template.spec.containers must be a list"),
        (
            {"containers": [{"name": "agent", "$patch": "delete"}]},
            "the container agent must not be taken away",
        ),
        ({"volumes": [{"emptyDir": {}}]}, r"spec.template.spec.volumes\[0\] must be a map with name"),
    ],
)
def test_a_template_that_does_not_fit_is_named(template: dict[str, Any], words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        pod(template={"spec": template})


def test_the_gateways_template_is_named_too() -> None:
    bad = service(gateway={"template": {"spec": {"containers": [{"image": "x"}]}}})
    with pytest.raises(TemplateError, match=r"spec\.gateway\.template\.spec\.containers"):
        children.companions(bad, DEFAULTS)


# ── Revision ──────────────────────────────────────────────────────────────────────────────────────────────


def revision(defaults: Defaults = DEFAULTS, **spec: Any) -> str:
    found = service(**spec).spec
    assert found is not None
    return children.revision(found, defaults)


@pytest.mark.parametrize(
    "spec",
    [
        {"replicas": 5},
        {"balance": {"mode": "Auto"}},
        {"gateway": {"replicas": 3, "port": 8080}},
        {"drain": {"timeoutSeconds": 9}},
        {"rollout": {"maxSurge": 3}},
        {"auth": {"secretName": "s"}},
        {"monitoring": {"serviceMonitor": True}},
        {"model": {**HUB, "heads": 8}},
        {"kv": {"blockTokens": 16}},
        {"image": DEFAULTS.image},
    ],
)
def test_what_leaves_agents_alike_does_not_replace_them(spec: dict[str, Any]) -> None:
    assert revision(**spec) == revision()


def test_what_makes_agents_differ_replaces_them() -> None:
    found = [
        revision(),
        revision(Defaults("registry/agent:2", "blockyard-system")),
        revision(model={"hub": {"name": "owner/other"}}),
        revision(model={**HUB, "servedName": "s"}),
        revision(tensorParallel=2),
        revision(device="cpu"),
        revision(gpuResource="amd.com/gpu"),
        revision(image="mine"),
        revision(engine={"maxModelLen": 5}),
        revision(kv={"blockTokens": 32}),
        revision(template={"spec": {"nodeSelector": {"a": "b"}}}),
        revision(template={"metadata": {"labels": {"a": "b"}}}),
    ]
    assert len(set(found)) == len(found)
    assert all(len(each) == 10 and int(each, 16) >= 0 for each in found)


# ── Companions ────────────────────────────────────────────────────────────────────────────────────────────


def test_everything_is_owned_and_labelled() -> None:
    full = service(monitoring={"serviceMonitor": True})
    made = [*children.companions(full, DEFAULTS), children.secret(full, "t"), pod()]
    assert sorted(f"{each['kind']} {each['metadata']['name']}" for each in made) == [
        "Deployment llm-gateway",
        "NetworkPolicy llm-agents",
        "Pod llm-abcde",
        "PodDisruptionBudget llm-agents",
        "Role llm-gateway",
        "RoleBinding llm-gateway",
        "Secret llm-internal",
        "Service llm",
        "Service llm-agents",
        "ServiceAccount llm-gateway",
        "ServiceMonitor llm",
    ]
    for each in made:
        (owner,) = each["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"], owner["controller"]) == ("LLMService", "uid-1", True)
        labels = each["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == labels[SERVICE] == "llm"
        assert labels["app.kubernetes.io/managed-by"] == "blockyard-operator"
        assert each["metadata"]["namespace"] == "team"


@pytest.mark.parametrize("gateway", [0, 2])
@pytest.mark.parametrize("monitor", [False, True])
def test_companions_are_wanted_or_retired(gateway: int, monitor: bool) -> None:
    some = service(gateway={"replicas": gateway}, monitoring={"serviceMonitor": monitor})
    full = service(monitoring={"serviceMonitor": True})

    def names(manifests: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
        return {(each["apiVersion"], each["kind"], each["metadata"]["name"]) for each in manifests}

    wanted, retired = names(children.companions(some, DEFAULTS)), set(children.retired(some, DEFAULTS))
    assert wanted | retired == names(children.companions(full, DEFAULTS))
    assert not wanted & retired
    assert ("apps/v1", "Deployment", "llm-gateway") in (wanted if gateway else retired)


def test_clients_come_to_the_gateway_or_to_the_agents_if_there_is_none() -> None:
    port = {"name": "http", "port": 8081, "targetPort": "http"}
    through = companion("Service", "llm", gateway={"port": 8081, "serviceType": "LoadBalancer"})["spec"]
    assert (through["type"], through["ports"]) == ("LoadBalancer", [port])
    gateway = companion("Deployment", "llm-gateway")["spec"]["template"]["metadata"]["labels"]
    assert through["selector"].items() <= gateway.items()
    direct = companion("Service", "llm", gateway={"replicas": 0})["spec"]
    assert direct["selector"].items() <= pod()["metadata"]["labels"].items()
    assert not through["selector"].items() <= pod()["metadata"]["labels"].items()


def test_no_eviction_of_an_undrained_agent_ever_fits_the_budget() -> None:
    budget = companion("PodDisruptionBudget", "llm-agents", replicas=1000)["spec"]
    labels = pod()["metadata"]["labels"]
    assert budget["selector"]["matchLabels"].items() <= labels.items()
    released = {name: value for name, value in labels.items() if name != UNDRAINED}
    assert not budget["selector"]["matchLabels"].items() <= released.items()
    assert "maxUnavailable" not in budget, "it counts surging and draining agents wrongly"
    assert budget["minAvailable"] > 1000 + 100 + 1000


def test_selectors_never_change_with_the_spec() -> None:
    """They are immutable, or must go on finding pods of all revisions."""
    assert REVISION not in companion("Service", "llm-agents")["spec"]["selector"]
    before = companion("Deployment", "llm-gateway")["spec"]["selector"]
    assert companion("Deployment", "llm-gateway", image="other", replicas=3)["spec"]["selector"] == before


def test_agents_are_reached_by_whom_they_serve_alone() -> None:
    def sources(**spec: Any) -> list[Any] | None:
        (rule,) = companion("NetworkPolicy", "llm-agents", **spec)["spec"]["ingress"]
        found: list[Any] | None = rule.get("from")
        return found

    closed = sources()
    assert closed is not None and len(closed) == 3
    namespace = {"matchLabels": {"kubernetes.io/metadata.name": "blockyard-system"}}
    assert {"namespaceSelector": namespace} in closed
    watched = sources(monitoring={"serviceMonitor": True})
    assert watched is not None and len(watched) == 4
    assert sources(gateway={"replicas": 0}) is None, "without a gateway clients come from anywhere"


def test_a_gateway_may_read_endpoint_slices_and_nothing_else() -> None:
    (rule,) = companion("Role", "llm-gateway")["rules"]
    assert rule == {
        "apiGroups": ["discovery.k8s.io"],
        "resources": ["endpointslices"],
        "verbs": ["get", "list", "watch"],
    }


def test_without_a_gateway_nothing_is_watched_twice() -> None:
    monitor = companion("ServiceMonitor", "llm", gateway={"replicas": 0}, monitoring={"serviceMonitor": True})
    labels = monitor["spec"]["selector"]["matchLabels"]
    assert labels.items() <= companion("Service", "llm-agents")["metadata"]["labels"].items()
    assert not labels.items() <= companion("Service", "llm")["metadata"]["labels"].items()


@pytest.mark.parametrize("port", [80, 8080])
def test_the_url_leads_to_the_service(port: int) -> None:
    suffix = "" if port == 80 else ":8080"
    assert children.url(service(gateway={"port": port})) == f"http://llm.team.svc{suffix}"


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.name)
def test_examples_have_children(file: Path) -> None:
    raw = yaml.safe_load(file.read_text())
    if raw["kind"] != "LLMService":
        return
    raw["metadata"] |= {"namespace": "default", "uid": "u"}
    found = Service.of(raw)
    assert found.problem == ""
    assert children.companions(found, DEFAULTS)
    assert children.agent_pod(found, "x", "y", DEFAULTS)
