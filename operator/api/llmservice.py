"""LLMService, its spec: what users want."""

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
    """A model on a hub, or one that is packaged."""

    name: Annotated[
        str,
        StringConstraints(
            min_length=1,
            max_length=253,
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$",
        ),
    ] = Field(
        description="Name on the Hugging Face hub, owner/name, or that of a packaged model such as "
        "SmolLM2-135M-Instruct."
    )
    secret_name: Name | None = Field(
        default=None,
        description="Secret whose key token holds an access token of the hub, for models that ask for one.",
    )


class ClaimModel(_InFolder):
    """A model on a PersistentVolumeClaim, which is mounted read-only."""

    claim_name: Name = Field(description="The PersistentVolumeClaim, in the same namespace.")
    path: str = Field(
        default="",
        max_length=512,
        description="Folder or .gguf file inside the claim; all of the claim if empty.",
    )


class HostPathModel(Resource):
    """A model that is on the node already; mounted read-only."""

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
        description="Folder or .gguf file inside the image; all of the image if empty.",
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
        description="A model that each agent fetches from a hub; kept on the node if cacheHostPath is set.",
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
        description="Folder on the node in which fetched models are kept and reused, writable by user 1000.",
    )
    heads: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Attention heads of the model, if known: lets tensorParallel be checked at once.",
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
        description="Tokens of one step, prefill and decode together; 256 on CPUs and 2048 on GPUs if unset.",
    )
    max_queue: int = Field(
        default=256,
        ge=0,
        le=100_000,
        description="Requests that may wait in one agent; more are answered with status 429.",
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
        description="Percentage of the device's memory to use when the pool's size is measured.",
    )
    memory: Quantity | None = Field(
        default=None,
        description="Size of the pool, such as 20Gi; measured if neither this nor blocks is set.",
    )
    blocks: int | None = Field(
        default=None,
        ge=1,
        le=INT32,
        description="Blocks of the pool; measured if neither this nor memory is set.",
    )
    host_blocks: int = Field(
        default=0, ge=0, le=INT32, description="Blocks in host memory, for preemption by swap."
    )
    prefix_cache: bool = Field(
        default=True,
        description="Whether blocks are kept for later prompts that begin in the same way.",
    )
    preemption: Literal["Recompute", "Swap"] = Field(
        default="Recompute",
        description="How a request that had to leave a full pool gets its KV back: by computing it again, "
        "or from host memory.",
    )
    watermark_percent: int = Field(
        default=1,
        ge=0,
        le=99,
        description="Percentage of the pool that stays free when requests are admitted.",
    )


class BalanceSpec(Resource):
    """When agents are out of balance, and what is done then; this version moves nothing yet."""

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
        description="Auto carries moves out, Advise proposes them and waits for approval, Off proposes none.",
    )
    low_watermark_percent: Percent = Field(
        default=50, description="An agent that uses a smaller percentage of its blocks has some to spare."
    )
    high_watermark_percent: Percent = Field(
        default=85, description="An agent that uses a larger percentage of its blocks is short of them."
    )
    max_concurrent_moves: int = Field(
        default=2, ge=0, le=64, description="Moves of this service that may run at once."
    )


class DrainSpec(Resource):
    """How agents leave: at scale-in, in a rollout, off a cordoned node, and when the service is deleted."""

    timeout_seconds: int = Field(
        default=300,
        ge=0,
        le=86400,
        description="How long running requests may take to end; those left are replayed by another agent.",
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
        default=1, ge=0, le=100, description="How many agents there may be beyond replicas during a rollout."
    )
    max_unavailable: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="How many agents fewer than replicas may serve during a rollout; 1 where there is no "
        "spare GPU.",
    )


class AutoscalingSpec(Resource):
    """How many agents there are, by the blocks and the sequence slots that requests need.

    Agents are added at once. They are taken away one delay after fewer are enough.
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
        description="How long fewer agents must be enough, without interruption, before agents go.",
    )


class LimitsSpec(Resource):
    """What one tenant may ask of one gateway pod."""

    requests_per_minute: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Requests that begin in a minute; no limit if unset."
    )
    concurrent_requests: int | None = Field(
        default=None, ge=1, le=100_000, description="Requests that are open at once; no limit if unset."
    )


class Metadata(Resource):
    """Labels and annotations to add; the operator's own cannot be changed."""

    labels: dict[str, str] = Field(default_factory=dict, description="Added to the pods' labels.")
    annotations: dict[str, str] = Field(default_factory=dict, description="Added to the pods' annotations.")


class PodTemplate(Resource):
    """A partial pod, merged strategically (as kubectl patch does) into the one that the operator makes."""

    metadata: Metadata = Field(default_factory=Metadata)
    spec: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "Part of a PodSpec: nodeSelector, tolerations, priorityClassName, imagePullSecrets, volumes, or "
            "containers with the name agent (or gateway) and its resources, env, volumeMounts and so on. "
            "Lists are merged by name; a list entry with $patch: delete goes away."
        ),
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
    )


class GatewaySpec(Resource):
    """Stateless HTTP servers that hold the connections of clients and pick an agent for each request."""

    replicas: int = Field(
        default=1,
        ge=0,
        le=100,
        description="Pods of the gateway. With 0 the Service leads straight to the agents, and clients "
        "authenticate with the token in Secret NAME-internal.",
    )
    service_type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = Field(
        default="ClusterIP", description="Type of the Service that clients use."
    )
    port: int = Field(default=80, ge=1, le=65535, description="Port of the Service that clients use.")
    limits: LimitsSpec = Field(default_factory=LimitsSpec)
    template: PodTemplate | None = Field(
        default=None, description="Merged into the gateway's pods, strategically as kubectl patch does."
    )


class AuthSpec(Resource):
    """Who may ask."""

    secret_name: Name = Field(
        description="Secret whose keys are tenants' names and whose values are their API keys, one a line."
    )


class MonitoringSpec(Resource):
    """What is made for monitoring besides the metrics, which are always there."""

    service_monitor: bool = Field(
        default=False,
        description="Whether a ServiceMonitor is made; it needs the Prometheus operator's CRDs.",
    )


class LLMServiceSpec(Resource):
    """What is wanted: a model, and the agents and the gateway that serve it."""

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
        default=None, description="Lets the operator set replicas by load; 0 replicas stay 0."
    )
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        le=64,
        description="GPUs of one agent, which share the model; processes on device cpu.",
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
        description="What a pod asks its node for to get one GPU; nvidia.com/mig-1g.10gb for a slice of one.",
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
    auth: AuthSpec | None = Field(default=None, description="API keys; without it the gateway asks for none.")
    monitoring: MonitoringSpec = Field(default_factory=MonitoringSpec)
    template: PodTemplate | None = Field(
        default=None, description="Merged into the agents' pods, strategically as kubectl patch does."
    )
