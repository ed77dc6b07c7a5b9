"""What an agent tells the outside about itself: the one module of this package that the operator imports."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, computed_field

AgentState = Literal["starting", "ready", "draining", "drained", "failed"]


class TierStatus(BaseModel):
    """Blocks of one tier; free + cached + active is total. Cached blocks can be taken any time."""

    total: int = 0
    free: int = 0
    cached: int = 0
    active: int = 0
    block_bytes: int = 0


class PrefixStatus(BaseModel):
    """A cached prefix that is hit often: the key of its last block, its length and how often it was hit."""

    key: str
    tokens: int
    hits: int


class AgentStatus(BaseModel):
    """The report of one agent. ``version`` grows whenever anything else changes, within one incarnation."""

    version: int = Field(description="pass it as ?since= to wait for the next one")
    incarnation: str = Field(description="random id of this life of the process")
    state: AgentState
    model: str
    layout_digest: str = Field("", description="blocks of agents with equal digests are exchangeable")
    dtype: str = ""
    device: str = ""
    block_tokens: int = 0
    max_model_len: int = Field(0, description="tokens of prompt and output together")
    max_num_seqs: int = 0
    device_tier: TierStatus = TierStatus()
    host_tier: TierStatus = TierStatus()
    running: int = Field(0, description="requests being decoded")
    waiting: int = Field(0, description="requests queued or preempted")
    swapped: int = Field(0, description="of those waiting, requests whose KV is in the host tier")
    in_flight: int = Field(0, description="requests that clients hold open")
    capacity: int = Field(0, description="requests held at most; beyond that clients get a 429")
    commands_pending: int = Field(
        0, description="adds and aborts that the engine's numbers here do not cover yet"
    )
    finished: dict[str, int] = Field({}, description="requests that have left the engine, by reason")
    steps: int = 0
    last_step_ms: float = 0.0
    mean_step_ms: float = Field(0.0, description="moving average")
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = Field(0, description="prompt tokens looked up in the prefix cache")
    prefix_hits: int = Field(0, description="prompt tokens found there")
    preemptions_recompute: int = 0
    preemptions_swap: int = 0
    hottest_prefixes: list[PrefixStatus] = []

    @computed_field(description="share of looked-up prompt tokens that were found")  # type: ignore[prop-decorator]
    @property
    def hit_rate(self) -> float:
        return self.prefix_hits / self.prefix_queries if self.prefix_queries else 0.0
