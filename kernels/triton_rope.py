# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,misc"
"""The operations on q, k and v between their projection and attention, fused into one Triton kernel.

Per-head norm, rotation and the write into the paged KV are one kernel, so that each number is read and
written once. A program handles one token and a few consecutive heads, which may mix q, k and v heads: they
lie side by side in the projection's output.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["rope", "rope_and_write_kv", "write_kv"]

PROGRAM_ELEMENTS = 1024  # enough for wide loads by 4 warps, and few enough that small batches fill the device


@triton.jit
def _head_norm(x1, x2, weight, halves, mask, eps, HALF: tl.constexpr, KIND: tl.constexpr):
    """Root-mean-square norm of heads, given as two halves [H, HALF]; rounds as the reference does."""
    squares = tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)
    inverse = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
    w1 = tl.load(weight + halves, mask=mask, other=0.0).to(tl.float32)[None, :]
    w2 = tl.load(weight + HALF + halves, mask=mask, other=0.0).to(tl.float32)[None, :]
    y1 = (x1 * inverse).to(KIND).to(tl.float32) * w1
    y2 = (x2 * inverse).to(KIND).to(tl.float32) * w2
    return y1.to(KIND).to(tl.float32), y2.to(KIND).to(tl.float32)


@triton.jit
def rope_and_write_kv_kernel(
    qkv,  # [T, NUM_HEADS + 2 * KV_HEADS, 2 * HALF]; q is rotated in place
    kv,  # [num_blocks, 2, KV_HEADS, BLOCK_TOKENS, 2 * HALF]
    slots,  # int64 [T]
    positions,  # int [T]
    cos,  # float32 [max_positions, HALF]
    sin,
    q_norm,  # [2 * HALF], or unused
    k_norm,
    eps,
    stride_qkv,
    stride_block,
    stride_kv,
    stride_kv_head,
    stride_token,
    stride_cos,
    stride_sin,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """BLOCK_H heads of one token. Grid: (T, heads of all kinds / BLOCK_H)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    halves = tl.arange(0, BLOCK_HALF)
    in_half = halves < HALF
    is_q = head < NUM_HEADS
    is_k = (head >= NUM_HEADS) & (head < NUM_HEADS + KV_HEADS)
    is_v = (head >= NUM_HEADS + KV_HEADS) & (head < NUM_HEADS + 2 * KV_HEADS)
    mask = (is_q | is_k | is_v)[:, None] & in_half[None, :]

    first = qkv + token * stride_qkv + head[:, None] * (2 * HALF) + halves[None, :]
    raw1 = tl.load(first, mask=mask, other=0.0)
    raw2 = tl.load(first + HALF, mask=mask, other=0.0)
    x1 = raw1.to(tl.float32)
    x2 = raw2.to(tl.float32)
    kind: tl.constexpr = qkv.dtype.element_ty
    y1 = x1
    y2 = x2
    if Q_NORM:
        n1, n2 = _head_norm(x1, x2, q_norm, halves, in_half, eps, HALF, kind)
        y1 = tl.where(is_q[:, None], n1, y1)
        y2 = tl.where(is_q[:, None], n2, y2)
    if K_NORM:
        n1, n2 = _head_norm(x1, x2, k_norm, halves, in_half, eps, HALF, kind)
        y1 = tl.where(is_k[:, None], n1, y1)
        y2 = tl.where(is_k[:, None], n2, y2)

    position = tl.load(positions + token).to(tl.int64)
    c = tl.load(cos + position * stride_cos + halves, mask=in_half, other=0.0)[None, :]
    s = tl.load(sin + position * stride_sin + halves, mask=in_half, other=0.0)[None, :]
    r1 = (y1 * c - y2 * s).to(kind)
    r2 = (y2 * c + y1 * s).to(kind)
    to_q = is_q[:, None] & in_half[None, :]
    tl.store(first, r1, mask=to_q)
    tl.store(first + HALF, r2, mask=to_q)

    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        kv_head = tl.where(is_v, head - NUM_HEADS - KV_HEADS, head - NUM_HEADS)
        to_kv = (is_k | is_v)[:, None] & in_half[None, :]
        place = (slot // BLOCK_TOKENS) * stride_block + (slot % BLOCK_TOKENS) * stride_token
        which = tl.where(is_v, 1, 0).to(tl.int64) * stride_kv
        cells = kv + place + (which + kv_head.to(tl.int64) * stride_kv_head)[:, None] + halves[None, :]
        out: tl.constexpr = kv.dtype.element_ty
        tl.store(cells, tl.where(is_v[:, None], raw1, r1).to(out), mask=to_kv)
        tl.store(cells + HALF, tl.where(is_v[:, None], raw2, r2).to(out), mask=to_kv)


@triton.jit
def rope_kernel(
    x,  # [T, heads, 2 * HALF]
    out,  # the same, contiguous
    positions,
    cos,
    sin,
    heads,
    stride_x_token,
    stride_x_head,
    stride_cos,
    stride_sin,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """BLOCK_H heads of one token. Grid: (T, heads / BLOCK_H)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    halves = tl.arange(0, BLOCK_HALF)
    in_half = halves < HALF
    mask = (head < heads)[:, None] & in_half[None, :]
    source = x + token * stride_x_token + head[:, None] * stride_x_head + halves[None, :]
    x1 = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    position = tl.load(positions + token).to(tl.int64)
    c = tl.load(cos + position * stride_cos + halves, mask=in_half, other=0.0)[None, :]
    s = tl.load(sin + position * stride_sin + halves, mask=in_half, other=0.0)[None, :]
    target = out + (token * heads + head[:, None]) * (2 * HALF) + halves[None, :]
    kind: tl.constexpr = out.dtype.element_ty
    tl.store(target, (x1 * c - x2 * s).to(kind), mask=mask)
    tl.store(target + HALF, (x2 * c + x1 * s).to(kind), mask=mask)


@triton.jit
def write_kv_kernel(
    k,  # [T, KV_HEADS, HEAD_DIM]
    v,  # the same shape
    kv,  # [num_blocks, 2, KV_HEADS, BLOCK_TOKENS, HEAD_DIM]
    slots,  # int64 [T]
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_block,
    stride_kv,
    stride_kv_head,
    stride_token,
    KV_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_H heads of one token. Grid: (T, KV_HEADS / BLOCK_H)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    mask = (head < KV_HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
    place = (slot // BLOCK_TOKENS) * stride_block + (slot % BLOCK_TOKENS) * stride_token
    cells = kv + place + (head.to(tl.int64) * stride_kv_head)[:, None] + dims[None, :]
    keys = tl.load(k + token * stride_k_token + head[:, None] * stride_k_head + dims[None, :], mask=mask)
    values = tl.load(v + token * stride_v_token + head[:, None] * stride_v_head + dims[None, :], mask=mask)
    tl.store(cells, keys.to(kv.dtype.element_ty), mask=mask)
    tl.store(cells + stride_kv, values.to(kv.dtype.element_ty), mask=mask)


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """See reference.rope."""
    tokens, heads, head_dim = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    out = torch.empty((tokens, heads, head_dim), dtype=x.dtype, device=x.device)
    if out.numel():
        block_half, block_h = _tile(heads, head_dim)
        rope_kernel[(tokens, triton.cdiv(heads, block_h))](
            x,
            out,
            positions,
            cos,
            sin,
            heads,
            x.stride(0),
            x.stride(1),
            cos.stride(0),
            sin.stride(0),
            HALF=head_dim // 2,
            BLOCK_H=block_h,
            BLOCK_HALF=block_half,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


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
    """See reference.rope_and_write_kv. The q it returns is a view of qkv, rotated in place."""
    _, _, kv_heads, block_tokens, head_dim = kv.shape
    heads = num_heads + 2 * kv_heads
    tokens = qkv.shape[0]
    if qkv.stride(1) != 1 or kv.stride(4) != 1:
        raise ValueError("qkv's rows and kv's heads must be contiguous; their other strides are free")
    if tokens:
        block_half, block_h = _tile(heads, head_dim)
        rope_and_write_kv_kernel[(tokens, triton.cdiv(heads, block_h))](
            qkv,
            kv,
            slots,
            positions,
            cos,
            sin,
            qkv if q_norm is None else q_norm,
            qkv if k_norm is None else k_norm,
            eps,
            qkv.stride(0),
            kv.stride(0),
            kv.stride(1),
            kv.stride(2),
            kv.stride(3),
            cos.stride(0),
            sin.stride(0),
            NUM_HEADS=num_heads,
            KV_HEADS=kv_heads,
            HALF=head_dim // 2,
            BLOCK_TOKENS=block_tokens,
            Q_NORM=q_norm is not None,
            K_NORM=k_norm is not None,
            BLOCK_H=block_h,
            BLOCK_HALF=block_half,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return qkv.view(tokens, heads, head_dim)[:, :num_heads]


def write_kv(k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> None:
    """See reference.write_kv."""
    _, _, kv_heads, block_tokens, head_dim = kv.shape
    tokens = slots.shape[0]
    if kv.stride(4) != 1:
        raise ValueError("kv must be contiguous along head_dim; its other strides are free")
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    if tokens:
        block_half, block_h = _tile(kv_heads, head_dim)
        write_kv_kernel[(tokens, triton.cdiv(kv_heads, block_h))](
            k,
            v,
            kv,
            slots,
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            kv.stride(0),
            kv.stride(1),
            kv.stride(2),
            kv.stride(3),
            KV_HEADS=kv_heads,
            BLOCK_TOKENS=block_tokens,
            HEAD_DIM=head_dim,
            BLOCK_H=block_h,
            BLOCK_D=2 * block_half,
            num_warps=4,
            enable_fp_fusion=True,
        )


def _tile(heads: int, head_dim: int) -> tuple[int, int]:
    """(padded half of head_dim, heads per program), both powers of two."""
    block_half = triton.next_power_of_2(head_dim // 2)
    return block_half, min(triton.next_power_of_2(heads), max(1, PROGRAM_ELEMENTS // (2 * block_half)))
