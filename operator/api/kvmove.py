"""KVMove: one decision about KV, and how far it has been carried out."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .shared import INT32, Name, Resource, Rule, immutable


class Evidence(Resource):
    """A number that led to the decision."""

    name: str = Field(max_length=128, description="What was measured or computed.")
    value: str = Field(max_length=256, description="The number, with its unit.")


class KVMoveSpec(Resource):
    """One decision about KV: which blocks go from which agent to which. Immutable, except for approved."""

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
            lambda _: True,  # needs the old object too, which only the API server has
            "a KVMove is immutable, except for approved: make another",
            "to",
        ),
    )

    service: Name = Field(
        description="The LLMService that both agents belong to, in the same namespace.",
        json_schema_extra=immutable("service is immutable: make another KVMove"),
    )
    kind: Literal["migrate", "lend", "recall", "offload", "replicate", "drain"] = Field(
        description="What is done with the blocks.",
        json_schema_extra=immutable("kind is immutable: make another KVMove"),
    )
    from_: Name = Field(
        alias="from",
        description="The agent that has the blocks, by the name of its pod.",
        json_schema_extra=immutable("from is immutable: make another KVMove"),
    )
    to: Name | None = Field(
        default=None,
        description="The agent that receives the blocks, by the name of its pod; drain chooses one if unset.",
        json_schema_extra=immutable("to is immutable: make another KVMove"),
    )
    blocks: int | None = Field(
        default=None,
        ge=1,
        le=INT32,
        description="How many blocks; if unset, as many as fit.",
        json_schema_extra=immutable("blocks is immutable: make another KVMove"),
    )
    approved: bool = Field(
        default=False,
        description="A move proposed in mode Advise is carried out once this is true.",
        json_schema_extra=immutable("an approval cannot be withdrawn: delete the KVMove", "self || !oldSelf"),
    )
    why: list[Evidence] = Field(
        default_factory=list,
        max_length=32,
        description="The numbers that led to the decision.",
        json_schema_extra=immutable("why is immutable: make another KVMove"),
    )
    predicted_gain: str = Field(
        default="",
        max_length=256,
        description="What the decision was expected to bring.",
        json_schema_extra=immutable("predictedGain is immutable: make another KVMove"),
    )


class KVMoveStatus(Resource):
    """How far the move is."""

    phase: Literal["Proposed", "Running", "Succeeded", "Failed", "Cancelled"] = Field(
        default="Proposed", description="How far the move is; Proposed waits for approval."
    )
    observed_generation: int = Field(
        default=0, description="The metadata.generation that this status was computed from."
    )
    bytes: str = Field(default="0", max_length=32, description="How much has been moved, as a quantity.")
    duration_milliseconds: int = Field(default=0, description="Time from the start to the end.")
    downtime_milliseconds: int = Field(default=0, description="Time for which the moved request was paused.")
    message: str = Field(default="", max_length=1024, description="The result, in words.")
    started_at: str | None = Field(
        default=None, json_schema_extra={"format": "date-time"}, description="When it started."
    )
    finished_at: str | None = Field(
        default=None,
        json_schema_extra={"format": "date-time"},
        description="When it ended, successfully or not.",
    )
