"""The compiled CPU operations against their plain-torch meaning, over ragged and random shapes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from blockyard.kernels import cpu_build, cpu_ops, reference
from blockyard.kernels.batch import PagedBatch

from .batches import SHAPES, poisoned, random_batch, random_kv

compiled = pytest.mark.skipif(not cpu_build.load(), reason="no C++ compiler here: plain torch is what runs")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The operations compute in float32 whatever their inputs, so 16-bit results are off by their last rounding.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def close(
    actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, atol: float | None = None
) -> None:
    """``expected`` may be in float64."""
    assert actual.dtype in (dtype, torch.float32)
    rtol = TOLERANCE[dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol or rtol, check_dtype=False)


def wide(x: torch.Tensor) -> torch.Tensor:
    """float32 as float64, for references that are more exact than what is tested."""
    return x.double() if x.dtype == torch.float32 else x


@pytest.fixture(params=[1, 2], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_tokens"),
    [
        (9, 3, 64, 16),
        (4, 4, 64, 8),
        (14, 2, 64, 64),
        (8, 1, 32, 32),
        (4, 2, 80, 16),
        (6, 3, 96, 8),
        (8, 2, 128, 16),
        (4, 1, 256, 64),
        (6, 2, 40, 24),
        (6, 3, 8, 16),
        (130, 1, 32, 8),
    ],
)
def test_paged_attention(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_tokens: int
) -> None:
    """Decodes, chunks and mixtures; the pool holds NaN wherever a sequence must not read."""
    generator = torch.Generator().manual_seed(heads * head_dim + block_tokens)
    edges = [block_tokens - 1, block_tokens, block_tokens + 1, 2 * block_tokens, 63, 64, 65]
    shapes = [*SHAPES, ([1] * 7, edges), ([1, 1, 2, 3, 1, 4, 5], edges)]
    for (queries, contexts), shared in itertools.product(shapes, (False, True)):
        batch, blocks = random_batch(generator, queries, contexts, block_tokens=block_tokens, shared=shared)
        kv = random_kv(
            generator, blocks, kv_heads=kv_heads, block_tokens=block_tokens, head_dim=head_dim, dtype=dtype
        )
        q = torch.randn(sum(queries), heads + 2, head_dim, generator=generator).to(dtype)[:, 1:-1]
        expected = reference.paged_attention(q.double(), kv, batch, scale=0.2)
        actual = cpu_ops.paged_attention(q, poisoned(kv, batch), batch, scale=0.2)
        assert actual.dtype == dtype
        close(actual, expected, dtype)


@compiled
@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_shares_a_mixed_batch() -> None:
    generator = torch.Generator().manual_seed(2)
    batch, blocks = random_batch(generator, [1] * 9 + [5, 90], [700, *range(1, 9), 900, 90], block_tokens=16)
    kv = random_kv(generator, blocks, kv_heads=2, block_tokens=16, head_dim=64, dtype=torch.float32)
    q = torch.randn(104, 6, 64, generator=generator)
    expected = reference.paged_attention(q.double(), kv, batch, scale=0.3)
    close(cpu_ops.paged_attention(q, poisoned(kv, batch), batch, scale=0.3), expected, torch.float32)


@compiled
@pytest.mark.parametrize("size", [1, 8])
def test_long_sequences_are_cut_along_their_keys_and_merged_exactly(threads: int, size: float) -> None:
    """As exact as float32 scores allow, however large they are: one is a sum of head_dim rounded terms."""
    generator = torch.Generator().manual_seed(threads)
    for queries, contexts in (([1], [5000]), ([3, 1], [2100, 40]), ([1, 1], [300, 9000])):
        batch, blocks = random_batch(generator, queries, contexts, block_tokens=16)
        kv = random_kv(generator, blocks, kv_heads=1, block_tokens=16, head_dim=64, dtype=torch.float32)
        q = size * torch.randn(sum(queries), 3, 64, generator=generator)
        terms = (q.abs() @ kv[:, 0].flatten(end_dim=-2).abs().T).max().item()
        rounding = 2**-24 * terms * kv[:, 1].abs().max().item()
        expected = reference.paged_attention(q.double(), kv, batch, scale=1.0)
        actual = cpu_ops.paged_attention(q, poisoned(kv, batch), batch, scale=1.0)
        close(actual, expected, torch.float32, atol=2 * rounding)


@compiled
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_tables": [[7, 0]]}, "block 7 in its table; the pool has blocks 0 to 5"),
        ({"block_tables": [[0, -1]]}, "block -1 in its table"),
        ({"rows": [1]}, "row 1 of 1 block tables"),
        ({"rows": [-1]}, "row -1 of 1"),
        ({"context_lens": [33]}, "33 tokens, its table room for 32"),
        ({"context_lens": [-1]}, "-1 tokens"),
        ({"query_starts": [0, 4]}, "from 0 to 4, q has 3 rows"),
        ({"query_starts": [2, 1]}, "query_starts falls at sequence 0"),
        ({"query_starts": [0]}, "do not fit together"),
    ],
)
def test_what_would_be_read_beyond_the_pool_is_refused(changes: dict[str, list[int]], message: str) -> None:
    fields = {"block_tables": [[5, 0]], "rows": [0], "query_starts": [0, 3], "context_lens": [20], **changes}
    tensors = {name: torch.tensor(value, dtype=torch.int32) for name, value in fields.items()}
    batch = PagedBatch(**tensors, num_decodes=0, max_query_len=3, max_context_len=20)
    q, kv = torch.zeros(3, 4, 32), torch.zeros(6, 2, 2, 16, 32)
    with pytest.raises(RuntimeError, match=message):
        cpu_ops.paged_attention(q, kv, batch, scale=1.0)


@compiled
def test_tensors_that_do_not_fit_are_refused() -> None:
    batch, blocks = random_batch(torch.Generator(), [2], [20], block_tokens=16)
    kv = torch.zeros(blocks, 2, 2, 16, 32)
    for q, message in (
        (torch.zeros(2, 3, 32), "3 query heads cannot share 2 KV heads"),
        (torch.zeros(2, 4, 16), "head_dim and dtype"),
        (torch.zeros(2, 4, 32, dtype=torch.float16), "head_dim and dtype"),
        (torch.zeros(2, 4, 64)[..., ::2], "contiguous heads"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cpu_ops.paged_attention(q, kv, batch, scale=1.0)
    qkv, table = torch.zeros(2, 8 * 32), torch.zeros(10, 16)
    places = torch.arange(2)
    for slots, positions, heads, message in (
        (torch.tensor([0, blocks * 16]), places, 4, rf"slots\[1\] is {blocks * 16}; it must be -1 to"),
        (torch.tensor([-2, 0]), places, 4, r"slots\[0\] is -2"),
        (places, torch.tensor([0, 10]), 4, r"positions\[1\] is 10; it must be 0 to 9"),
        (places, places[:1], 4, "one position for each of 2 tokens"),
        (places, places, 5, "qkv has 256 features"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cpu_ops.rope_and_write_kv(qkv, kv, slots, positions, table, table, num_heads=heads)
    with pytest.raises(RuntimeError, match="x has 4 features, the weight 5"):
        cpu_ops.rms_norm(torch.zeros(1, 4), torch.zeros(5), 1e-5)


@compiled
@pytest.mark.parametrize("causal", [True, False])
def test_partials_merge_to_the_whole(causal: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    for queries, contexts in SHAPES:
        batch, blocks = random_batch(generator, queries, contexts, block_tokens=16)
        kv = random_kv(generator, blocks, kv_heads=3, block_tokens=16, head_dim=64, dtype=torch.float32)
        q = torch.randn(sum(queries), 9, 64, generator=generator)
        expected = reference.paged_attention_partial(q.double(), kv, batch, scale=0.3, causal=causal)
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
    close(merged, reference.paged_attention(q.double(), kv, batch, scale=0.3), torch.float32)


@compiled
def test_scores_of_any_size_stay_finite() -> None:
    generator = torch.Generator().manual_seed(5)
    batch, blocks = random_batch(generator, [1, 9], [40, 60], block_tokens=16)
    kv = random_kv(generator, blocks, kv_heads=2, block_tokens=16, head_dim=64, dtype=torch.float32)
    for size in (1e-30, 1e4):
        q = size * torch.randn(10, 4, 64, generator=generator)
        actual = cpu_ops.paged_attention(q, kv, batch, scale=1.0)
        assert actual.isfinite().all()
        close(actual, reference.paged_attention(q.double(), kv, batch, scale=1.0), torch.float32)


@compiled
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("tokens", "head_dim"), [(0, 64), (1, 64), (370, 64), (5, 80), (9, 256)])
def test_rope_and_write_kv(dtype: torch.dtype, norms: bool, tokens: int, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(tokens + head_dim)
    heads, kv_heads, block_tokens, blocks = 6, 2, 8, 50
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, generator=generator).to(dtype)
    positions = torch.randint(0, 500, (tokens,), generator=generator)
    slots = torch.randperm(blocks * block_tokens, generator=generator)[:tokens]
    slots[::4] = -1
    angles = torch.rand(500, head_dim // 2, generator=generator) * 6
    weights = [torch.rand(head_dim, generator=generator).to(dtype) if norms else None for _ in range(2)]
    results = []
    for ops, kind in ((cpu_ops, torch.Tensor.clone), (reference, wide)):
        kv = kind(torch.full((blocks, 3, 2, kv_heads, block_tokens, head_dim), 7.0, dtype=dtype))
        q = ops.rope_and_write_kv(
            kind(qkv), kv[:, 1], slots, positions, angles.cos(), angles.sin(),
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
    close(cpu_ops.rms_norm(x, weight, 1e-5), reference.rms_norm(wide(x), wide(weight), 1e-5), dtype)
    ours, theirs = residual.clone(), wide(residual).clone()
    expected = reference.add_rms_norm(wide(x), theirs, wide(weight), 1e-5)
    close(cpu_ops.add_rms_norm(x, ours, weight, 1e-5), expected, dtype)
    close(ours, theirs, dtype)
    gate_up = 10 * torch.randn(shape[0], 2 * shape[1], generator=generator).to(dtype)
    if shape[0]:
        gate_up[0, 0], gate_up[-1, 1] = -6e4, 6e4  # the sigmoid is 0 and 1 there
    close(cpu_ops.swiglu(gate_up), reference.swiglu(wide(gate_up)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "depth"), [(960, 576), (33, 17), (1, 5), (100, 576), (64, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(dtype: torch.dtype, features: int, depth: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(features)
    weight = (torch.randn(features, depth, generator=generator) / depth**0.5).to(dtype)
    offset = torch.randn(features, generator=generator).to(dtype) if bias else None
    prepared = cpu_ops.prepare_linear(weight, offset)
    exact = [weight.double(), None if offset is None else offset.double()]
    for tokens in (0, 1, 2, 5, 11, 12, 13, 24, 64, 241, 300):
        x = torch.randn(tokens, depth + 3, generator=generator).to(dtype)[:, :depth]
        close(cpu_ops.linear(x, prepared), torch.nn.functional.linear(x.double(), *exact), dtype)


def test_copy_blocks_within_and_between_pools() -> None:
    generator = torch.Generator().manual_seed(0)
    pool, other = torch.randn(8, 2, 3, generator=generator), torch.randn(4, 2, 3, generator=generator)
    before = pool.clone()
    cpu_ops.copy_blocks(pool, pool, torch.tensor([[0, 5], [3, 6]]))
    assert torch.equal(pool[[5, 6]], before[[0, 3]]) and torch.equal(pool[:5], before[:5])
    assert torch.equal(pool[7], before[7])
    cpu_ops.copy_blocks(pool, other, torch.tensor([[7, 0], [1, 3]]))
    assert torch.equal(other[[0, 3]], pool[[7, 1]])
    cpu_ops.copy_blocks(pool, other, torch.empty(0, 2, dtype=torch.int64))
