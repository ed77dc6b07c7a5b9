"""The status of LLMService: what the operator observes. Only the operator writes it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .shared import Resource


class Condition(Resource):
    """One aspect of the service."""

    type: str = Field(max_length=316, description="Ready, Progressing, Degraded or Balanced.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether the condition holds.")
    observed_generation: int = Field(
        default=0, description="The metadata.generation that this was computed from."
    )
    last_transition_time: str = Field(
        json_schema_extra={"format": "date-time"}, description="When status last changed."
    )
    reason: str = Field(
        min_length=1,
        max_length=1024,
        pattern="^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
        description="Why, as one CamelCase word.",
    )
    message: str = Field(default="", max_length=32768, description="Why, in words.")


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
    """The state of one agent."""

    name: str = Field(max_length=253, description="The agent, by the name of its pod.")
    node: str = Field(default="", max_length=253, description="The node that its pod is on.")
    state: str = Field(
        default="Unknown",
        max_length=32,
        description="Pending, Starting, Ready, Draining, Drained, Failed, Terminating or Unknown.",
    )
    revision: str = Field(
        default="",
        max_length=63,
        description="Revision that it was made from; status.revision is the newest.",
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
        default="", max_length=1024, description="What is wrong with it, or why it leaves; usually empty."
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
    message: str = Field(default="", max_length=1024, description="Why, in words.")


class AutoscalingStatus(Resource):
    """How many agents the load needs."""

    wanted: int = Field(
        description="How many agents the load needs; while since is set, the highest number that it has "
        "needed since then."
    )
    reason: str = Field(max_length=64, description="What determines this number, as one CamelCase word.")
    since: str | None = Field(
        default=None,
        json_schema_extra={"format": "date-time"},
        description="Since when fewer agents than replicas have been enough.",
    )


class LLMServiceStatus(Resource):
    """What the operator observes. Only the operator writes it."""

    observed_generation: int = Field(
        default=0, description="The metadata.generation that this status was computed from."
    )
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        description="Ready, Progressing, Degraded and Balanced, each with its reason.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    replicas: int = Field(
        default=0, description="Agents that exist and are not draining, terminating or failed."
    )
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
        description="How many agents the load needs. Only set with spec.autoscaling, and not while scaling "
        "is suspended.",
    )
    agents: list[AgentLine] = Field(
        default_factory=list,
        max_length=64,
        description="The agents, by name. Of more than 64, those with a message or not Ready are kept first.",
    )
    decisions: list[Decision] = Field(
        default_factory=list, max_length=16, description="The newest decisions, latest first."
    )
