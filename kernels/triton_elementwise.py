# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,misc"
"""Norms and SwiGLU in Triton, in one pass over memory.

The kernels round where the reference rounds (to the type of the activations, after each step), so that
results differ only by the order of sums. Products are computed in float32: the product of two 16-bit numbers
is exact there, and rounding it once gives the same result as a 16-bit multiplication.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_rms_norm", "rms_norm", "swiglu"]

SWIGLU_BLOCK = 1024


@triton.jit
def rms_norm_kernel(
    x,  # [rows, width]
    residual,  # [rows, width], or unused
    weight,  # [width]
    out,  # [rows, width], contiguous
    width,
    eps,
    stride_x,
    stride_residual,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's norm; with ADD the row is first added to its residual. Grid: (rows)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    values = tl.load(x + row * stride_x + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        places = residual + row * stride_residual + columns
        values += tl.load(places, mask=mask, other=0.0).to(tl.float32)
        rounded = values.to(residual.dtype.element_ty)
        tl.store(places, rounded, mask=mask)
        values = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
    element = residual.dtype.element_ty if ADD else x.dtype.element_ty
    normed = (values * inverse).to(element).to(tl.float32)
    scaled = normed * tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, scaled.to(out.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_kernel(
    gate_up,  # [rows, 2 * width]
    out,  # [rows, width], contiguous
    width,
    stride,
    BLOCK: tl.constexpr,
):
    """A piece of one row. Grid: (rows, width / BLOCK)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    places = gate_up + row * stride + columns
    gate = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(places + width, mask=mask, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + columns, (silu * up).to(out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See reference.rms_norm."""
    return _norm(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See reference.add_rms_norm."""
    if residual.stride(-1) != 1 or residual.dim() != 2:
        raise ValueError("residual must be [T, D] with contiguous rows: it is updated in place")
    return _norm(x, residual, weight, eps)


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    width = x.shape[-1]
    kind = x.dtype if residual is None else residual.dtype
    out = torch.empty(x.shape, dtype=torch.promote_types(kind, weight.dtype), device=x.device)
    rows = x.reshape(-1, width)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    if rows.shape[0]:
        block = triton.next_power_of_2(width)
        rms_norm_kernel[(rows.shape[0],)](
            rows,
            rows if residual is None else residual,
            weight.contiguous(),
            out,
            width,
            eps,
            rows.stride(0),
            0 if residual is None else residual.stride(0),
            ADD=residual is not None,
            BLOCK=block,
            num_warps=min(16, max(1, block // 256)),
            enable_fp_fusion=True,
        )
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """See reference.swiglu."""
    width = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    rows = gate_up.reshape(-1, 2 * width)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    count = math.prod(gate_up.shape[:-1])
    if count:
        swiglu_kernel[(count, triton.cdiv(width, SWIGLU_BLOCK))](
            rows, out, width, rows.stride(0), BLOCK=SWIGLU_BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return out
