"""The objects that an LLMService owns, each made by a pure function of the service alone."""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .api import API_VERSION, GatewaySpec, LLMServiceSpec, PodTemplate, bytes_of
from .merge import TemplateError, merge
from .observed import AGENT, AGENT_PORT, REVISION, REVISION_ENV, SERVICE, UNDRAINED, Service

__all__ = [
    "Defaults",
    "TemplateError",
    "agent_labels",
    "agent_pod",
    "companions",
    "digest_of",
    "owner_reference",
    "retired",
    "revision",
    "secret",
    "secret_name",
    "selector",
    "url",
]

GATEWAY = "gateway"  # the container, and the component
GATEWAY_PORT = 8080
TOKEN_KEY = "token"
WANTED = "serving.blockyard.dev/wanted"  # annotation: digest of what a companion was made of
# Seconds that a pod gets to exit after its drain, before it is killed.
EXIT_SECONDS = 30
# Seconds in which a gateway still takes new requests after SIGTERM, until load balancers have removed it.
LINGER_SECONDS = 5
_POD_FORMAT = 2  # increase it when all pods must be replaced although no spec has changed
_USER = 1000  # the user of the images
# The token comes as files, which follow a changed Secret; an environment variable would not.
_TOKEN_MOUNT: dict[str, Any] = {"name": "token", "mountPath": "/token", "readOnly": True}


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the operator's installation decides for all services.

    ``bind_pod_ip``: agents and gateways listen on their pod's IP only, for nodes whose pods share a network.
    Otherwise they listen everywhere, loopback included, which ``kubectl port-forward`` needs.
    """

    image: str  # of agents and gateways
    namespace: str  # the operator's own; its pods may talk to agents
    bind_pod_ip: bool = False


def revision(spec: LLMServiceSpec, defaults: Defaults) -> str:
    """A digest (10 hex digits) of all fields that change agents' pods: not replicas, balance, drain, gateway.

    Taken from the spec, not from the pod that is made of it, so that an upgraded operator, which makes pods a
    little differently, does not replace all agents. Fields at their defaults are left out, so that a new
    field does not change the digests of existing services.
    """
    facts = spec.model_dump(
        mode="json",
        by_alias=True,
        exclude_defaults=True,
        include={"model", "tensor_parallel", "device", "gpu_resource", "engine", "kv", "template"},
    )
    facts["model"].pop("heads", None)
    facts |= {"image": spec.image or defaults.image, "format": _POD_FORMAT}
    return digest_of(facts)[:10]


def digest_of(facts: Any) -> str:
    """16 hex digits that tell whether something that JSON can say is the same."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def selector(service: Service, component: str = AGENT) -> dict[str, str]:
    """The labels by which a service's pods are found."""
    return {SERVICE: service.name, "app.kubernetes.io/component": component}


def url(service: Service) -> str:
    """Where clients in the cluster send requests."""
    port = _spec(service).gateway.port
    return f"http://{service.name}.{service.namespace}.svc{'' if port == 80 else f':{port}'}"


# ── Agents ────────────────────────────────────────────────────────────────────────────────────────────────


def agent_pod(service: Service, name: str, revision: str, defaults: Defaults) -> dict[str, Any]:
    """One agent's pod. TemplateError if spec.template does not fit."""
    spec = _spec(service)
    model, model_mounts, volumes = _model(spec)
    mounts = [
        {"name": "cache", "mountPath": "/cache"},
        {"name": "tmp", "mountPath": "/tmp"},
        _TOKEN_MOUNT,
        *model_mounts,
    ]
    volumes += [_cache(spec), {"name": "tmp", "emptyDir": {}}, _token_volume(service)]
    if spec.tensor_parallel > 1:
        # Ranks talk through shared memory; a container's own /dev/shm has 64 MiB.
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    gpus = {} if spec.device == "cpu" else {spec.gpu_resource: str(spec.tensor_parallel)}
    resources: dict[str, Any] = {"requests": {"cpu": "1", "memory": "2Gi"} | gpus}
    if gpus:
        resources["limits"] = gpus
    container = {
        "name": AGENT,
        "image": spec.image or defaults.image,
        "command": ["blockyard", "agent"],
        "ports": [{"name": "http", "containerPort": AGENT_PORT}],
        "env": [
            *_listen("BLOCKYARD", AGENT_PORT, defaults),
            *_settings(service, model),
            {"name": REVISION_ENV, "value": revision},
            *_folders(),
            *_hub(spec),
        ],
        "resources": resources,
        # /healthz is 200 while a model loads, however long; the startup probe waits for Python to start.
        "startupProbe": _probe("/healthz", period=2, failures=150),
        "livenessProbe": _probe("/healthz", period=10, failures=3),
        "readinessProbe": _probe("/readyz", period=2, failures=2),
        # The NVIDIA container runtime writes into the root file system.
        "securityContext": _container_security(read_only=spec.device == "cpu"),
        "volumeMounts": mounts,
    }
    pod_spec = {
        "restartPolicy": "Always",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # a Service named blockyard would set BLOCKYARD_PORT
        "terminationGracePeriodSeconds": spec.drain.timeout_seconds + EXIT_SECONDS,
        "securityContext": _pod_security(),
        "topologySpreadConstraints": _spread(selector(service)),
        "containers": [container],
        "volumes": volumes,
    }
    labels = agent_labels(service, revision)
    pod = _object(service, "v1", "Pod", name, AGENT, spec=pod_spec)
    return _templated(pod, spec.template, labels, AGENT, "spec.template")


def agent_labels(service: Service, revision: str) -> dict[str, str]:
    """The operator's own labels of an agent's pod that is not drained."""
    return _labels(service, AGENT) | {REVISION: revision, UNDRAINED: "true"}


def owner_reference(service: Service) -> dict[str, Any]:
    """By which an object belongs to the service, and goes with it."""
    return {
        "apiVersion": API_VERSION,
        "kind": "LLMService",
        "name": service.name,
        "uid": service.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def _settings(service: Service, model: str) -> list[dict[str, Any]]:
    """The agent's settings, as environment; fields that are unset are left out, for the agent's defaults."""
    spec = _spec(service)
    engine, kv = spec.engine, spec.kv
    settings = {
        "MODEL": model,
        "SERVED_MODEL_NAME": spec.model.served_name or service.name,
        "DEVICE": spec.device,
        "TENSOR_PARALLEL": spec.tensor_parallel,
        "DTYPE": engine.dtype,
        "MAX_MODEL_LEN": engine.max_model_len,
        "MAX_NUM_SEQS": engine.max_sequences,
        "MAX_BATCH_TOKENS": engine.max_batch_tokens,
        "MAX_QUEUE": engine.max_queue,
        "THREADS": engine.threads,
        "CUDA_GRAPHS": str(engine.cuda_graphs).lower(),
        "BLOCK_TOKENS": kv.block_tokens,
        "MEMORY_FRACTION": kv.memory_percent / 100,
        "KV_BYTES": None if kv.memory is None else bytes_of(kv.memory),
        "KV_BLOCKS": kv.blocks,
        "HOST_BLOCKS": kv.host_blocks,
        "PREFIX_CACHE": str(kv.prefix_cache).lower(),
        "PREEMPTION": kv.preemption.lower(),
        "WATERMARK": kv.watermark_percent / 100,
        "GRACE_PERIOD": spec.drain.timeout_seconds,
        "TOKEN_DIR": _TOKEN_MOUNT["mountPath"],
    }
    return [
        {"name": f"BLOCKYARD_{name}", "value": f"{value}"}
        for name, value in settings.items()
        if value is not None
    ]


def _model(spec: LLMServiceSpec) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """Where the agent finds the model, and the mounts and volumes that put it there."""
    source = spec.model
    folder = "/model"
    if source.hub is not None:
        return source.hub.name, [], []
    if source.persistent_volume_claim is not None:
        volume: dict[str, Any] = {
            "persistentVolumeClaim": {
                "claimName": source.persistent_volume_claim.claim_name,
                "readOnly": True,
            }
        }
        path = source.persistent_volume_claim.path
    elif source.image is not None:
        volume = {"image": {"reference": source.image.reference, "pullPolicy": source.image.pull_policy}}
        path = source.image.path
    else:
        assert source.host_path is not None, "one source is set"
        path = ""
        is_file = source.host_path.path.endswith(".gguf")
        folder = f"/model/{source.host_path.path.rsplit('/', 1)[1]}" if is_file else folder
        volume = {"hostPath": {"path": source.host_path.path, "type": "File" if is_file else "Directory"}}
    mount = {"name": "model", "mountPath": folder, "readOnly": True}
    return f"{folder}/{path}".rstrip("/"), [mount], [{"name": "model", **volume}]


def _cache(spec: LLMServiceSpec) -> dict[str, Any]:
    """The folder for what agents fetch and compile; on the node if a path is given, so that it is found
    again.
    """
    path = spec.model.cache_host_path
    if path is None:
        return {"name": "cache", "emptyDir": {}}
    return {"name": "cache", "hostPath": {"path": path, "type": "DirectoryOrCreate"}}


def _folders() -> list[dict[str, Any]]:
    return [
        {"name": "BLOCKYARD_CACHE", "value": "/cache"},
        {"name": "HF_HOME", "value": "/cache/huggingface"},
        {"name": "HOME", "value": "/cache"},  # Triton and others write there, and the root may be read-only
    ]


def _hub(spec: LLMServiceSpec) -> list[dict[str, Any]]:
    hub = spec.model.hub
    return (
        []
        if hub is None or hub.secret_name is None
        else [_from_secret("HF_TOKEN", hub.secret_name, TOKEN_KEY)]
    )


# ── Companions ────────────────────────────────────────────────────────────────────────────────────────────


def companions(service: Service, defaults: Defaults) -> list[dict[str, Any]]:
    """Everything but the agents' pods and the Secret, in the order in which it is to be applied."""
    spec = _spec(service)
    wanted = [_agents_service(service), _budget(service), _network_policy(service, defaults)]
    if spec.gateway.replicas:
        wanted += [*_gateway_account(service), _gateway(service, defaults)]
    wanted.append(_client_service(service))
    if spec.monitoring.service_monitor:
        wanted.append(_service_monitor(service))
    return [_stamped(each) for each in wanted]


def retired(service: Service, defaults: Defaults) -> list[tuple[str, str, str]]:
    """(apiVersion, kind, name) of the companions that this spec does not want: delete them if they exist."""
    spec = _spec(service)
    gateway = spec.gateway if spec.gateway.replicas else GatewaySpec()
    monitoring = spec.monitoring.model_copy(update={"service_monitor": True})
    everything = replace(service, spec=spec.model_copy(update={"gateway": gateway, "monitoring": monitoring}))
    wanted = {_identity(each) for each in companions(service, defaults)}
    return [each for each in map(_identity, companions(everything, defaults)) if each not in wanted]


def secret(service: Service, token: str) -> dict[str, Any]:
    """Secret NAME-internal, as it is first made; ``internal_secret`` keeps it."""
    data = {TOKEN_KEY: b64encode(token.encode()).decode()}
    return _object(service, "v1", "Secret", secret_name(service), AGENT, type="Opaque", data=data)


def secret_name(service: Service) -> str:
    return f"{service.name}-internal"


def _agents_service(service: Service) -> dict[str, Any]:
    """A headless Service, by whose EndpointSlices gateways find agents."""
    spec = {
        "clusterIP": "None",
        "selector": selector(service),
        "publishNotReadyAddresses": False,
        "ports": [{"name": "http", "port": AGENT_PORT, "targetPort": "http"}],
    }
    return _object(service, "v1", "Service", f"{service.name}-agents", AGENT, spec=spec)


def _client_service(service: Service) -> dict[str, Any]:
    gateway = _spec(service).gateway
    spec = {
        "type": gateway.service_type,
        "selector": selector(service, GATEWAY if gateway.replicas else AGENT),
        "ports": [{"name": "http", "port": gateway.port, "targetPort": "http"}],
    }
    return _object(service, "v1", "Service", service.name, GATEWAY, spec=spec)


def _budget(service: Service) -> dict[str, Any]:
    """Refuses every eviction of an agent that is not drained.

    By a number that is never reached. ``maxUnavailable: 0`` would leave gaps. It counts against the replicas
    of the scale subresource, which the disruption controller does not find while the CRD is new. During a
    surge one agent more is ready than it demands, so one could be evicted. And a draining agent is not ready,
    and pods that are not ready may be evicted while enough others are.
    """
    spec = {
        "minAvailable": 1_000_000,
        "selector": {"matchLabels": selector(service) | {UNDRAINED: "true"}},
        "unhealthyPodEvictionPolicy": "IfHealthyBudget",  # the default, which nobody else can change then
    }
    return _object(service, "policy/v1", "PodDisruptionBudget", f"{service.name}-agents", AGENT, spec=spec)


def _network_policy(service: Service, defaults: Defaults) -> dict[str, Any]:
    """Who reaches agents: other agents, their gateways, the operator, and Prometheus if it is to scrape them.

    The kubelet's probes need no rule. A policy knows ports and not paths; the token keeps Prometheus from
    everything but metrics.
    """
    spec = _spec(service)
    sources: list[dict[str, Any]] = [
        {"podSelector": {"matchLabels": selector(service)}},
        {"podSelector": {"matchLabels": selector(service, GATEWAY)}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": defaults.namespace}}},
    ]
    if spec.monitoring.service_monitor:
        prometheus = {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}
        sources.append({"namespaceSelector": {}, "podSelector": prometheus})
    rule: dict[str, Any] = {"ports": [{"port": "http", "protocol": "TCP"}]}
    if spec.gateway.replicas:
        rule["from"] = sources  # without a gateway, clients come to the agents from anywhere
    policy = {
        "podSelector": {"matchLabels": selector(service)},
        "policyTypes": ["Ingress"],
        "ingress": [rule],
    }
    name = f"{service.name}-agents"
    return _object(service, "networking.k8s.io/v1", "NetworkPolicy", name, AGENT, spec=policy)


def _gateway_account(service: Service) -> list[dict[str, Any]]:
    """The gateway's ServiceAccount, which may watch the EndpointSlices of its namespace and nothing else."""
    name, rbac = f"{service.name}-gateway", "rbac.authorization.k8s.io"
    rule = {
        "apiGroups": ["discovery.k8s.io"],
        "resources": ["endpointslices"],
        "verbs": ["get", "list", "watch"],
    }
    return [
        _object(service, "v1", "ServiceAccount", name, GATEWAY, automountServiceAccountToken=False),
        _object(service, f"{rbac}/v1", "Role", name, GATEWAY, rules=[rule]),
        _object(
            service,
            f"{rbac}/v1",
            "RoleBinding",
            name,
            GATEWAY,
            roleRef={"apiGroup": rbac, "kind": "Role", "name": name},
            subjects=[{"kind": "ServiceAccount", "name": name, "namespace": service.namespace}],
        ),
    ]


def _gateway(service: Service, defaults: Defaults) -> dict[str, Any]:
    spec = _spec(service)
    settings = {
        "SERVICE": service.name,
        "LINGER": LINGER_SECONDS,
        "GRACE_PERIOD": spec.drain.timeout_seconds,
        "PATIENCE": spec.gateway.hold_seconds,
        "REQUESTS_PER_MINUTE": spec.gateway.limits.requests_per_minute,
        "CONCURRENT_REQUESTS": spec.gateway.limits.concurrent_requests,
        "KEYS_DIR": None if spec.auth is None else "/keys",
        "TOKEN_DIR": _TOKEN_MOUNT["mountPath"],
    }
    env = [
        *_listen("BLOCKYARD_GATEWAY", GATEWAY_PORT, defaults),
        _from_field("BLOCKYARD_GATEWAY_NAMESPACE", "metadata.namespace"),
        *(
            {"name": f"BLOCKYARD_GATEWAY_{name}", "value": f"{value}"}
            for name, value in settings.items()
            if value is not None
        ),
    ]
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {}}, _token_volume(service)]
    mounts: list[dict[str, Any]] = [{"name": "tmp", "mountPath": "/tmp"}, _TOKEN_MOUNT]
    if spec.auth is not None:
        volumes.append({"name": "keys", "secret": {"secretName": spec.auth.secret_name}})
        mounts.append({"name": "keys", "mountPath": "/keys", "readOnly": True})
    container = {
        "name": GATEWAY,
        "image": spec.image or defaults.image,
        "command": ["blockyard", "gateway"],
        "ports": [{"name": "http", "containerPort": GATEWAY_PORT}],
        "env": env,
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}},
        "startupProbe": _probe("/healthz", period=1, failures=60),
        "livenessProbe": _probe("/healthz", period=10, failures=3),
        "readinessProbe": _probe("/readyz", period=2, failures=2),
        "securityContext": _container_security(read_only=True),
        "volumeMounts": mounts,
    }
    pod = {
        "metadata": {},
        "spec": {
            "serviceAccountName": f"{service.name}-gateway",
            "automountServiceAccountToken": True,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": LINGER_SECONDS + spec.drain.timeout_seconds + EXIT_SECONDS,
            "securityContext": _pod_security(),
            "topologySpreadConstraints": _spread(selector(service, GATEWAY)),
            "containers": [container],
            "volumes": volumes,
        },
    }
    labels = _labels(service, GATEWAY)
    deployment = {
        "replicas": spec.gateway.replicas,
        "selector": {"matchLabels": selector(service, GATEWAY)},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        "template": _templated(pod, spec.gateway.template, labels, GATEWAY, "spec.gateway.template"),
    }
    name = f"{service.name}-gateway"
    return _object(service, "apps/v1", "Deployment", name, GATEWAY, spec=deployment)


def _service_monitor(service: Service) -> dict[str, Any]:
    labels: dict[str, Any] = {"matchLabels": {SERVICE: service.name}}
    if not _spec(service).gateway.replicas:  # without a gateway both Services lead to the agents
        labels = {"matchLabels": selector(service)}
    spec = {"selector": labels, "endpoints": [{"port": "http", "path": "/metrics"}]}
    return _object(service, "monitoring.coreos.com/v1", "ServiceMonitor", service.name, AGENT, spec=spec)


# ── Parts ─────────────────────────────────────────────────────────────────────────────────────────────────


def _spec(service: Service) -> LLMServiceSpec:
    assert service.spec is not None, f"{service.name} has no spec that can be read: {service.problem}"
    return service.spec


def _stamped(manifest: dict[str, Any]) -> dict[str, Any]:
    """With a digest of the whole, by which an object that was made of another spec is told from this one.

    A comparison field by field would not notice a field that is not wanted any more.
    """
    return manifest | {"metadata": manifest["metadata"] | {"annotations": {WANTED: digest_of(manifest)}}}


def _identity(manifest: Mapping[str, Any]) -> tuple[str, str, str]:
    return manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"]


def _labels(service: Service, component: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "blockyard",
        "app.kubernetes.io/instance": service.name,
        "app.kubernetes.io/managed-by": "blockyard-operator",
        "app.kubernetes.io/part-of": "blockyard",
        **selector(service, component),
    }


def _object(
    service: Service, api_version: str, kind: str, name: str, component: str, **content: Any
) -> dict[str, Any]:
    """An object that belongs to the service and goes with it."""
    metadata = {
        "name": name,
        "namespace": service.namespace,
        "labels": _labels(service, component),
        "ownerReferences": [owner_reference(service)],
    }
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **content}


def _templated(
    pod: dict[str, Any], template: PodTemplate | None, labels: Mapping[str, str], container: str, field: str
) -> dict[str, Any]:
    """The pod with the user's template merged into it. The operator's own labels cannot be changed by it."""
    template = template or PodTemplate()
    metadata = pod["metadata"] | {"labels": {**template.metadata.labels, **labels}}
    if template.metadata.annotations:
        metadata["annotations"] = dict(template.metadata.annotations)
    try:
        spec = merge(pod["spec"], template.spec)
    except TemplateError as error:
        raise TemplateError(f"{field}.{error}") from None
    if container not in (each["name"] for each in spec.get("containers") or ()):
        raise TemplateError(f"{field}.spec.containers: the container {container} must not be taken away")
    return pod | {"metadata": metadata, "spec": spec}


def _token_volume(service: Service) -> dict[str, Any]:
    return {"name": _TOKEN_MOUNT["name"], "secret": {"secretName": secret_name(service)}}


def _listen(prefix: str, port: int, defaults: Defaults) -> list[dict[str, Any]]:
    everywhere = {"name": f"{prefix}_HOST", "value": "0.0.0.0"}
    host = _from_field(f"{prefix}_HOST", "status.podIP") if defaults.bind_pod_ip else everywhere
    return [host, {"name": f"{prefix}_PORT", "value": str(port)}]


def _from_field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _from_secret(name: str, secret: str, key: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def _probe(path: str, *, period: int, failures: int) -> dict[str, Any]:
    http = {"path": path, "port": "http"}
    return {"httpGet": http, "periodSeconds": period, "timeoutSeconds": 5, "failureThreshold": failures}


def _pod_security() -> dict[str, Any]:
    return {
        "runAsNonRoot": True,
        "runAsUser": _USER,
        "runAsGroup": _USER,
        "fsGroup": _USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container_security(*, read_only: bool) -> dict[str, Any]:
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": read_only,
    }


def _spread(labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Spread over nodes, as far as there is room."""
    return [
        {
            "topologyKey": "kubernetes.io/hostname",
            "maxSkew": 1,
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": dict(labels)},
        }
    ]
