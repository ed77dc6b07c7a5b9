"""The custom resources as pydantic models: the single source of crds/, of defaults, and of what the code reads.

Field descriptions are what ``kubectl explain`` shows. Rules that one object alone can decide are CEL, so that
the API server refuses what cannot work; what needs the cluster to be judged becomes a condition. No floats:
shares are whole percentages, sizes are quantities.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

GROUP = "serving.blockyard.dev"
VERSION = "v1alpha1"

Percent = Annotated[int, Field(ge=0, le=100)]
Name = Annotated[str, Field(min_length=1, max_length=253)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$", max_length=32)]


def rule(expression: str, message: str, field: str | None = None) -> dict[str, str]:
    """One CEL rule of a schema: what must hold, what is said if it does not, and of which field."""
    found = {"rule": expression, "message": message}
    return found if field is None else {**found, "fieldPath": field}


def rules(*found: dict[str, str]) -> ConfigDict:
    """A model's configuration with CEL rules over the object that it describes."""
    return ConfigDict(json_schema_extra={"x-kubernetes-validations": list(found)})


class Resource(BaseModel):
    """camelCase outside, snake_case inside; unknown fields are the API server's business (it prunes them)."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore")


# ── LLMService: what is wanted ────────────────────────────────────────────────────────────────────


class HubModel(Resource):
    name: Name = Field(description="Hub name owner/name, or a packaged name such as SmolLM2-135M-Instruct.")
    secret_name: Name | None = Field(None, description="Secret with the key token, sent to the hub.")


class ClaimModel(Resource):
    claim_name: Name = Field(description="PersistentVolumeClaim that holds the model; mounted read-only.")
    path: str = Field("", max_length=512, description="Folder or .gguf file inside the claim.")


class HostPathModel(Resource):
    path: str = Field(
        min_length=2, max_length=512, pattern="^/", description="Folder or .gguf file on the node; mounted read-only."
    )


class ImageModel(Resource):
    reference: str = Field(min_length=1, max_length=512, description="OCI image whose files are the model.")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    path: str = Field("", max_length=512, description="Folder or .gguf file inside the image.")


class ModelSpec(Resource):
    """Where the weights come from (exactly one source) and what clients call the model."""

    model_config = rules(
        rule(
            "[has(self.hub), has(self.persistentVolumeClaim), has(self.hostPath), has(self.image)]"
            ".filter(x, x).size() == 1",
            "exactly one of hub, persistentVolumeClaim, hostPath and image must be set",
        )
    )

    hub: HubModel | None = Field(None, description="Fetched by each agent; kept on the node if cacheHostPath is set.")
    persistent_volume_claim: ClaimModel | None = None
    host_path: HostPathModel | None = None
    image: ImageModel | None = Field(None, description="Mounted as an image volume; needs Kubernetes 1.33 or newer.")
    served_name: str | None = Field(
        None, min_length=1, max_length=128, description="The name that clients use; the LLMService's name if unset."
    )
    cache_host_path: str | None = Field(
        None, max_length=512, pattern="^/", description="Folder on the node in which fetched models are kept and reused."
    )
    heads: int | None = Field(
        None, ge=1, le=4096, description="Attention heads, if known: lets tensorParallel be checked at admission."
    )


class EngineSpec(Resource):
    """How each agent computes."""

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    max_model_len: int | None = Field(None, ge=1, description="Longest prompt and answer together, in tokens.")
    max_sequences: int | None = Field(None, ge=1, le=4096, description="Sequences decoded at once by one agent.")
    max_batch_tokens: int | None = Field(None, ge=1, description="Tokens of one step, prefill and decode together.")
    max_queue: int = Field(256, ge=0, le=100000, description="Requests that wait in one agent; more get a 429.")
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads of one agent.")


class KVSpec(Resource):
    """The block pool of each agent. Immutable where a change would make blocks unexchangeable within a rollout."""

    block_tokens: Literal[8, 16, 32, 64] = Field(16, description="Tokens in a KV block.")
    memory_percent: Percent = Field(90, description="Share of the device's memory to use when the pool is measured.")
    blocks: int | None = Field(None, ge=1, description="Blocks of the pool; measured if unset.")
    host_blocks: int = Field(0, ge=0, description="Blocks in host memory, for preemption by swap.")
    prefix_cache: bool = Field(True, description="Keep finished blocks and reuse equal beginnings.")
    preemption: Literal["Recompute", "Swap"] = "Recompute"
    watermark_percent: Percent = Field(1, description="Share of the pool kept free when requests are admitted.")


class BalanceSpec(Resource):
    """When KV moves between agents."""

    model_config = rules(
        rule(
            "self.lowWatermarkPercent < self.highWatermarkPercent",
            "lowWatermarkPercent must be below highWatermarkPercent",
        )
    )

    mode: Literal["Auto", "Advise", "Off"] = Field("Advise", description="Advise proposes moves and carries none out.")
    low_watermark_percent: Percent = Field(50, description="An agent with less of its pool in use has blocks to spare.")
    high_watermark_percent: Percent = Field(85, description="An agent with more of its pool in use is short of blocks.")
    max_concurrent_moves: int = Field(2, ge=0, le=64)


class DrainSpec(Resource):
    timeout_seconds: int = Field(
        300, ge=0, le=86400, description="Running requests get so long before the gateway replays them elsewhere."
    )


class RolloutSpec(Resource):
    max_surge: int = Field(1, ge=1, le=100, description="Agents beyond replicas while pods are replaced.")


class LimitsSpec(Resource):
    """What one tenant may ask of one gateway."""

    requests_per_minute: int | None = Field(None, ge=1)
    concurrent_requests: int | None = Field(None, ge=1)


class GatewaySpec(Resource):
    replicas: int = Field(1, ge=0, le=100, description="0: no gateway; clients use the agents' Service.")
    service_type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    port: int = Field(80, ge=1, le=65535, description="Port of the Service that clients use.")
    limits: LimitsSpec = Field(default_factory=LimitsSpec)
    template: PodTemplate | None = Field(None, description="Merged into the gateway's pods.")


class AuthSpec(Resource):
    secret_name: Name = Field(description="Secret whose keys are tenants and whose values are their API keys.")


class Metadata(Resource):
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class PodTemplate(Resource):
    """A partial pod, merged strategically into the one that the operator makes."""

    metadata: Metadata = Field(default_factory=Metadata)
    spec: dict[str, Any] = Field(
        default_factory=dict,
        description="Part of a PodSpec: nodeSelector, tolerations, resources of the container agent, volumes, ...",
        json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
    )


class MonitoringSpec(Resource):
    service_monitor: bool = Field(False, description="Make a ServiceMonitor; needs the Prometheus operator's CRDs.")


class LLMServiceSpec(Resource):
    model_config = rules(
        rule(
            "!has(self.model.heads) || self.model.heads % self.tensorParallel == 0",
            "tensorParallel must divide the model's heads",
        ),
        rule("!(self.device == 'cpu' && self.tensorParallel > 8)", "on CPUs tensorParallel is at most 8"),
        rule(
            "self.kv.preemption != 'Swap' || self.kv.hostBlocks > 0",
            "preemption Swap needs kv.hostBlocks of at least 1",
        ),
    )

    model: ModelSpec
    replicas: int = Field(1, ge=0, le=1000, description="Agents. kubectl scale and autoscalers set it.")
    tensor_parallel: int = Field(1, ge=1, le=64, description="GPUs of one agent, which share the model.")
    device: Literal["cuda", "cpu"] = Field(
        "cuda",
        description="Where agents compute. Immutable.",
        json_schema_extra={"x-kubernetes-validations": [rule("self == oldSelf", "device is immutable")]},
    )
    gpu_resource: str = Field("nvidia.com/gpu", max_length=253, description="Extended resource of one GPU.")
    image: str | None = Field(None, max_length=512, description="Image of agents and gateway; the operator's default.")
    engine: EngineSpec = Field(default_factory=EngineSpec)
    kv: KVSpec = Field(default_factory=KVSpec)
    balance: BalanceSpec = Field(default_factory=BalanceSpec)
    drain: DrainSpec = Field(default_factory=DrainSpec)
    rollout: RolloutSpec = Field(default_factory=RolloutSpec)
    gateway: GatewaySpec = Field(default_factory=GatewaySpec)
    auth: AuthSpec | None = Field(None, description="API keys; without it the gateway asks for none.")
    monitoring: MonitoringSpec = Field(default_factory=MonitoringSpec)
    template: PodTemplate = Field(default_factory=PodTemplate, description="Merged into the agents' pods.")


# ── LLMService: what is there ─────────────────────────────────────────────────────────────────────


class Condition(Resource):
    type: str
    status: Literal["True", "False", "Unknown"]
    observed_generation: int = 0
    last_transition_time: str = Field(json_schema_extra={"format": "date-time"})
    reason: str = Field(min_length=1, max_length=1024, pattern="^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")
    message: str = Field("", max_length=32768)


class TierPool(Resource):
    """Blocks of one tier over all agents; free + cached + active is total."""

    total: int = 0
    free: int = 0
    cached: int = 0
    active: int = 0
    size: str = Field("0", description="Bytes of all blocks, as a quantity.")


class PoolStatus(Resource):
    device: TierPool = Field(default_factory=TierPool)
    host: TierPool = Field(default_factory=TierPool)


class AgentLine(Resource):
    """One agent in a line."""

    name: str = Field(description="The pod.")
    node: str = ""
    state: str = Field("Unknown", description="Pending, Starting, Ready, Draining, Drained, Failed or Unknown.")
    revision: str = ""
    running: int = 0
    waiting: int = 0
    used_percent: int = Field(0, description="Share of its device blocks that are active.")
    cached_percent: int = Field(0, description="Share of its device blocks that hold cached prefixes.")
    hit_percent: int = Field(0, description="Share of looked-up prompt tokens found in the prefix cache.")
    message: str = Field("", max_length=1024)


class Decision(Resource):
    """What the operator decided, and the numbers that led to it."""

    time: str = Field(json_schema_extra={"format": "date-time"})
    action: str = Field(description="Create, Drain, Delete or Replace.")
    agent: str
    reason: str
    message: str = Field("", max_length=1024)


class LLMServiceStatus(Resource):
    observed_generation: int = 0
    conditions: list[Condition] = Field(
        default_factory=list,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    replicas: int = Field(0, description="Agents that exist and are not on their way out.")
    ready_replicas: int = 0
    updated_replicas: int = Field(0, description="Agents of the newest revision.")
    selector: str = Field("", description="Label selector of the agents, for autoscalers.")
    revision: str = Field("", description="Digest of what makes agents alike.")
    url: str = Field("", description="Where clients inside the cluster send requests.")
    used_percent: int = Field(0, description="Share of all device blocks that are active.")
    pool: PoolStatus = Field(default_factory=PoolStatus)
    agents: list[AgentLine] = Field(default_factory=list, max_length=64)
    decisions: list[Decision] = Field(default_factory=list, max_length=16, description="The newest, latest first.")


# ── KVMove ────────────────────────────────────────────────────────────────────────────────────────


class Evidence(Resource):
    """A number that led to the decision."""

    name: str
    value: str


class KVMoveSpec(Resource):
    model_config = rules(
        rule("!has(self.from) || !has(self.to) || self.from != self.to", "from and to must be different agents"),
        rule("self.kind in ['offload', 'drain'] || has(self.to)", "this kind of move needs to"),
        rule("self == oldSelf || self.approved != oldSelf.approved", "only approved may change"),
    )

    service: Name = Field(description="The LLMService, in the same namespace.")
    kind: Literal["migrate", "lend", "recall", "offload", "replicate", "drain"]
    from_: Name = Field(alias="from", description="Agent (pod) that gives.")
    to: Name | None = Field(None, description="Agent (pod) that takes.")
    blocks: int | None = Field(None, ge=1, description="How many blocks; all that fits if unset.")
    approved: bool = Field(False, description="A move proposed in mode Advise is carried out once this is true.")
    why: list[Evidence] = Field(default_factory=list, max_length=32)
    predicted_gain: str = Field("", max_length=256)


class KVMoveStatus(Resource):
    phase: Literal["Proposed", "Running", "Succeeded", "Failed", "Cancelled"] = "Proposed"
    observed_generation: int = 0
    bytes: str = "0"
    duration_milliseconds: int = 0
    downtime_milliseconds: int = 0
    message: str = Field("", max_length=1024)
    started_at: str | None = Field(None, json_schema_extra={"format": "date-time"})
    finished_at: str | None = Field(None, json_schema_extra={"format": "date-time"})
