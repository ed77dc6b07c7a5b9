"""The one place that chooses an implementation, by the device of the tensors.

CUDA goes to Triton, the CPU to the compiled operations or, where those cannot be built, to plain torch.
``reference`` defines each operation; callers do not depend on which implementation ran. Triton is imported
when the first CUDA tensor arrives, so a machine without a GPU does not need Triton.

The environment variable BLOCKYARD_CPU_KERNELS forces the choice on the CPU: ``reference`` is plain torch,
``compiled`` raises an error if the build fails, ``auto`` (the default) logs a warning and uses plain torch.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import cpu_ops
from .batch import PagedBatch
from .cpu_ops import Linear


@cache
def _triton() -> Any:
    return import_module(".triton_ops", __package__)


def _on(x: Tensor) -> Any:
    return _triton() if x.is_cuda else cpu_ops


def backend(device: torch.device) -> str:
    """The name of this device's implementation, for logs. Builds the CPU operations if they are not built."""
    return "Triton" if device.type == "cuda" else cpu_ops.name()


def prepare_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """Bring a weight [N, K] and bias [N] into the form that ``linear`` reads fastest.

    The original can be dropped afterwards; the result is opaque.
    """
    if weight.is_cuda:
        return weight, bias, weight.shape[0]
    return cpu_ops.prepare_linear(weight, bias)


def linear(x: Tensor, prepared: Linear) -> Tensor:
    """x [T, K] times a prepared weight [N, K] -> [T, N] in x's dtype."""
    if x.is_cuda:
        return torch.nn.functional.linear(x, prepared[0], prepared[1])
    return cpu_ops.linear(x, prepared)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See reference.rms_norm."""
    return _on(x).rms_norm(x, weight, eps)  # type: ignore[no-any-return]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See reference.add_rms_norm: ``residual`` is updated in place."""
    return _on(x).add_rms_norm(x, residual, weight, eps)  # type: ignore[no-any-return]


def swiglu(gate_up: Tensor) -> Tensor:
    """See reference.swiglu."""
    return _on(gate_up).swiglu(gate_up)  # type: ignore[no-any-return]


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """See reference.rope."""
    return _on(x).rope(x, cos, sin, positions)  # type: ignore[no-any-return]


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
    """See reference.rope_and_write_kv."""
    return _on(qkv).rope_and_write_kv(  # type: ignore[no-any-return]
        qkv, kv, slots, positions, cos, sin, num_heads=num_heads, q_norm=q_norm, k_norm=k_norm, eps=eps
    )


def write_kv(k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> None:
    """See reference.write_kv."""
    _on(kv).write_kv(k, v, kv, slots)


def paged_attention(q: Tensor, kv: Tensor, batch: PagedBatch, *, scale: float) -> Tensor:
    """See reference.paged_attention."""
    return _on(q).paged_attention(q, kv, batch, scale=scale)  # type: ignore[no-any-return]


def paged_attention_partial(
    q: Tensor, kv: Tensor, batch: PagedBatch, *, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.paged_attention_partial."""
    return _on(q).paged_attention_partial(q, kv, batch, scale=scale, causal=causal)  # type: ignore[no-any-return]


def merge_partials(parts: list[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """See reference.merge_partials."""
    return _on(parts[0][0]).merge_partials(parts, dtype)  # type: ignore[no-any-return]


def copy_blocks(source: Tensor, destination: Tensor, pairs: Tensor) -> None:
    """See reference.copy_blocks: between pools, whichever devices they are on, or within one."""
    same = source.is_cuda and destination.is_cuda
    (_triton() if same else cpu_ops).copy_blocks(source, destination, pairs)
