"""Norms, SwiGLU, RoPE, KV writes and block copies in Triton against their plain-torch meaning."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blockyard.kernels import reference, triton_copy, triton_ops

pytestmark = pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # the interpreter's numpy
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 64), (1, 576), (7, 40), (3, 7), (2, 5000)])
def test_norms(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, residual = random(0, *shape, dtype=dtype, size=3), random(1, *shape, dtype=dtype, size=3)
    weight = random(2, shape[1], dtype=dtype)
    close(triton_ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), dtype)
    ours, theirs = residual.clone(), residual.clone()
    normed = triton_ops.add_rms_norm(x, ours, weight, 1e-5)
    close(normed, reference.add_rms_norm(x, theirs, weight, 1e-5), dtype)
    close(ours, theirs, dtype)


def test_norms_of_views_and_mixed_types() -> None:
    wide = random(0, 6, 5, 48)
    for view in (wide[:, 1:4, 8:40], wide[..., ::3], wide[0], wide[0, 0]):
        weight = random(1, view.shape[-1])
        close(triton_ops.rms_norm(view, weight, 1e-6), reference.rms_norm(view, weight, 1e-6), torch.float32)
    x, weight = wide[0].half(), random(1, 48)
    close(triton_ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), torch.float16)
    ours, theirs = random(2, 5, 96)[:, :48], random(2, 5, 96)[:, :48]
    normed = triton_ops.add_rms_norm(wide[1], ours, weight, 1e-6)
    close(normed, reference.add_rms_norm(wide[1], theirs, weight, 1e-6), torch.float32)
    close(ours, theirs, torch.float32)
    assert not triton_ops.rms_norm(torch.zeros(2, 8, device=DEVICE), random(3, 8), 1e-6).any()
    with pytest.raises(ValueError, match="contiguous rows"):
        triton_ops.add_rms_norm(wide[0, :, ::2], wide[1, :, ::2], weight[::2], 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 64), (1, 96), (5, 7), (3, 1500)])
def test_swiglu(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate_up = random(4, shape[0], 2 * shape[1], dtype=dtype, size=10)
    if shape[0]:
        gate_up[0, 0], gate_up[-1, 1] = -6e4, 6e4  # the sigmoid is 0 and 1 there
    close(triton_ops.swiglu(gate_up), reference.swiglu(gate_up), dtype)
    view = random(5, shape[0], 2 * shape[1] + 6, dtype=dtype)[:, 4:-2]
    close(triton_ops.swiglu(view), reference.swiglu(view), dtype)


def tables(positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angles = 6 * torch.rand(positions, head_dim // 2, generator=torch.Generator().manual_seed(6))
    return angles.cos().to(DEVICE), angles.sin().to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(0, 2, 32), (1, 3, 40), (9, 9, 64), (3, 20, 128)])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_rope(dtype: torch.dtype, tokens: int, heads: int, head_dim: int, index: torch.dtype) -> None:
    cos, sin = tables(50, head_dim)
    positions = (
        torch.randint(0, 50, (tokens,), generator=torch.Generator().manual_seed(7)).to(index).to(DEVICE)
    )
    x = random(8, tokens, heads + 1, head_dim, dtype=dtype)
    for view in (x, x[:, 1:], x.transpose(0, 2).contiguous().transpose(0, 2)):
        close(triton_ops.rope(view, cos, sin, positions), reference.rope(view, cos, sin, positions), dtype)


def slots_of(tokens: int, blocks: int, block_tokens: int) -> Tensor:
    slots = torch.randperm(blocks * block_tokens, generator=torch.Generator().manual_seed(9))[:tokens]
    slots[::4] = -1
    return slots.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "block_tokens"),
    [(0, 4, 2, 32, 8), (1, 9, 3, 64, 16), (13, 6, 2, 32, 8), (5, 32, 4, 80, 24), (6, 2, 1, 256, 64)],
)
def test_rope_and_write_kv(
    dtype: torch.dtype,
    norms: tuple[bool, bool],
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_tokens: int,
) -> None:
    """Compares q and the whole pool, so that a write beside its slot or into another layer shows."""
    cos, sin = tables(50, head_dim)
    positions = torch.randint(0, 50, (tokens,), generator=torch.Generator().manual_seed(10)).to(DEVICE)
    slots = slots_of(tokens, 4, block_tokens)
    qkv = random(11, tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    weights = [random(12 + i, head_dim, dtype=dtype) if norm else None for i, norm in enumerate(norms)]
    results = []
    for ops in (triton_ops, reference):
        pool = torch.full((4, 3, 2, kv_heads, block_tokens, head_dim), math.nan, dtype=dtype, device=DEVICE)
        q = ops.rope_and_write_kv(
            qkv.clone(), pool[:, 1], slots, positions, cos, sin,
            num_heads=heads, q_norm=weights[0], k_norm=weights[1], eps=1e-5,
        )  # fmt: skip
        results.append((q, pool))
    assert results[0][0].shape == (tokens, heads, head_dim)
    close(results[0][0], results[1][0], dtype)
    close(results[0][1], results[1][1], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_writes_through_any_strides(dtype: torch.dtype) -> None:
    """Rows inside a wider projection; a pool whose K and V, heads and tokens lie in another order."""
    tokens, heads, kv_heads, block_tokens, head_dim = 7, 4, 2, 8, 32
    cos, sin = tables(50, 2 * head_dim)
    cos, sin = cos[:, :16], sin[:, :16]
    positions = torch.arange(tokens, device=DEVICE) * 3
    slots = slots_of(tokens, 3, block_tokens)
    wide = random(13, tokens, (heads + 2 * kv_heads) * head_dim + 16, dtype=dtype)
    k, v = random(14, tokens, head_dim, kv_heads), random(15, kv_heads, tokens, head_dim)
    results = []
    for ops in (triton_ops, reference):
        storage = torch.zeros(2, kv_heads, block_tokens, 3, head_dim, dtype=dtype, device=DEVICE)
        fused, plain = storage.permute(3, 0, 1, 2, 4), storage.clone().permute(3, 0, 1, 2, 4)
        ops.rope_and_write_kv(wide.clone()[:, 16:], fused, slots, positions, cos, sin, num_heads=heads)
        ops.write_kv(k.transpose(1, 2), v.transpose(0, 1), plain, slots)  # cast to the pool's type
        results.append((fused, plain))
    close(results[0][0], results[1][0], dtype)
    close(results[0][1], results[1][1], dtype)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float32, (2, 2, 3, 16, 64)),
        (torch.bfloat16, (3, 700)),
        (torch.float16, (5, 1)),
        (torch.uint8, (1, 7)),
        (torch.bfloat16, (2, 2, 1, 8, 32)),
    ],
)
def test_copy_blocks(dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("contiguous slabs are the kernel's work")

    pool = (
        torch.randint(0, 100, (9, *shape), generator=torch.Generator().manual_seed(16)).to(dtype).to(DEVICE)
    )
    other = torch.zeros(5, *shape, dtype=dtype, device=DEVICE)
    expected_pool, expected_other = pool.clone(), other.clone()
    within, between = torch.tensor([[0, 5], [3, 8], [7, 1]]), torch.tensor([[7, 0], [1, 3]])
    reference.copy_blocks(expected_pool, expected_pool, within)
    reference.copy_blocks(expected_pool, expected_other, between)
    monkeypatch.setattr(reference, "copy_blocks", fail)
    triton_ops.copy_blocks(pool, pool, within)
    triton_ops.copy_blocks(pool, other, between)
    triton_ops.copy_blocks(pool, other, torch.empty(0, 2, dtype=torch.int64))
    assert torch.equal(pool, expected_pool)
    assert torch.equal(other, expected_other)


def test_copy_blocks_that_are_views() -> None:
    """Slabs with gaps between them are the kernel's; slabs with gaps inside go through torch."""
    views: list[Callable[[Tensor], Tensor]] = [
        lambda x: x[:, :2],
        lambda x: x[::2],
        lambda x: x[1:],
        lambda x: x[..., ::2],
    ]
    for make in views:
        ours, theirs = (random(17, 8, 3, 4, 6) for _ in range(2))
        target, expected = random(18, 8, 3, 4, 6), random(18, 8, 3, 4, 6)
        pairs = torch.tensor([[0, 1], [3, 0]])
        triton_ops.copy_blocks(make(ours), make(target), pairs)
        reference.copy_blocks(make(theirs), make(expected), pairs)
        assert torch.equal(target, expected)
    pool = random(19, 8, 16)
    kinds = triton_copy._as_integers(pool, pool)
    assert kinds is not None
    assert kinds[0].dtype == torch.int64
    assert triton_copy._as_integers(pool[:, ::2], pool[:, ::2]) is None
    assert triton_copy._as_integers(pool, pool.half()) is None
