"""The custom resources as pydantic models: the one source of crds/, of defaults and of what the code reads.

Descriptions and docstrings are what ``kubectl explain`` shows. A rule that one object alone can decide stands
in ``RULES`` twice: as CEL, by which the API server refuses what cannot work, and as Python, by which the
local runtime and an operator behind older CRDs refuse the same. What needs the cluster to be judged becomes a
condition. No floats: shares are whole percentages, sizes are quantities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

GROUP = "serving.blockyard.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

LONGEST_NAME = 50  # of an LLMService: its children's names add up to 9 characters, and 63 is the limit
INT32 = 2**31 - 1
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

Percent = Annotated[int, Field(ge=0, le=100)]
Name = Annotated[
    str, StringConstraints(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
]
Path = Annotated[str, StringConstraints(min_length=2, max_length=512, pattern=r"^/[^:]*$")]
Quantity = Annotated[
    str, StringConstraints(max_length=32, pattern=r"^[0-9]{1,12}(\.[0-9]{1,3})?(Ki|Mi|Gi|Ti|k|M|G|T)?$")
]


def bytes_of(quantity: str) -> int:
    """A Quantity in bytes."""
    number = quantity.rstrip("kKMGTi")
    return int(float(number) * _UNITS[quantity[len(number) :]])


def quantity(size: int) -> str:
    """Bytes as a Quantity for people: two or more digits of the largest binary unit."""
    for unit in ("Ti", "Gi", "Mi", "Ki"):
        if size >= 10 * _UNITS[unit]:
            return f"{size // _UNITS[unit]}{unit}"
    return str(size)


class Rule(NamedTuple):
    """What must hold of an object: in CEL and in Python, what is said if it does not, and of which field."""

    cel: str
    holds: Callable[[Any], bool]
    message: str
    field: str

    def schema(self) -> JsonSchemaValue:
        return {"rule": self.cel, "message": self.message, "fieldPath": f".{self.field}"}


def _immutable(what: str, allowed: str = "self == oldSelf") -> JsonSchemaValue:
    """A rule over two versions of a field, which the API server alone can check."""
    return {"x-kubernetes-validations": [{"rule": allowed, "message": what}]}


class Resource(BaseModel):
    """camelCase outside, snake_case inside; unknown fields are the API server's business (it prunes them)."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore")
    RULES: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for rule in self.RULES:
            if not rule.holds(self):
                raise PydanticCustomError("rule", "{message}", {"message": rule.message})
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler(core_schema)
        if cls.RULES:
            found = handler.resolve_ref_schema(schema)
            found["x-kubernetes-validations"] = [rule.schema() for rule in cls.RULES]
        return schema


# ── LLMService: what is wanted ────────────────────────────────────────────────────────────────────────────


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
    """The stateless front door that picks an agent for each request."""

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
        json_schema_extra=_immutable("device is immutable: make another LLMService"),
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


# ── LLMService: what is there ─────────────────────────────────────────────────────────────────────────────


class Condition(Resource):
    """One aspect of the service."""

    type: str = Field(max_length=316, description="Ready, Progressing, Degraded or Balanced.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether the condition holds.")
    observed_generation: int = Field(default=0, description="The generation that this was computed from.")
    last_transition_time: str = Field(
        json_schema_extra={"format": "date-time"}, description="When status last changed."
    )
    reason: str = Field(
        min_length=1,
        max_length=1024,
        pattern="^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
        description="Why, as one CamelCase word.",
    )
    message: str = Field(default="", max_length=32768, description="Why, for a person.")


class TierPool(Resource):
    """Blocks of one tier, over all agents; free, cached and active add up to total."""

    total: int = Field(default=0, description="All blocks of the tier.")
    free: int = Field(default=0, description="Blocks that hold nothing.")
    cached: int = Field(
        default=0, description="Blocks that hold a cached prefix and can be taken at any time."
    )
    active: int = Field(default=0, description="Blocks that running requests hold.")
    size: str = Field(default="0", max_length=32, description="Memory of all blocks, as a quantity.")


class PoolStatus(Resource):
    """The block pools of all agents together."""

    device: TierPool = Field(
        default_factory=TierPool, description="Blocks in the memory of the device that computes."
    )
    host: TierPool = Field(default_factory=TierPool, description="Blocks in host memory; see kv.hostBlocks.")


class AgentLine(Resource):
    """One agent in a line."""

    name: str = Field(max_length=253, description="The agent, by the name of its pod.")
    node: str = Field(default="", max_length=253, description="The node that its pod is on.")
    state: str = Field(
        default="Unknown",
        max_length=32,
        description="Pending, Starting, Ready, Draining, Drained, Failed, Terminating or Unknown.",
    )
    revision: str = Field(
        default="", max_length=63, description="What it was made from; status.revision is the newest."
    )
    running: int = Field(default=0, description="Requests that it works on.")
    waiting: int = Field(default=0, description="Requests that are queued or preempted.")
    used_percent: int = Field(default=0, description="Percentage of its device blocks that are active.")
    cached_percent: int = Field(
        default=0, description="Percentage of its device blocks that hold cached prefixes."
    )
    hit_percent: int = Field(
        default=0, description="Percentage of prompt tokens that were found in its prefix cache."
    )
    message: str = Field(
        default="", max_length=1024, description="What is wrong with it, or why it leaves; mostly empty."
    )


class Decision(Resource):
    """What the operator decided, and the numbers that led to it."""

    time: str = Field(json_schema_extra={"format": "date-time"}, description="When it was carried out.")
    action: str = Field(max_length=32, description="Create, Drain, Delete or Scale.")
    agent: str = Field(
        max_length=253,
        description="The agent, by the name of its pod; empty for a decision about all of them.",
    )
    reason: str = Field(max_length=64, description="Why, as one CamelCase word.")
    message: str = Field(default="", max_length=1024, description="Why, for a person.")


class AutoscalingStatus(Resource):
    """What the load asks for."""

    wanted: int = Field(
        description="How many agents the load asks for; while since is set, the most it has asked for "
        "from then on."
    )
    reason: str = Field(max_length=64, description="What asks for so many, as one CamelCase word.")
    since: str | None = Field(
        default=None,
        json_schema_extra={"format": "date-time"},
        description="Since when fewer agents than there are have been enough.",
    )


class LLMServiceStatus(Resource):
    """What the operator sees; it alone writes this."""

    observed_generation: int = Field(default=0, description="The generation that all this was computed from.")
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        description="Ready, Progressing, Degraded and Balanced, each with its reason.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    replicas: int = Field(default=0, description="Agents that exist and are not on their way out.")
    ready_replicas: int = Field(default=0, description="Agents that take requests, of those in replicas.")
    updated_replicas: int = Field(
        default=0, description="Agents of the newest revision, of those in replicas."
    )
    ready_gateways: int = Field(default=0, description="Gateway pods that take requests.")
    selector: str = Field(
        default="", max_length=512, description="Label selector of the agents, for autoscalers."
    )
    revision: str = Field(
        default="",
        max_length=63,
        description="Digest of all that agents are made from; when it changes, they are replaced.",
    )
    url: str = Field(default="", max_length=512, description="Where clients in the cluster send requests.")
    running: int = Field(default=0, description="Requests that all agents work on.")
    waiting: int = Field(default=0, description="Requests that are queued or preempted in all agents.")
    used_percent: int = Field(default=0, description="Percentage of all device blocks that are active.")
    pool: PoolStatus = Field(default_factory=PoolStatus)
    autoscaling: AutoscalingStatus | None = Field(
        default=None,
        description="What the load asks for. Only with spec.autoscaling, and not while nothing is scaled.",
    )
    agents: list[AgentLine] = Field(
        default_factory=list,
        max_length=64,
        description="The agents, by name; of more than 64, those with something to say.",
    )
    decisions: list[Decision] = Field(
        default_factory=list, max_length=16, description="The newest decisions, latest first."
    )


# ── KVMove ────────────────────────────────────────────────────────────────────────────────────────────────


class Evidence(Resource):
    """A number that led to the decision."""

    name: str = Field(max_length=128, description="What was measured or computed.")
    value: str = Field(max_length=256, description="The number, with its unit.")


class KVMoveSpec(Resource):
    """One decision about KV: what is to go from which agent to which. Immutable, except for the approval."""

    RULES = (
        Rule(
            "!has(self.to) || self.from != self.to",
            lambda self: self.from_ != self.to,
            "from and to must be different agents",
            "to",
        ),
        Rule(
            "self.kind in ['offload', 'drain'] || has(self.to)",
            lambda self: self.kind in ("offload", "drain") or self.to is not None,
            "a move of this kind goes to an agent: set to",
            "to",
        ),
        Rule(
            "self.kind != 'offload' || !has(self.to)",
            lambda self: self.kind != "offload" or self.to is None,
            "offload goes to the agent's own host tier: leave to out",
            "to",
        ),
        Rule(
            "has(self.to) == has(oldSelf.to) && has(self.blocks) == has(oldSelf.blocks) "
            "&& has(self.why) == has(oldSelf.why)",
            lambda _: True,  # decided by two versions, which only the API server sees
            "a KVMove is immutable, except for approved: make another",
            "to",
        ),
    )

    service: Name = Field(
        description="The LLMService whose agents they are, in the same namespace.",
        json_schema_extra=_immutable("service is immutable: make another KVMove"),
    )
    kind: Literal["migrate", "lend", "recall", "offload", "replicate", "drain"] = Field(
        description="What is done with the blocks.",
        json_schema_extra=_immutable("kind is immutable: make another KVMove"),
    )
    from_: Name = Field(
        alias="from",
        description="The agent that gives blocks, by the name of its pod.",
        json_schema_extra=_immutable("from is immutable: make another KVMove"),
    )
    to: Name | None = Field(
        default=None,
        description="The agent that takes blocks, by the name of its pod; drain chooses one if unset.",
        json_schema_extra=_immutable("to is immutable: make another KVMove"),
    )
    blocks: int | None = Field(
        default=None,
        ge=1,
        le=INT32,
        description="How many blocks; all that fit if unset.",
        json_schema_extra=_immutable("blocks is immutable: make another KVMove"),
    )
    approved: bool = Field(
        default=False,
        description="A move proposed in mode Advise is carried out once this is true.",
        json_schema_extra=_immutable(
            "an approval cannot be withdrawn: delete the KVMove", "self || !oldSelf"
        ),
    )
    why: list[Evidence] = Field(
        default_factory=list,
        max_length=32,
        description="The numbers that led to the decision.",
        json_schema_extra=_immutable("why is immutable: make another KVMove"),
    )
    predicted_gain: str = Field(
        default="",
        max_length=256,
        description="What the decision was expected to bring.",
        json_schema_extra=_immutable("predictedGain is immutable: make another KVMove"),
    )


class KVMoveStatus(Resource):
    """How far the move is."""

    phase: Literal["Proposed", "Running", "Succeeded", "Failed", "Cancelled"] = Field(
        default="Proposed", description="How far the move is; Proposed waits for approval."
    )
    observed_generation: int = Field(default=0, description="The generation that this was computed from.")
    bytes: str = Field(default="0", max_length=32, description="How much has been moved, as a quantity.")
    duration_milliseconds: int = Field(default=0, description="Time from the start to the end.")
    downtime_milliseconds: int = Field(
        default=0, description="Time for which the request that was moved stood still."
    )
    message: str = Field(default="", max_length=1024, description="The result, for a person.")
    started_at: str | None = Field(
        default=None, json_schema_extra={"format": "date-time"}, description="When it started."
    )
    finished_at: str | None = Field(
        default=None, json_schema_extra={"format": "date-time"}, description="When it ended, well or not."
    )
