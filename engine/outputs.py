"""What the engine returns after a step: plain data without torch, ready to be sent to another process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(slots=True)
class TokenLogprob:
    """The chosen token's log-probability and the best alternatives, best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(slots=True)
class SequenceOutput:
    """New tokens of one choice of one request.

    The last output of each of a request's ``n`` choices has ``finish_reason`` set. The token that
    stopped a sequence (end of text or a stop token id) is not in ``token_ids``. With
    ``best_of > n`` and with beam search the choices are ranked when all sequences have finished, so a
    choice is then sent as one output. ``error`` says why the whole request ends before its time, because of
    its ``response_format``; it is the request's last output.
    """

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    cached_tokens: int = 0
    cumulative_logprob: float = 0.0
    error: str | None = None


@dataclass(slots=True)
class TierUsage:
    """Blocks of one tier (device or host). free + cached + active == total; cached blocks can be evicted."""

    total: int = 0
    free: int = 0
    cached: int = 0
    active: int = 0
    block_bytes: int = 0


@dataclass(slots=True)
class HotPrefix:
    """A cached chain of blocks that requests often hit. ``key`` is the key of its last block, in hex."""

    key: str
    tokens: int
    hits: int


@dataclass(slots=True)
class EngineStats:
    """A snapshot of the engine. Counters only grow; ``running``, ``waiting`` and ``swapped`` are requests."""

    running: int = 0
    waiting: int = 0
    swapped: int = 0
    device: TierUsage = field(default_factory=TierUsage)
    host: TierUsage = field(default_factory=TierUsage)
    steps: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0  # tokens looked up in the prefix cache
    prefix_hits: int = 0  # tokens found there
    preemptions_recompute: int = 0
    preemptions_swap: int = 0
    finished: dict[str, int] = field(default_factory=dict)  # finish reason -> requests
    last_step_ms: float = 0.0
    mean_step_ms: float = 0.0  # exponential moving average
    hottest_prefixes: list[HotPrefix] = field(default_factory=list)
