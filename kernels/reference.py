"""Every operation of this floor in plain torch: the definition that all faster implementations are tested
against.

Written to be read, not to be fast. Works on any device. Sums and the parts of attention are in float32.
float64 inputs are computed and returned in float64, so that float32 implementations can be tested against
more exact results.

KV is block-major: the pool is ``[num_blocks, layers, 2, kv_heads, block_tokens, head_dim]`` and an operation
gets one layer of it, ``pool[:, layer]``: ``[num_blocks, 2, kv_heads, block_tokens, head_dim]``, a strided
view. Index 0 of the third axis is K, index 1 is V.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import PagedBatch


def _acc(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis. x [..., D], weight [D] -> [..., D] in x's dtype."""
    x32 = _acc(x)
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return ((x32 * scale).to(x.dtype)) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``residual += x`` in place, then the norm of the residual. x, residual [T, D] -> [T, D]."""
    residual += x
    return rms_norm(residual, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. gate_up [T, 2 * I], gate first -> [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (torch.nn.functional.silu(_acc(gate)).to(gate_up.dtype)) * up


def rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding: rotate the two halves of each head against each other.

    Source: Su et al., RoFormer, in the layout of Llama checkpoints.

    x [T, H, D], positions int [T], cos and sin float32 [max_positions, D / 2] -> [T, H, D].
    """
    c = cos[positions.long()].unsqueeze(1)  # [T, 1, D/2]
    s = sin[positions.long()].unsqueeze(1)
    x1, x2 = _acc(x).chunk(2, dim=-1)
    return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), dim=-1).to(x.dtype)


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
    """Norm (Qwen3's per-head q and k norm, if given) and rotate q and k; write k and v to their slots.

    qkv [T, (num_heads + 2 * kv_heads) * head_dim]; kv: one layer of the pool; slots int64 [T] =
    block * block_tokens + offset, -1 writes nothing (padding). Returns q [T, num_heads, head_dim].
    q may share memory with qkv, and qkv may be overwritten: callers must not read qkv afterwards.
    """
    _, _, kv_heads, _, head_dim = kv.shape
    heads = qkv.view(-1, num_heads + 2 * kv_heads, head_dim)
    q, k, v = heads[:, :num_heads], heads[:, num_heads:-kv_heads], heads[:, -kv_heads:]
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps)
    q = rope(q, cos, sin, positions)
    k = rope(k, cos, sin, positions)
    write_kv(k, v, kv, slots)
    return q


def write_kv(k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> None:
    """Write k and v [T, kv_heads, head_dim] to slots int64 [T] of one layer; -1 writes nothing."""
    block_tokens = kv.shape[3]
    keep = slots >= 0
    block, offset = slots[keep] // block_tokens, slots[keep] % block_tokens
    kv[block, 0, :, offset] = k[keep].to(kv.dtype)
    kv[block, 1, :, offset] = v[keep].to(kv.dtype)


def _gather(kv: Tensor, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """K and V [kv_heads, length, head_dim] of the first ``length`` tokens of one block table."""
    block_tokens = kv.shape[3]
    blocks = table[: -(-length // block_tokens)].long()
    k, v = kv[blocks].unbind(1)  # [blocks, kv_heads, block_tokens, head_dim] each
    k = k.transpose(0, 1).reshape(k.shape[1], -1, k.shape[3])[:, :length]
    v = v.transpose(0, 1).reshape(v.shape[1], -1, v.shape[3])[:, :length]
    return k, v


def paged_attention_partial(
    q: Tensor, kv: Tensor, batch: PagedBatch, *, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention without the final division, so that parts computed elsewhere can be merged exactly.

    q [T, heads, head_dim] (rows may be strided), kv one layer of the pool. Returns unnormalised
    output [T, heads, head_dim], row maximum [T, heads] (of scaled scores) and sum of exponentials
    [T, heads], in float32. Rows of padding, or with no visible key, get (0, -inf, 0).
    With ``causal`` the last query row of a sequence sees all its ``context_lens`` tokens, the row
    before it one less, and so on. Without ``causal`` every row sees all of them: this is for a range of
    KV that another instance holds, where all keys precede all queries.
    Source of the split: DistAttention (Infinite-LLM, arXiv 2401.02669).
    """
    tokens, heads, head_dim = q.shape
    q = _acc(q)
    out = q.new_zeros(tokens, heads, head_dim)
    row_max = q.new_full((tokens, heads), -torch.inf)
    row_sum = q.new_zeros(tokens, heads)
    starts, lens, rows = batch.query_starts.tolist(), batch.context_lens.tolist(), batch.rows.tolist()
    for s, length in enumerate(lens):
        begin, end = starts[s], starts[s + 1]
        if begin == end or length == 0:
            continue
        k, v = _gather(kv, batch.block_tables[rows[s]], length)
        group = heads // k.shape[0]
        k = k.to(q.dtype).repeat_interleave(group, dim=0)  # [heads, length, head_dim]
        v = v.to(q.dtype).repeat_interleave(group, dim=0)
        scores = torch.einsum("thd,hld->htl", q[begin:end], k) * scale
        if causal:
            position = torch.arange(length - (end - begin), length, device=q.device)
            hidden = torch.arange(length, device=q.device)[None, :] > position[:, None]
            scores = scores.masked_fill(hidden, -torch.inf)
        m = scores.amax(-1)  # [heads, queries]
        p = torch.exp(scores - m.clamp_min(torch.finfo(m.dtype).min).unsqueeze(-1))
        out[begin:end] = torch.einsum("htl,hld->thd", p, v)
        row_max[begin:end] = m.T
        row_sum[begin:end] = p.sum(-1).T
    return out, row_max, row_sum


def paged_attention(q: Tensor, kv: Tensor, batch: PagedBatch, *, scale: float) -> Tensor:
    """Causal attention of each sequence's queries over its paged context, for decode and prefill chunks.

    q [T, heads, head_dim] -> [T, heads, head_dim] in q's dtype; rows of padding are 0. PagedAttention
    (arXiv 2309.06180); heads that share a KV head are consecutive.
    """
    out, _, row_sum = paged_attention_partial(q, kv, batch, scale=scale)
    return (out / row_sum.clamp_min(torch.finfo(row_sum.dtype).tiny).unsqueeze(-1)).to(q.dtype)


def merge_partials(parts: list[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """Exact merge of partial attentions over disjoint keys -> [T, heads, head_dim] in ``dtype``."""
    row_max = torch.stack([m for _, m, _ in parts]).amax(0)
    safe_max = row_max.clamp_min(torch.finfo(row_max.dtype).min)
    out = torch.zeros_like(parts[0][0])
    total = torch.zeros_like(parts[0][2])
    for part, m, part_sum in parts:
        weight = torch.exp(m - safe_max)
        out += part * weight.unsqueeze(-1)
        total += part_sum * weight
    return (out / total.clamp_min(torch.finfo(total.dtype).tiny).unsqueeze(-1)).to(dtype)


def copy_blocks(source: Tensor, destination: Tensor, pairs: Tensor) -> None:
    """Copy whole blocks between pools of the same block shape, or within one pool.

    source, destination [num_blocks, ...]; pairs int64 [N, 2] on the CPU, (from, to). The caller must not
    read and write the same block in one call. Used for copy-on-write, swap and defragmentation.
    """
    if pairs.numel():
        read, write = pairs[:, 0], pairs[:, 1]
        destination[write.to(destination.device)] = source[read.to(source.device)].to(destination.device)
