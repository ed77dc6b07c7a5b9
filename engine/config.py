"""The settings of one engine as plain data; made from the agent's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PreemptionKind = Literal["recompute", "swap"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes are in blocks or bytes; None means: decide from the machine and the model.

    ``kv_blocks`` takes precedence over ``kv_bytes``, and ``kv_bytes`` over ``memory_fraction`` (of the GPU's
    memory, or on a CPU of the free host memory; measured after the weights are loaded).
    ``max_batch_tokens`` is the budget per step that decodes and prefill chunks share. ``watermark`` is the
    share of the pool that admission keeps free, so that running sequences can grow.
    """

    model: str
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    block_tokens: int = 16
    kv_blocks: int | None = None
    kv_bytes: int | None = None
    memory_fraction: float = 0.9
    host_blocks: int = 0
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_batch_tokens: int | None = None
    prefix_cache: bool = True
    preemption: PreemptionKind = "recompute"
    watermark: float = 0.01
    tensor_parallel: int = 1
    cuda_graphs: bool = True
    threads: int | None = None
