"""The CPU implementation of every operation: compiled C++ where it exists and builds, else the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .batch import PagedBatch
from .cpu_build import load
from .reference import copy_blocks, merge_partials, rope, write_kv

__all__ = [
    "Linear",
    "add_rms_norm",
    "copy_blocks",
    "linear",
    "merge_partials",
    "name",
    "paged_attention",
    "paged_attention_partial",
    "prepare_linear",
    "rms_norm",
    "rope",
    "rope_and_write_kv",
    "swiglu",
    "write_kv",
]

_ops = torch.ops.blockyard
Linear = tuple[Tensor, Tensor | None, int]  # weight (packed, if it is 3-dimensional), bias, features


def name() -> str:
    return "compiled C++" if load() else "plain torch"


def prepare_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """Pack a weight [N, K] into the order in which ``linear`` reads it. The caller can drop the original."""
    if load() and weight.dtype == torch.float32:
        return _ops.pack_linear(weight), bias, weight.shape[0]
    return weight, bias, weight.shape[0]


def linear(x: Tensor, prepared: Linear) -> Tensor:
    """x [T, K] -> [T, N]."""
    weight, bias, features = prepared
    if weight.dim() == 3:
        return _ops.linear(x, weight, bias, features)  # type: ignore[no-any-return]
    return torch.nn.functional.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not load():
        return reference.rms_norm(x, weight, eps)
    return _ops.rms_norm(x, weight, eps)  # type: ignore[no-any-return]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not load():
        return reference.add_rms_norm(x, residual, weight, eps)
    return _ops.add_rms_norm(x, residual, weight, eps)  # type: ignore[no-any-return]


def swiglu(gate_up: Tensor) -> Tensor:
    if not load():
        return reference.swiglu(gate_up)
    return _ops.swiglu(gate_up)  # type: ignore[no-any-return]


def rope_and_write_kv(
    qkv: Tensor,
    kv: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    if not load():
        return reference.rope_and_write_kv(
            qkv, kv, slots, positions, cos, sin, num_heads=num_heads, q_norm=q_norm, k_norm=k_norm, eps=eps
        )
    return _ops.rope_and_write_kv(qkv, kv, slots, positions, cos, sin, num_heads, q_norm, k_norm, eps)  # type: ignore[no-any-return]


def paged_attention(q: Tensor, kv: Tensor, batch: PagedBatch, *, scale: float) -> Tensor:
    if not load():
        return reference.paged_attention(q, kv, batch, scale=scale)
    out: Tensor = _ops.attention(
        q, kv, batch.block_tables, batch.rows, batch.query_starts, batch.context_lens, scale, True, False
    )[0]
    return out


def paged_attention_partial(
    q: Tensor, kv: Tensor, batch: PagedBatch, *, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    if not load():
        return reference.paged_attention_partial(q, kv, batch, scale=scale, causal=causal)
    return _ops.attention(  # type: ignore[no-any-return]
        q, kv, batch.block_tables, batch.rows, batch.query_starts, batch.context_lens, scale, causal, True
    )
