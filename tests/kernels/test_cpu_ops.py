"""The compiled CPU operations against their plain-torch meaning, over ragged and random shapes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from blockyard.kernels import cpu_build, cpu_ops, reference
from blockyard.kernels.batch import PagedBatch

from .batches import SHAPES, random_batch, random_kv

compiled = pytest.mark.skipif(not cpu_build.load(), reason="no C++ compiler here: plain torch is what runs")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4), (8, 1), (14, 2)])
@pytest.mark.parametrize(
    ("head_dim", "block_tokens"), [(64, 16), (32, 8), (80, 16), (128, 32), (256, 64), (40, 8)]
)
def test_paged_attention(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_tokens: int
) -> None:
    generator = torch.Generator().manual_seed(heads * head_dim + block_tokens)
    for queries, contexts in SHAPES:
        for shared in (False, True):
            batch, blocks = random_batch(
                generator, queries, contexts, block_tokens=block_tokens, shared=shared
            )
            kv = random_kv(
                generator,
                blocks,
                kv_heads=kv_heads,
                block_tokens=block_tokens,
                head_dim=head_dim,
                dtype=dtype,
            )
            wide = torch.randn(sum(queries), heads + 2, head_dim, generator=generator).to(dtype)
            q = wide[:, 1:-1]  # a strided view, like q inside qkv
            expected = reference.paged_attention(q, kv, batch, scale=0.2)
            close(cpu_ops.paged_attention(q, kv, batch, scale=0.2), expected, dtype)


@compiled
@pytest.mark.parametrize("threads", [1, 2])
def test_long_sequences_are_cut_along_their_keys_and_merged_exactly(threads: int) -> None:
    generator = torch.Generator().manual_seed(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for queries, contexts in (([1], [5000]), ([3, 1], [2100, 40])):
            batch, blocks = random_batch(generator, queries, contexts, block_tokens=16)
            kv = random_kv(generator, blocks, kv_heads=1, block_tokens=16, head_dim=64, dtype=torch.float32)
            q = 8 * torch.randn(sum(queries), 3, 64, generator=generator)
            expected = reference.paged_attention(q, kv, batch, scale=1.0)
            close(cpu_ops.paged_attention(q, kv, batch, scale=1.0), expected, torch.float32)
    finally:
        torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("causal", [True, False])
def test_partials_merge_to_the_whole(causal: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    for queries, contexts in SHAPES:
        batch, blocks = random_batch(generator, queries, contexts, block_tokens=16)
        kv = random_kv(generator, blocks, kv_heads=3, block_tokens=16, head_dim=64, dtype=torch.float32)
        q = torch.randn(sum(queries), 9, 64, generator=generator)
        expected = reference.paged_attention_partial(q, kv, batch, scale=0.3, causal=causal)
        actual = cpu_ops.paged_attention_partial(q, kv, batch, scale=0.3, causal=causal)
        for a, e in zip(actual, expected, strict=True):
            close(a, e, torch.float32)
    # The keys of one sequence, cut in two: the far part is all visible, the near part causal.
    batch, blocks = random_batch(generator, [4], [70], block_tokens=16)
    kv = random_kv(generator, blocks, kv_heads=3, block_tokens=16, head_dim=64, dtype=torch.float32)
    q = torch.randn(4, 9, 64, generator=generator)
    table = batch.block_tables[batch.rows]

    def part(first_block: int, last_block: int, length: int) -> PagedBatch:
        return PagedBatch(
            block_tables=table[:, first_block:last_block].contiguous(),
            rows=torch.zeros(1, dtype=torch.int32),
            query_starts=batch.query_starts,
            context_lens=torch.tensor([length], dtype=torch.int32),
            num_decodes=0,
            max_query_len=4,
            max_context_len=length,
        )

    far = cpu_ops.paged_attention_partial(q, kv, part(0, 2, 32), scale=0.3, causal=False)
    near = cpu_ops.paged_attention_partial(q, kv, part(2, 5, 38), scale=0.3, causal=True)
    merged = cpu_ops.merge_partials([far, near], torch.float32)
    close(merged, reference.paged_attention(q, kv, batch, scale=0.3), torch.float32)


@compiled
def test_scores_of_any_size_stay_finite() -> None:
    generator = torch.Generator().manual_seed(5)
    batch, blocks = random_batch(generator, [1, 9], [40, 60], block_tokens=16)
    kv = random_kv(generator, blocks, kv_heads=2, block_tokens=16, head_dim=64, dtype=torch.float32)
    for size in (1e-30, 1e4):
        q = size * torch.randn(10, 4, 64, generator=generator)
        actual = cpu_ops.paged_attention(q, kv, batch, scale=1.0)
        assert actual.isfinite().all()
        close(actual, reference.paged_attention(q, kv, batch, scale=1.0), torch.float32)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("tokens", "head_dim"), [(0, 64), (1, 64), (37, 64), (5, 80), (9, 128)])
def test_rope_and_write_kv(dtype: torch.dtype, norms: bool, tokens: int, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(tokens + head_dim)
    heads, kv_heads, block_tokens, blocks = 6, 2, 8, 12
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, generator=generator).to(dtype)
    positions = torch.randint(0, 500, (tokens,), generator=generator)
    slots = torch.randperm(blocks * block_tokens, generator=generator)[:tokens]
    slots[::4] = -1
    angles = torch.rand(500, head_dim // 2, generator=generator) * 6
    weights = [torch.rand(head_dim, generator=generator).to(dtype) if norms else None for _ in range(2)]
    results = []
    for ops in (cpu_ops, reference):
        kv = torch.full((blocks, 3, 2, kv_heads, block_tokens, head_dim), 7.0, dtype=dtype)
        q = ops.rope_and_write_kv(
            qkv.clone(), kv[:, 1], slots, positions, angles.cos(), angles.sin(),
            num_heads=heads, q_norm=weights[0], k_norm=weights[1], eps=1e-5,
        )  # fmt: skip
        results.append((q, kv))
    close(results[0][0], results[1][0], dtype)
    close(results[0][1], results[1][1], dtype)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 576), (1, 576), (70, 576), (3, 40), (200, 7)])
def test_norms_and_swiglu(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    x, residual = (3 * torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    weight = torch.rand(shape[1], generator=generator).to(dtype)
    close(cpu_ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), dtype)
    ours, theirs = residual.clone(), residual.clone()
    close(cpu_ops.add_rms_norm(x, ours, weight, 1e-5), reference.add_rms_norm(x, theirs, weight, 1e-5), dtype)
    close(ours, theirs, dtype)
    wide = 10 * torch.randn(shape[0], 2 * shape[1], generator=generator).to(dtype)
    close(cpu_ops.swiglu(wide), reference.swiglu(wide), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "depth"), [(960, 576), (33, 17), (1, 5), (100, 576), (64, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(dtype: torch.dtype, features: int, depth: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(features)
    weight = (torch.randn(features, depth, generator=generator) / depth**0.5).to(dtype)
    offset = torch.randn(features, generator=generator).to(dtype) if bias else None
    prepared = cpu_ops.prepare_linear(weight, offset)
    for tokens in (0, 1, 2, 5, 11, 12, 13, 24, 64, 241, 300):
        x = torch.randn(tokens, depth + 3, generator=generator).to(dtype)[:, :depth]
        close(cpu_ops.linear(x, prepared), torch.nn.functional.linear(x, weight, offset), dtype)


def test_copy_blocks_within_and_between_pools() -> None:
    generator = torch.Generator().manual_seed(0)
    pool, other = torch.randn(8, 2, 3, generator=generator), torch.randn(4, 2, 3, generator=generator)
    before = pool.clone()
    cpu_ops.copy_blocks(pool, pool, torch.tensor([[0, 5], [3, 6]]))
    assert torch.equal(pool[[5, 6]], before[[0, 3]]) and torch.equal(pool[:5], before[:5])
    cpu_ops.copy_blocks(pool, other, torch.tensor([[7, 0], [1, 3]]))
    assert torch.equal(other[[0, 3]], pool[[7, 1]])
    cpu_ops.copy_blocks(pool, other, torch.empty(0, 2, dtype=torch.int64))


PROBE = """
import torch
from blockyard import kernels
print(kernels.backend(torch.device("cpu")))
w = torch.randn(8, 4)
x = torch.randn(3, 4)
assert torch.allclose(kernels.linear(x, kernels.prepare_linear(w, None)), x @ w.T, atol=1e-5)
assert kernels.rms_norm(x, torch.ones(4), 1e-5).shape == x.shape
"""


@pytest.mark.parametrize(
    ("changes", "warns"),
    [
        ({"BLOCKYARD_CPU_KERNELS": "reference"}, False),
        ({"CXX": "no-such-compiler", "BLOCKYARD_CACHE": "{tmp}"}, True),
    ],
)
def test_plain_torch_serves_where_nothing_can_be_built(
    changes: dict[str, str], warns: bool, tmp_path: object
) -> None:
    environment = {**os.environ, **{k: v.format(tmp=tmp_path) for k, v in changes.items()}}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "plain torch"
    assert ("no C++ compiler 'no-such-compiler'" in done.stderr) == warns
