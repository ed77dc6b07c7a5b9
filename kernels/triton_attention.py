# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,misc"
"""Attention over paged KV in Triton: decode, prefill chunks, and the exact merge of their parts.

One program computes a tile of rows that read the same KV head. The rows are queries x the heads of one
group: packed in this way, each block is read once for the whole group, and there are enough rows for tensor
cores (on CUDA cores a group's decode stays below half of the bandwidth: FlashInfer). The program iterates
over its keys with the online softmax of FlashAttention (arXiv 2205.14135), in tiles whose size is
independent of the block size.

The keys of a tile of rows can be cut into splits that run in parallel (Flash-Decoding) and are merged
exactly by their (unnormalised output, maximum, sum). The grid depends only on the number of sequences, rows
and heads; lengths are read on the device, and a split with no keys stores an empty part. Therefore one
captured CUDA graph serves every step of its batch size. The splits' scratch memory belongs to the graph's
memory pool. ("The Anatomy of a Triton Attention Kernel", arXiv 2511.11581: static grid, group packing,
specialisation by a small table where run-time autotuning was slower.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch import PagedBatch
from .triton_device import Device, device_of, dot_type

__all__ = ["merge_partials", "paged_attention", "paged_attention_partial"]

LOG2_E = math.log2(math.e)
MIN_SPLIT_TOKENS = 256  # with fewer keys, starting a split and writing its scratch costs more than it saves
MAX_SPLITS = 64

Parts = tuple[Tensor, Tensor, Tensor]


# ── The decision table ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Plan:
    """One specialisation of the attention kernel: its tile sizes and the number of splits of the keys."""

    block_m: int  # rows of a program: queries x packed heads
    block_n: int  # keys of a tile; a power of two that divides MIN_SPLIT_TOKENS
    num_warps: int
    num_stages: int
    splits: int  # a power of two

    def packing(self, group: int) -> tuple[int, int]:
        """(heads packed into one program, programs needed for one group of heads)."""
        tiles = -(-group // self.block_m)
        return -(-group // tiles), tiles


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << max(0, number - 1).bit_length()


def _padded(head_dim: int) -> int:
    """``head_dim`` padded to a power of two of at least 16, the least that a tensor core multiplies."""
    return max(16, _power_of_two(head_dim))


def _fitted(plan: Plan, row_bytes: int, device: Device) -> Plan:
    """The plan, with fewer keys per tile if its tiles would not fit into shared memory."""
    # From 64 rows on, warp-group products read K and V from shared memory, which takes one more buffer.
    buffers = plan.num_stages // 2 + (plan.block_m >= 64)
    while plan.block_n > 16:
        tiles = (buffers * 2 * plan.block_n + plan.block_m) * row_bytes + 4 * plan.block_m * plan.block_n
        if tiles <= device.shared_memory:
            break
        plan = replace(plan, block_n=plan.block_n // 2)
    return plan


def decode_plan(
    sequences: int, kv_heads: int, group: int, head_dim: int, itemsize: int, device: Device
) -> Plan:
    """The plan for sequences with one query row each, whose speed is limited by reading KV.

    Rows: 16, the least that a tensor core takes, or the group (vLLM's unified kernel). Keys: 16 or 32 KiB
    of K and V per tile (SGLang: 64 keys, 32 when grouped; vLLM on wide heads: more warps, fewer keys in
    flight). Stages: block ids are loaded one step before the keys that they locate, so only every second
    pipeline stage holds a buffer of K and V; two or three buffers keep enough bytes in flight when few
    programs share a multiprocessor. Splits: enough programs for several waves over the device, and never
    fewer than 4: otherwise one long sequence among many short ones would run alone at the end (vLLM falls to
    half its speed there).
    """
    row_bytes = _padded(head_dim) * itemsize
    block_m = 16 if itemsize == 4 else min(64, max(16, _power_of_two(group)))
    block_n = min(64, max(16, 16384 // row_bytes))
    stages = 3 if itemsize == 4 else 7 if row_bytes <= 128 else 5
    plan = _fitted(Plan(block_m, block_n, 8 if row_bytes > 256 else 4, stages, 1), row_bytes, device)
    programs = sequences * kv_heads * plan.packing(group)[1]
    wanted = _power_of_two(-(-4 * device.multiprocessors // max(1, programs)))
    return replace(plan, splits=min(MAX_SPLITS, max(4, wanted)))


def prefill_plan(
    tokens: int, sequences: int, kv_heads: int, group: int, head_dim: int, itemsize: int, device: Device
) -> Plan:
    """The plan for any number of query rows per sequence, limited by multiplication unless rows are few.

    Rows and keys: 128 x 64 with 8 warps up to head dim 128, 64 x 64 above (SGLang on Hopper). Fewer rows if
    the mean sequence has fewer, or if large tiles would make too few programs to fill the device ("Anatomy":
    64 for long queries, 16 for short ones). float32 is multiplied without tensor cores and takes smaller
    tiles, because the larger ones would spill registers. Splits: only if the rows alone would leave
    multiprocessors idle, for example a short chunk after a long cached prefix (vLLM without splits: 40 times
    slower on 2 to 8 rows).
    """
    block_d = _padded(head_dim)
    rows = -(-tokens // max(1, sequences)) * group
    if itemsize == 4:
        plan = Plan(32 if block_d <= 64 else 16, 32 if block_d <= 128 else 16, 8, 3, 1)
    elif rows <= 32:
        plan = Plan(16, 64, 4, 5, 1) if block_d <= 128 else Plan(16, 32, 8, 5, 1)
    elif block_d > 128:
        plan = Plan(64, 64, 8, 3, 1)
    elif tokens * group * kv_heads >= 2 * 128 * device.multiprocessors:
        plan = Plan(128, 64, 8, 3, 1)
    else:
        plan = Plan(64, 64, 4, 3, 1)
    plan = _fitted(plan, block_d * itemsize, device)
    packed, head_tiles = plan.packing(group)
    programs = (tokens // (plan.block_m // packed) + sequences) * kv_heads * head_tiles
    idle = 2 * device.multiprocessors // max(1, programs)
    return replace(plan, splits=min(32, _power_of_two(idle + 1) // 2) if idle > 1 else 1)


# ── Kernels ───────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _walk(
    accumulator,
    row_max,
    row_sum,
    q,
    kv,
    table,
    begin,
    end,
    last_visible,
    scale,
    stride_block,
    stride_kv,
    stride_token,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DOT: tl.constexpr,
):
    """Add keys ``begin`` to ``end`` of one KV head to the running softmax of a tile of rows."""
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        tokens = start + columns
        if BLOCK_TOKENS % BLOCK_N == 0:  # tiles start on multiples of BLOCK_N, so a tile lies in one block
            block = tl.load(table + start // BLOCK_TOKENS).to(tl.int64)
            offsets = block * stride_block + (tokens % BLOCK_TOKENS) * stride_token
        else:
            if MASKED:
                block = tl.load(table + tokens // BLOCK_TOKENS, mask=tokens < end, other=0)
            else:
                block = tl.load(table + tokens // BLOCK_TOKENS)
            offsets = block.to(tl.int64) * stride_block + (tokens % BLOCK_TOKENS) * stride_token
        keys = kv + offsets[:, None] + dims[None, :]
        values = keys + stride_kv
        if MASKED:
            present = (tokens < end)[:, None] & (dims < HEAD_DIM)[None, :]
            k = tl.load(keys, mask=present, other=0.0)
            v = tl.load(values, mask=present, other=0.0)
        elif HEAD_DIM != BLOCK_D:
            k = tl.load(keys, mask=(dims < HEAD_DIM)[None, :], other=0.0)
            v = tl.load(values, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        else:
            k = tl.load(keys)
            v = tl.load(values)
        scores = tl.dot(q, tl.trans(k.to(DOT)), input_precision="ieee") * scale
        if MASKED:
            visible = (tokens[None, :] <= last_visible[:, None]) & (tokens < end)[None, :]
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        # A row that has seen no key yet has maximum -inf; anchor 0 avoids -inf minus -inf, which is NaN.
        anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(scores - anchor[:, None])
        shrink = tl.exp2(row_max - anchor)
        row_sum = row_sum * shrink + tl.sum(p, axis=1)
        accumulator = accumulator * shrink[:, None]
        accumulator = tl.dot(p.to(DOT), v.to(DOT), accumulator, input_precision="ieee")
        row_max = new_max
    return accumulator, row_max, row_sum


@triton.jit
def _store(
    out,
    out_max,
    out_sum,
    accumulator,
    row_max,
    row_sum,
    indices,
    is_row,
    max_unit,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """Store the output rows [M]: divided by their sums, or unnormalised together with maximum and sum."""
    dims = tl.arange(0, BLOCK_D)
    if NORMALISE:
        accumulator = accumulator / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    else:
        tl.store(out_max + indices, row_max * max_unit, mask=is_row)
        tl.store(out_sum + indices, row_sum, mask=is_row)
    places = out + indices[:, None] * HEAD_DIM + dims[None, :]
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(places, accumulator.to(out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["tokens", "first_sequence", "last_sequence"],
    do_not_specialize_on_alignment=["rows", "query_starts", "context_lens"],
)
def attention_kernel(
    q,  # [tokens, heads, HEAD_DIM]
    kv,  # [num_blocks, 2, kv_heads, BLOCK_TOKENS, HEAD_DIM]
    block_tables,  # int32 [max_rows, max_blocks_per_row]
    rows,  # int32 [num_sequences]
    query_starts,  # int32 [num_sequences + 1]
    context_lens,  # int32 [num_sequences]
    out,  # [tokens, heads, splits, HEAD_DIM]
    out_max,  # float32 [tokens, heads, splits]: maximum of the base-2 scores, times max_unit
    out_sum,  # float32 [tokens, heads, splits]
    scale,  # the scale of scores times log2(e), since the kernel uses exp2
    max_unit,
    tokens,
    first_sequence,  # this launch serves the sequences from here
    last_sequence,  # to here, exclusive; another launch serves the others
    stride_q_token,
    stride_q_head,
    stride_block,
    stride_kv,
    stride_kv_head,
    stride_token,
    stride_table,
    DECODE: tl.constexpr,  # at most one query row per sequence; program i serves sequence first_sequence + i
    CAUSAL: tl.constexpr,
    NORMALISE: tl.constexpr,
    TAIL: tl.constexpr,  # this launch also zeroes the padding rows after the last sequence
    MIN_SPLIT: tl.constexpr,
    GROUP: tl.constexpr,  # heads that share a KV head
    PACKED: tl.constexpr,  # how many of these heads one program handles
    HEAD_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DOT: tl.constexpr,
):
    """Attention of a tile of one sequence's rows over one split of their keys.

    Grid: (x, KV heads x head tiles, splits), where x is the number of sequences for decodes, else
    tokens // queries per tile + sequences.
    """
    QUERIES: tl.constexpr = 1 if DECODE else BLOCK_M // PACKED
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    kv_head = tl.program_id(1) // HEAD_TILES
    dims = tl.arange(0, BLOCK_D)

    lane = tl.arange(0, BLOCK_M)
    lane_query = lane // PACKED
    group_head = (tl.program_id(1) % HEAD_TILES) * PACKED + lane % PACKED
    head = kv_head * GROUP + group_head
    heads = tl.num_programs(1) // HEAD_TILES * GROUP
    is_lane = (lane_query < QUERIES) & (group_head < GROUP)

    accumulator = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)

    if TAIL:
        covered = tl.load(query_starts + last_sequence)
        for row in range(covered + tl.program_id(0), tokens, tl.num_programs(0)):
            indices = ((lane * 0 + row).to(tl.int64) * heads + head) * splits + split
            is_row = is_lane & (lane_query == 0)
            _store(
                out, out_max, out_sum, accumulator, row_max, row_sum, indices, is_row, max_unit,
                BLOCK_D, HEAD_DIM, NORMALISE,
            )  # fmt: skip

    if DECODE:
        sequence = first_sequence + tl.program_id(0)
        first_query = 0
    else:
        # A sequence's first tile is (query rows before it) // QUERIES + (sequences before it). Binary search
        # in query_starts finds the sequence of a tile without reading lengths on the host. Some sequences get
        # a tile too many, which returns below. The last tiles go first, because they have the most keys.
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        origin = tl.load(query_starts + first_sequence)
        low = first_sequence
        high = last_sequence
        while high - low > 1:
            middle = (low + high) // 2
            if (tl.load(query_starts + middle) - origin) // QUERIES + middle - first_sequence <= tile:
                low = middle
            else:
                high = middle
        sequence = low
        first_tile = (tl.load(query_starts + sequence) - origin) // QUERIES + sequence - first_sequence
        first_query = (tile - first_tile) * QUERIES
    query_begin = tl.load(query_starts + sequence)
    queries = tl.load(query_starts + sequence + 1) - query_begin
    if first_query >= queries:
        return

    context = tl.load(context_lens + sequence)
    query = first_query + lane_query
    is_row = is_lane & (query < queries)
    row = (query_begin + query).to(tl.int64)
    if CAUSAL:
        last_visible = context - queries + query
        visible_to_all = context - queries + first_query + 1
        visible = tl.minimum(context, visible_to_all + QUERIES - 1)
    else:
        last_visible = context + lane * 0
        visible_to_all = context
        visible = context
    share = (visible + splits * BLOCK_N - 1) // (splits * BLOCK_N) * BLOCK_N
    share = tl.maximum(share, MIN_SPLIT)
    begin = split * share
    end = tl.minimum(visible, begin + share)

    indices = (row * heads + head) * splits + split
    if begin >= end:  # no keys: a maximum of -inf makes the merge skip this split
        _store(
            out, out_max, out_sum, accumulator, row_max, row_sum, indices, is_row, max_unit,
            BLOCK_D, HEAD_DIM, NORMALISE,
        )  # fmt: skip
        return

    q_places = q + row[:, None] * stride_q_token + head[:, None] * stride_q_head + dims[None, :]
    q_tile = tl.load(q_places, mask=is_row[:, None] & (dims < HEAD_DIM)[None, :], other=0.0).to(DOT)
    head_kv = kv + kv_head.to(tl.int64) * stride_kv_head
    table = block_tables + tl.load(rows + sequence).to(tl.int64) * stride_table
    masked_from = begin
    # Keys that all rows see need no mask. A decode has few tiles of keys, and one masked loop over them is
    # faster than two pipelined loops.
    if not DECODE:
        masked_from = tl.maximum(begin, tl.minimum(visible_to_all, end) // BLOCK_N * BLOCK_N)
        accumulator, row_max, row_sum = _walk(
            accumulator, row_max, row_sum, q_tile, head_kv, table, begin, masked_from, last_visible, scale,
            stride_block, stride_kv, stride_token, False, BLOCK_N, BLOCK_D, BLOCK_TOKENS, HEAD_DIM, DOT,
        )  # fmt: skip
    accumulator, row_max, row_sum = _walk(
        accumulator, row_max, row_sum, q_tile, head_kv, table, masked_from, end, last_visible, scale,
        stride_block, stride_kv, stride_token, True, BLOCK_N, BLOCK_D, BLOCK_TOKENS, HEAD_DIM, DOT,
    )  # fmt: skip
    _store(
        out, out_max, out_sum, accumulator, row_max, row_sum, indices, is_row, max_unit,
        BLOCK_D, HEAD_DIM, NORMALISE,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["first_sequence", "last_sequence"], do_not_specialize_on_alignment=["query_starts"]
)
def merge_splits_kernel(
    parts,  # float32 [tokens, heads, SPLITS, HEAD_DIM]
    part_max,  # float32 [tokens, heads, SPLITS], of base-2 scores; -inf where a split has no key
    part_sum,  # float32 [tokens, heads, SPLITS]
    query_starts,
    out,  # [tokens, heads, HEAD_DIM]
    out_max,  # float32 [tokens, heads]
    out_sum,  # float32 [tokens, heads]
    max_unit,
    first_sequence,  # this launch merges the rows of the sequences from here
    last_sequence,  # to here, exclusive; with TAIL also all rows after them
    NORMALISE: tl.constexpr,
    TAIL: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Merge one row's splits exactly. Grid: (tokens, heads)."""
    row = tl.program_id(0)
    if row < tl.load(query_starts + first_sequence):
        return
    if not TAIL:  # noqa: SIM102  Triton does not allow a load after `and`
        if row >= tl.load(query_starts + last_sequence):
            return
    index = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    splits = tl.arange(0, SPLITS)
    row_max = tl.max(tl.load(part_max + index * SPLITS + splits), axis=0)
    anchor = tl.where(row_max == float("-inf"), 0.0, row_max)
    dims = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    row_sum = 0.0
    for start in tl.static_range(0, SPLITS, CHUNK):
        some = index * SPLITS + start + tl.arange(0, CHUNK)
        some_max = tl.load(part_max + some)
        weight = tl.exp2(some_max - anchor)
        written = some_max > float("-inf")
        mask = written[:, None] & (dims < HEAD_DIM)[None, :]
        part = tl.load(parts + some[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        total += tl.sum(part * weight[:, None], axis=0)
        row_sum += tl.sum(tl.load(part_sum + some) * weight, axis=0)
    if NORMALISE:
        total = total / tl.where(row_sum == 0.0, 1.0, row_sum)
    else:
        tl.store(out_max + index, row_max * max_unit)
        tl.store(out_sum + index, row_sum)
    tl.store(out + index * HEAD_DIM + dims, total.to(out.dtype.element_ty), mask=dims < HEAD_DIM)


@triton.jit(do_not_specialize=["num_rows"])
def merge_pair_kernel(
    a,  # float32 [num_rows, HEAD_DIM]; b has the same shapes
    a_max,  # float32 [num_rows]
    a_sum,
    b,
    b_max,
    b_sum,
    out,  # [num_rows, HEAD_DIM]
    out_max,  # float32 [num_rows]
    out_sum,
    num_rows,
    NORMALISE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Merge two partial attentions over disjoint keys exactly. Grid: (num_rows / BLOCK_R)."""
    index = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = index < num_rows
    dims = tl.arange(0, BLOCK_D)
    places = index[:, None] * HEAD_DIM + dims[None, :]
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    max_a = tl.load(a_max + index, mask=is_row, other=float("-inf"))
    max_b = tl.load(b_max + index, mask=is_row, other=float("-inf"))
    row_max = tl.maximum(max_a, max_b)
    anchor = tl.where(row_max == float("-inf"), 0.0, row_max)
    weight_a = tl.exp(max_a - anchor)
    weight_b = tl.exp(max_b - anchor)
    total = tl.load(a + places, mask=mask, other=0.0) * weight_a[:, None]
    total += tl.load(b + places, mask=mask, other=0.0) * weight_b[:, None]
    row_sum = tl.load(a_sum + index, mask=is_row, other=0.0) * weight_a
    row_sum += tl.load(b_sum + index, mask=is_row, other=0.0) * weight_b
    if NORMALISE:
        total = total / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    else:
        tl.store(out_max + index, row_max, mask=is_row)
        tl.store(out_sum + index, row_sum, mask=is_row)
    tl.store(out + places, total.to(out.dtype.element_ty), mask=mask)


# ── Launches ──────────────────────────────────────────────────────────────────────────────────────


def paged_attention(q: Tensor, kv: Tensor, batch: PagedBatch, *, scale: float) -> Tensor:
    """See reference.paged_attention. One launch computes the decodes, another the other sequences."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _attend(q, kv, batch, scale, True, (out, out, out), normalise=True)
    return out


def paged_attention_partial(
    q: Tensor, kv: Tensor, batch: PagedBatch, *, scale: float, causal: bool = True
) -> Parts:
    """See reference.paged_attention_partial."""
    parts = _empty_parts(q.shape[:2], q.shape[2], q.device)
    _attend(q, kv, batch, scale, causal, parts, normalise=False)
    return parts


def merge_partials(parts: list[Parts], dtype: torch.dtype) -> Tensor:
    """See reference.merge_partials. One launch merges two parts, for example a local and a remote one."""
    merged = parts[0]
    others = parts[1:] or [parts[0]]  # a single part is merged with itself, which only divides it by its sum
    shape = merged[0].shape
    rows, head_dim = math.prod(shape[:-1]), shape[-1]
    result = torch.empty(shape, dtype=dtype, device=merged[0].device)
    for number, part in enumerate(others if rows else [], 1):
        last = number == len(others)
        target = (result, result, result) if last else _empty_parts(shape[:-1], head_dim, result.device)
        block_d = _padded(head_dim)
        block_r = max(1, 1024 // block_d)
        merge_pair_kernel[(triton.cdiv(rows, block_r),)](
            *(x.contiguous() for x in merged),
            *(x.contiguous() for x in part),
            *target,
            rows,
            NORMALISE=last,
            BLOCK_R=block_r,
            BLOCK_D=block_d,
            HEAD_DIM=head_dim,
            num_warps=4,
            enable_fp_fusion=True,
        )
        merged = target
    return result


def _empty_parts(rows: torch.Size | tuple[int, ...], head_dim: int, device: torch.device) -> Parts:
    return (
        torch.empty((*rows, head_dim), dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
    )


def _attend(
    q: Tensor, kv: Tensor, batch: PagedBatch, scale: float, causal: bool, out: Parts, *, normalise: bool
) -> None:
    """Write attention to ``out``: one launch for the decodes, one for the others; each merges its splits."""
    tokens, heads, head_dim = q.shape
    sequences, kv_heads = batch.rows.shape[0], kv.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads: use a multiple of them")
    if q.stride(2) != 1 or kv.stride(4) != 1:
        raise ValueError("q and kv must be contiguous along head_dim; their other strides are free")
    if not tokens or not sequences:
        for x, fill in zip(out, (0.0, -math.inf, 0.0), strict=True):
            x.fill_(0.0 if normalise else fill)
        return
    device, decodes = device_of(q.device), batch.num_decodes
    shape = kv_heads, heads // kv_heads, head_dim, max(q.element_size(), kv.element_size())
    if decodes:
        plan = decode_plan(decodes, *shape, device)
        launch_attention(q, kv, batch, scale, causal, out, normalise, plan, 0, decodes)
    if decodes < sequences:
        plan = prefill_plan(tokens, sequences - decodes, *shape, device)
        launch_attention(q, kv, batch, scale, causal, out, normalise, plan, decodes, sequences)


def launch_attention(
    q: Tensor,
    kv: Tensor,
    batch: PagedBatch,
    scale: float,
    causal: bool,
    out: Parts,
    normalise: bool,
    plan: Plan,
    first: int,
    last: int,
    min_split: int = MIN_SPLIT_TOKENS,
) -> None:
    """Compute the sequences ``first`` to ``last`` (exclusive) with one plan.

    They are either all decodes (0 to num_decodes) or all others (num_decodes to the number of sequences).
    The launch that ends at the number of sequences also zeroes the padding rows after them.
    """
    tokens, heads, head_dim = q.shape
    _, _, kv_heads, block_tokens, _ = kv.shape
    sequences = batch.rows.shape[0]
    group = heads // kv_heads
    packed, head_tiles = plan.packing(group)
    decode, tail = last == batch.num_decodes, last == sequences
    tiles = last - first if decode else tokens // (plan.block_m // packed) + last - first
    rows = tokens if tail else min(tokens, last)  # without tail all are decodes, with at most one row each
    split = plan.splits > 1
    target = _empty_parts((rows, heads, plan.splits), head_dim, q.device) if split else out
    block_d = _padded(head_dim)
    attention_kernel[(tiles, kv_heads * head_tiles, plan.splits)](
        q,
        kv,
        batch.block_tables,
        batch.rows,
        batch.query_starts,
        batch.context_lens,
        *target,
        scale * LOG2_E,
        1.0 if split else 1.0 / LOG2_E,
        tokens,
        first,
        last,
        q.stride(0),
        q.stride(1),
        kv.stride(0),
        kv.stride(1),
        kv.stride(2),
        kv.stride(3),
        batch.block_tables.stride(0),
        DECODE=decode,
        CAUSAL=causal,
        NORMALISE=normalise and not split,
        TAIL=tail,
        MIN_SPLIT=min_split,
        GROUP=group,
        PACKED=packed,
        HEAD_TILES=head_tiles,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        BLOCK_D=block_d,
        BLOCK_TOKENS=block_tokens,
        HEAD_DIM=head_dim,
        DOT=dot_type(q, kv),
        num_warps=plan.num_warps,
        enable_fp_fusion=True,
        num_stages=plan.num_stages,
    )
    if split:
        merge_splits_kernel[(rows, heads)](
            *target,
            batch.query_starts,
            *out,
            1.0 / LOG2_E,
            first,
            last,
            NORMALISE=normalise,
            TAIL=tail,
            SPLITS=plan.splits,
            CHUNK=min(16, plan.splits),
            BLOCK_D=block_d,
            HEAD_DIM=head_dim,
            num_warps=4 if block_d > 64 else 2,
            enable_fp_fusion=True,
        )
