# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator,misc"
"""Attention over paged KV in Triton: decode, prefill chunks, and the exact merge of their parts.

One program owns a tile of rows that read the same KV head: queries x the heads of one group, packed, so
that a block is read once for the whole group and the tensor cores have rows to multiply (on CUDA cores a
group's decode stays below half of the bandwidth: FlashInfer). It walks over its keys with the online
softmax of FlashAttention (arXiv 2205.14135), in tiles whose size is independent of the block size.

The keys of a tile of rows can be cut into splits that run in parallel (Flash-Decoding) and are merged
exactly by their (unnormalised output, maximum, sum). The grid depends on the number of sequences, rows and
heads alone; lengths are read on the device, and a split with no keys has nothing to do. So a captured CUDA
graph serves every step of its batch size, and its splits' scratch belongs to the graph's memory pool.
("The Anatomy of a Triton Attention Kernel", arXiv 2511.11581: static grid, group packing, specialisation
by a small table where run-time autotuning was slower.)
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
MIN_SPLIT_TOKENS = 256  # below this, a split's start and its scratch cost more than its keys
MAX_SPLITS = 64

Parts = tuple[Tensor, Tensor, Tensor]


# ── The decision table ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Plan:
    """One specialisation of the attention kernel, and into how many parts it cuts the keys."""

    block_m: int  # rows of a program: queries x packed heads
    block_n: int  # keys of a tile; a power of two that divides MIN_SPLIT_TOKENS
    num_warps: int
    num_stages: int
    splits: int  # a power of two

    def packing(self, group: int) -> tuple[int, int]:
        """Heads packed into one program, and the programs that this makes of a group of heads."""
        tiles = -(-group // self.block_m)
        return -(-group // tiles), tiles


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()


def _padded(head_dim: int) -> int:
    """The width of a tile of heads: a power of two, and what a tensor core takes at the least."""
    return max(16, _power_of_two(head_dim))


def _fitted(plan: Plan, row_bytes: int, device: Device) -> Plan:
    """The plan, with fewer keys a tile where shared memory would not hold its tiles."""
    buffers = plan.num_stages // 2 + (plan.block_m >= 64)  # warp-group products read K and V in place
    while plan.block_n > 16:
        tiles = (buffers * 2 * plan.block_n + plan.block_m) * row_bytes + 4 * plan.block_m * plan.block_n
        if tiles <= device.shared_memory:
            break
        plan = replace(plan, block_n=plan.block_n // 2)
    return plan


def decode_plan(
    sequences: int, kv_heads: int, group: int, head_dim: int, itemsize: int, device: Device
) -> Plan:
    """One query row a sequence: bound by reading KV.

    Rows: 16, the least that a tensor core takes, or the group (vLLM's unified kernel). Keys: 16 or 32 KiB
    of K and V a tile (SGLang: 64 keys, 32 when grouped; vLLM on wide heads: more warps, fewer keys in
    flight). Stages: block ids are fetched a step ahead of the keys they lead to, so every second stage is a
    buffer of K and V; two or three of them keep enough bytes in flight when few programs share a
    multiprocessor. Splits: enough programs for some waves over the device, and never fewer than 4, because
    one long sequence among many short ones would otherwise run alone at the end (vLLM falls to half its
    speed there).
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
    """Any number of query rows a sequence: bound by multiplying, except where there are few of them.

    Rows and keys: 128 x 64 with 8 warps up to head dim 128, 64 x 64 above (SGLang on Hopper); fewer rows
    where the mean sequence brings fewer or the device would not be filled ("Anatomy": 64 for long queries,
    16 for short ones). float32 multiplies without tensor cores, whose tiles would spill its registers.
    Splits: only where the rows alone leave multiprocessors idle, as a short chunk after a long cached
    prefix does (vLLM without them: 40 times slower on 2 to 8 rows).
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
    """Take the keys begin to end of one KV head into the running softmax of a tile of rows."""
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        tokens = start + columns
        if BLOCK_TOKENS % BLOCK_N == 0:  # tiles start on multiples of their size: this one is in one block
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
        # A row that has seen no key yet keeps -inf, and -inf minus -inf is no number.
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
    """Write rows [M] to their places: divided by their sums, or as parts with maximum and sum."""
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
    out_max,  # float32 [tokens, heads, splits], of scores in units of log2 times max_unit
    out_sum,  # float32 [tokens, heads, splits]
    scale,  # of scores, times log2(e)
    max_unit,
    tokens,
    first_sequence,  # those before it are another launch's
    last_sequence,  # and so are those from it on, if there are any
    stride_q_token,
    stride_q_head,
    stride_block,
    stride_kv,
    stride_kv_head,
    stride_token,
    stride_table,
    DECODE: tl.constexpr,  # at most one query row a sequence, sequence = program
    CAUSAL: tl.constexpr,
    NORMALISE: tl.constexpr,
    TAIL: tl.constexpr,  # this launch also zeroes the rows behind the last sequence
    MIN_SPLIT: tl.constexpr,
    GROUP: tl.constexpr,  # heads that share a KV head
    PACKED: tl.constexpr,  # of them in one program
    HEAD_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DOT: tl.constexpr,
):
    """A tile of one sequence's rows times one split of their keys.

    Grid: (sequences of a decode, or tokens // queries of a tile + sequences; KV heads x head tiles; splits).
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
        # Every sequence has a tile more than the whole ones that start in it; the last tiles, which have the
        # most keys, go first.
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
    if begin >= end:  # the merge reads no output where the maximum is -inf
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
    if not DECODE:  # a decode's few tiles are better all masked than pipelined in two loops
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
    part_max,  # float32 [tokens, heads, SPLITS], in units of log2; -inf where a split has no key
    part_sum,  # float32 [tokens, heads, SPLITS]
    query_starts,
    out,  # [tokens, heads, HEAD_DIM]
    out_max,  # float32 [tokens, heads]
    out_sum,  # float32 [tokens, heads]
    max_unit,
    first_sequence,  # rows before this sequence are another launch's
    last_sequence,  # and so are rows from this one on, unless TAIL
    NORMALISE: tl.constexpr,
    TAIL: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """The exact sum of one row's splits. Grid: (tokens, heads)."""
    row = tl.program_id(0)
    if row < tl.load(query_starts + first_sequence):
        return
    if not TAIL:  # noqa: SIM102  a load cannot stand behind `and`
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
    a,  # float32 [num_rows, HEAD_DIM], and so is b
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
    """The sum of two partial attentions over disjoint keys. Grid: (num_rows / BLOCK_R)."""
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
    """See reference.paged_attention: decodes by one launch, the other sequences by another."""
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
    """See reference.merge_partials. Pair by pair: a local and a lent part are one launch."""
    merged = parts[0]
    others = parts[1:] or [parts[0]]  # a single part is only divided: half of it twice
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
    """Write attention into ``out``: one launch for the decodes, one for the others, each with its merge."""
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
    """The sequences first to last by one plan; all are decodes if they start at 0 and end at num_decodes.

    ``last`` is num_decodes or the number of sequences; the rows behind the latter are zeroed too.
    """
    tokens, heads, head_dim = q.shape
    _, _, kv_heads, block_tokens, _ = kv.shape
    sequences = batch.rows.shape[0]
    group = heads // kv_heads
    packed, head_tiles = plan.packing(group)
    decode, tail = last == batch.num_decodes, last == sequences
    tiles = last - first if decode else tokens // (plan.block_m // packed) + last - first
    rows = tokens if tail else min(tokens, last)  # a decode has at most one row
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
