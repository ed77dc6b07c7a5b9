# mypy: disable-error-code="import-untyped"
"""Paged attention in Triton against its plain-torch meaning: on CUDA, or else in the interpreter.

The pools are poisoned: whatever a sequence must not read is NaN, so a wrong stride, offset or mask shows.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from blockyard.kernels import reference, triton_attention, triton_ops
from blockyard.kernels.batch import PagedBatch
from blockyard.kernels.triton_attention import Plan, launch_attention
from blockyard.kernels.triton_device import Device

from .batches import SHAPES, poisoned, random_batch, random_kv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], check_dtype=False
    )


def case(
    seed: int,
    queries: list[int],
    contexts: list[int],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_tokens: int,
    dtype: torch.dtype,
    shared: bool = False,
    size: float = 1.0,
) -> tuple[Tensor, Tensor, PagedBatch]:
    """Random q (a view inside a wider projection), a poisoned layer, and the batch over it."""
    generator = torch.Generator().manual_seed(seed)
    batch, blocks = random_batch(
        generator, queries, contexts, block_tokens=block_tokens, device=DEVICE, shared=shared
    )
    kv = random_kv(
        generator,
        blocks,
        kv_heads=kv_heads,
        block_tokens=block_tokens,
        head_dim=head_dim,
        dtype=dtype,
        device=DEVICE,
    )
    wide = size * torch.randn(sum(queries), heads + 2, head_dim, generator=generator)
    return wide.to(dtype).to(DEVICE)[:, 1:-1], poisoned(kv, batch), batch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_batches(dtype: torch.dtype, shape: tuple[list[int], list[int]]) -> None:
    for shared in (False, True):
        q, kv, batch = case(
            len(shape[0]),
            *shape,
            heads=6,
            kv_heads=2,
            head_dim=32,
            block_tokens=16,
            dtype=dtype,
            shared=shared,
        )
        actual = triton_ops.paged_attention(q, kv, batch, scale=0.2)
        assert actual.is_contiguous()
        assert actual.dtype == dtype
        close(actual, reference.paged_attention(q.double(), kv, batch, scale=0.2), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 32, 40, 64, 80, 96, 128, 192, 256])
def test_head_dims(dtype: torch.dtype, head_dim: int) -> None:
    shape = [1, 20], [37, 45]
    q, kv, batch = case(
        head_dim, *shape, heads=4, kv_heads=2, head_dim=head_dim, block_tokens=16, dtype=dtype
    )
    scale = head_dim**-0.5
    actual = triton_ops.paged_attention(q, kv, batch, scale=scale)
    close(actual, reference.paged_attention(q.double(), kv, batch, scale=scale), dtype)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "block_tokens"),
    [(3, 3, 8), (9, 3, 16), (14, 2, 24), (9, 3, 32), (14, 2, 64), (71, 1, 16), (130, 1, 8)],
)
def test_block_sizes_and_groups(heads: int, kv_heads: int, block_tokens: int) -> None:
    """Lengths around the edges of blocks and tiles; groups below, at and above the rows of a tile."""
    contexts = [block_tokens - 1, block_tokens, block_tokens + 1, 64, 65, 70]
    shape = [1, 1, 1, 1, 2, 67 if kv_heads > 1 else 3], contexts
    q, kv, batch = case(
        heads,
        *shape,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=32,
        block_tokens=block_tokens,
        dtype=torch.float32,
    )
    actual = triton_ops.paged_attention(q, kv, batch, scale=0.2)
    close(actual, reference.paged_attention(q.double(), kv, batch, scale=0.2), torch.float32)


PLANS = [
    Plan(m, n, 4, 2, splits)
    for m, n, splits in ((16, 16, 1), (16, 64, 2), (16, 32, 8), (64, 16, 2), (64, 64, 1), (64, 32, 8))
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.block_m}x{p.block_n}/{p.splits}")
@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("normalise", [True, False])
def test_any_plan_gives_the_same(plan: Plan, decode: bool, normalise: bool) -> None:
    """Whatever the tiles and however many splits, also more than there are keys, also alone with padding."""
    shape = ([1, 1, 0, 1], [1, 130, 0, 64]) if decode else ([20, 5, 3], [20, 140, 0])
    q, kv, batch = case(9, *shape, heads=7, kv_heads=1, head_dim=32, block_tokens=16, dtype=torch.float32)
    if not decode:
        batch = dataclasses.replace(batch, num_decodes=0)
    tail = torch.cat([q, q[:2]])  # rows that no sequence owns
    expected = reference.paged_attention_partial(tail.double(), kv, batch, scale=0.4)
    out: Any = tuple(torch.full_like(x, math.nan, dtype=torch.float32) for x in expected)
    launch_attention(tail, kv, batch, 0.4, True, out, normalise, plan, 0, len(shape[0]), min_split=64)
    if normalise:
        close(out[0], reference.merge_partials([expected], torch.float64), torch.float32)
    else:
        for a, e in zip(out, expected, strict=True):
            close(a, e, torch.float32)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_partials(causal: bool, dtype: torch.dtype) -> None:
    for shape in SHAPES[2:6]:
        q, kv, batch = case(3, *shape, heads=6, kv_heads=2, head_dim=32, block_tokens=16, dtype=dtype)
        expected = reference.paged_attention_partial(q.double(), kv, batch, scale=0.3, causal=causal)
        actual = triton_ops.paged_attention_partial(q, kv, batch, scale=0.3, causal=causal)
        close(actual[1], expected[1], dtype)
        close(actual[2], expected[2], dtype)
        close(actual[0], expected[0], dtype)


def test_a_lent_range_and_the_rest_merge_to_the_whole() -> None:
    """The keys of a sequence in three places: the far ranges wholly visible, the near one causal."""
    q, kv, batch = case(4, [4], [166], heads=6, kv_heads=2, head_dim=32, block_tokens=16, dtype=torch.float32)
    table = batch.block_tables[batch.rows.long()]

    def part(first_block: int, last_block: int, length: int, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        piece = dataclasses.replace(
            batch,
            block_tables=table[:, first_block:last_block].contiguous(),
            rows=torch.zeros(1, dtype=torch.int32, device=DEVICE),
            context_lens=torch.tensor([length], dtype=torch.int32, device=DEVICE),
            max_context_len=length,
        )
        out, row_max, row_sum = triton_ops.paged_attention_partial(q, kv, piece, scale=0.3, causal=causal)
        return out, row_max, row_sum

    parts = [part(0, 2, 32, False), part(2, 9, 112, False), part(9, 11, 22, True)]
    whole = reference.paged_attention(q.double(), kv, batch, scale=0.3)
    close(triton_ops.merge_partials(parts, torch.float32), whole, torch.float32)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_partials(count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(count)
    parts = []
    for index in range(count):
        out, row_sum = torch.randn(5, 3, 80, generator=generator), torch.rand(5, 3, generator=generator) + 0.1
        row_max = 100 * torch.randn(5, 3, generator=generator)
        for row in (0, index + 1):  # row 0 is empty in all of them
            out[row], row_max[row], row_sum[row] = 0, -math.inf, 0
        parts.append((out.to(DEVICE), row_max.to(DEVICE), row_sum.to(DEVICE)))
    if count == 3:
        parts.append(parts[2])  # the very same tensors twice are two parts
    close(triton_ops.merge_partials(parts, dtype), reference.merge_partials(parts, dtype), dtype)


@pytest.mark.parametrize("size", [1e-30, 1e4, -1e4])
def test_scores_of_any_size(size: float) -> None:
    shape = [1, 9], [300, 60]
    q, kv, batch = case(
        5, *shape, heads=4, kv_heads=2, head_dim=32, block_tokens=16, dtype=torch.float32, size=size
    )
    actual = triton_ops.paged_attention(q, kv, batch, scale=1.0)
    assert actual.isfinite().all()
    close(actual, reference.paged_attention(q.double(), kv, batch, scale=1.0), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_scores_hugely_negative(dtype: torch.dtype) -> None:
    """Softmax does not change when all scores are shifted; a finite stand-in for -inf would hide the keys."""
    q, kv, batch = case(6, [1, 3], [290, 20], heads=2, kv_heads=1, head_dim=32, block_tokens=16, dtype=dtype)
    q = torch.full_like(q, -200.0)
    kv[:, 0] = kv[:, 0].abs() * 0 + 150.0  # NaN stays NaN
    actual = triton_ops.paged_attention(q, kv, batch, scale=1.0)
    close(actual, reference.paged_attention(q.double(), kv, batch, scale=1.0), dtype)


@pytest.mark.parametrize("order", [(1, 0, 2, 3, 4), (0, 2, 1, 3, 4), (0, 1, 3, 2, 4), (3, 2, 1, 0, 4)])
def test_strides_are_honoured(order: tuple[int, ...]) -> None:
    """Any order of the axes in memory, such as one pool a layer, or K and V far apart."""
    shape = [1, 1, 12], [30, 5, 40]
    q, kv, batch = case(7, *shape, heads=6, kv_heads=3, head_dim=32, block_tokens=8, dtype=torch.float32)
    back = [order.index(axis) for axis in range(5)]
    moved = kv.permute(order).contiguous().permute(back)
    assert moved.shape == kv.shape
    assert moved.stride() != kv.stride()
    loose = torch.full((q.shape[0], 2 * q.shape[1], 2, q.shape[2]), math.nan, device=DEVICE)[:, ::2, 1]
    loose.copy_(q)
    actual = triton_ops.paged_attention(loose, moved, batch, scale=0.2)
    close(actual, reference.paged_attention(q.double(), kv, batch, scale=0.2), torch.float32)


def test_types_may_differ() -> None:
    q, kv, batch = case(
        8, [1, 8], [30, 40], heads=4, kv_heads=2, head_dim=32, block_tokens=8, dtype=torch.float16
    )
    actual = triton_ops.paged_attention(q.float(), kv, batch, scale=0.2)
    close(actual, reference.paged_attention(q.double(), kv, batch, scale=0.2), torch.float32)


def test_nothing_to_do_and_wrong_inputs() -> None:
    q, kv, batch = case(8, [1], [3], heads=4, kv_heads=2, head_dim=32, block_tokens=8, dtype=torch.float32)
    none = dataclasses.replace(
        batch,
        rows=batch.rows[:0],
        query_starts=batch.query_starts[:1],
        context_lens=batch.context_lens[:0],
        num_decodes=0,
    )
    assert triton_ops.paged_attention(q[:0], kv, none, scale=1.0).shape == (0, 4, 32)
    assert not triton_ops.paged_attention(q, kv, none, scale=1.0).any()
    for a, e in zip(
        triton_ops.paged_attention_partial(q, kv, none, scale=1.0),
        reference.paged_attention_partial(q.double(), kv, none, scale=1.0),
        strict=True,
    ):
        assert a.dtype == torch.float32 and torch.equal(a, e.float())
    with pytest.raises(ValueError, match="3 query heads cannot share 2 KV heads"):
        triton_ops.paged_attention(q[:, :3], kv, batch, scale=1.0)
    with pytest.raises(ValueError, match="contiguous along head_dim"):
        triton_ops.paged_attention(q[..., ::2], kv[..., ::2], batch, scale=1.0)


class Recorder:
    """Stands before a kernel and notes how it is launched."""

    def __init__(self, kernel: Any, notes: list[Any]) -> None:
        self._kernel, self._notes = kernel, notes

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            shapes = [tuple(x.shape) if isinstance(x, Tensor) else x for x in args]
            self._notes.append((grid, shapes, constants))
            self._kernel[grid](*args, **constants)

        return launch


def test_launches_do_not_depend_on_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph freezes (grids, scratch, scalars) is the same for short and long contexts."""
    notes: list[Any] = []
    for name in ("attention_kernel", "merge_splits_kernel"):
        monkeypatch.setattr(triton_attention, name, Recorder(getattr(triton_attention, name), notes))
    q, kv, batch = case(
        1, [1, 1, 4], [300, 7, 9], heads=4, kv_heads=2, head_dim=32, block_tokens=8, dtype=torch.float32
    )
    frozen = []
    for lengths in ([300, 7, 9], [1, 0, 8], [0, 0, 0]):
        now = dataclasses.replace(
            batch,
            context_lens=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
            max_context_len=max(lengths),
        )
        notes.clear()
        actual = triton_ops.paged_attention(q, kv, now, scale=0.2)
        close(actual, reference.paged_attention(q.double(), kv, now, scale=0.2), torch.float32)
        frozen.append(list(notes))
    assert len(frozen[0]) == 4
    assert frozen[0] == frozen[1] == frozen[2]


def test_plans_fill_small_devices_and_large_ones() -> None:
    """The table's promises: splits where programs are few, tiles that fit, splits that are powers of two."""
    for device, itemsize, head_dim, group in itertools.product(
        (Device(20, 99 * 1024), Device(132, 227 * 1024)), (2, 4), (32, 64, 80, 128, 256), (1, 3, 8, 71)
    ):
        for sequences in (1, 7, 64, 1000):
            plan = triton_attention.decode_plan(sequences, 8, group, head_dim, itemsize, device)
            assert 4 <= plan.splits <= 64
            assert plan.splits.bit_count() == 1
            assert (
                plan.splits == 64
                or plan.splits * sequences * 8 * plan.packing(group)[1] >= 4 * device.multiprocessors
            )
            assert triton_attention.MIN_SPLIT_TOKENS % plan.block_n == 0
            packed, tiles = plan.packing(group)
            assert packed <= plan.block_m
            assert packed * tiles >= group > packed * (tiles - 1)
        plans = [
            triton_attention.prefill_plan(n, 1, 8, group, head_dim, itemsize, device) for n in (2, 64, 9999)
        ]
        assert plans[-1].splits == 1
        assert plans[0].splits >= plans[1].splits
        assert all(plan.splits.bit_count() == 1 and plan.block_m >= 16 for plan in plans)


@pytest.mark.parametrize("block_tokens", [8, 64])
def test_offsets_beyond_32_bits(block_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so far apart that an offset in elements overflows 32 bits; only the touched pages exist."""
    if DEVICE == "cpu":  # the interpreter copies every storage onto itself after a launch
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    far, blocks = 2**30, 4
    heads, head_dim, tokens = 2, 32, 2 * block_tokens
    head = block_tokens * head_dim
    memory = torch.empty(far * (blocks - 1) + 4 * head, dtype=torch.float16, device=DEVICE)
    kv = memory.as_strided((blocks, 2, heads, block_tokens, head_dim), (far, 2 * head, head, head_dim, 1))
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(tokens, heads, head_dim, generator=generator).half().to(DEVICE) for _ in range(2))
    slots = torch.arange(2 * block_tokens, 4 * block_tokens, device=DEVICE).roll(
        block_tokens
    )  # block 3 first
    triton_ops.write_kv(k, v, kv, slots)
    assert torch.equal(kv[[3, 2], 0].transpose(1, 2).flatten(0, 1), k)
    qkv = torch.cat([k, k, v], dim=1).flatten(1)
    table = torch.ones(tokens, head_dim // 2, device=DEVICE)
    q = triton_ops.rope_and_write_kv(
        qkv, kv, slots, torch.arange(tokens, device=DEVICE), table, 0 * table, num_heads=heads
    )
    assert torch.equal(q, k)
    assert torch.equal(kv[[3, 2], 1].transpose(1, 2).flatten(0, 1), v)
    batch = PagedBatch(
        block_tables=torch.tensor([[3, 2]], dtype=torch.int32, device=DEVICE),
        rows=torch.zeros(2, dtype=torch.int32, device=DEVICE),
        query_starts=torch.tensor([0, 1, 16], dtype=torch.int32, device=DEVICE),
        context_lens=torch.tensor([tokens, tokens], dtype=torch.int32, device=DEVICE),
        num_decodes=1,
        max_query_len=15,
        max_context_len=tokens,
    )
    actual = triton_ops.paged_attention(q[:16], kv, batch, scale=0.2)
    close(actual, reference.paged_attention(q[:16].double(), kv, batch, scale=0.2), torch.float16)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a CUDA device")
def test_a_captured_graph_serves_other_lengths() -> None:
    q, kv, batch = case(
        2, [1] * 8, [3000] * 8, heads=8, kv_heads=2, head_dim=128, block_tokens=16, dtype=torch.bfloat16
    )
    triton_ops.paged_attention(q, kv, batch, scale=0.1)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton_ops.paged_attention(q, kv, batch, scale=0.1)
    for lengths in ([1] * 8, [0, 3000, 17, 16, 0, 256, 257, 2999]):
        batch.context_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        close(out, reference.paged_attention(q.double(), kv, batch, scale=0.1), torch.bfloat16)
