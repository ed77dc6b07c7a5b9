"""The protocol between the HTTP process and the engine process of one agent.

Length-prefixed msgpack over a Unix socket pair; every message is one of the tagged structs below.
The HTTP process is the only sender of ``Command``s, the engine process the only sender of ``Event``s.
"""

from __future__ import annotations

import msgspec

from ..engine.outputs import EngineStats, FinishReason, SequenceOutput
from ..engine.sampling_params import SamplingParams


class AddRequest(msgspec.Struct, tag="add", frozen=True):
    """Serve a prompt. A lower ``priority`` is served sooner. ``tenant`` is part of the block keys and the
    unit of fair scheduling.
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    tenant: str = ""
    priority: int = 0


class Abort(msgspec.Struct, tag="abort", frozen=True):
    """Drop a request, or one choice of it, within one step. Unknown ids are ignored.

    ``reason`` is "stop" if the HTTP process, which sees the text, has found a stop string in it.
    """

    request_id: str
    index: int | None = None
    reason: FinishReason = "abort"


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """Exit cleanly after the current step."""


Command = AddRequest | Abort | Shutdown


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The engine has loaded and will answer. Sizes in tokens unless named otherwise."""

    model: str
    layout_digest: str
    dtype: str
    device: str
    vocab_size: int
    eos_token_ids: list[int]
    max_model_len: int
    max_num_seqs: int
    max_batch_tokens: int
    block_tokens: int
    kv_blocks: int
    block_bytes: int
    host_blocks: int


class Outputs(msgspec.Struct, tag="outputs", frozen=True):
    """All new tokens of one step."""

    outputs: list[SequenceOutput]


class Rejected(msgspec.Struct, tag="rejected", frozen=True):
    """A request that is not served: because of the request, or with ``internal`` because of the engine."""

    request_id: str
    message: str
    field: str | None = None
    internal: bool = False


class Stats(msgspec.Struct, tag="stats", frozen=True):
    """Sent after a step (rate limited) and always when the engine goes idle.

    ``commands`` is how many commands the engine had carried out by then: what was sent later is not in it.
    """

    stats: EngineStats
    commands: int = 0


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The last event before the engine exits with an error. ``config``: a setting cannot work."""

    message: str
    config: bool = False


Event = Ready | Outputs | Rejected | Stats | Failed
