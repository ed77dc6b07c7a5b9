# mypy: disable-error-code="import-untyped"
"""Compiles every Triton kernel for one GPU architecture on a machine that need not have it.

Run as a program: ``compile_ahead.py CAPABILITY`` prints one JSON line a compiled kernel. The public
operations themselves are called, with CPU tensors, and their launches are turned into compilations; so what
is compiled is what a GPU would be given: the argument types and alignments, the constants, warps and stages
that the decision table chooses for that GPU.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from blockyard.kernels import triton_attention, triton_device, triton_ops
from blockyard.kernels.batch import PagedBatch

DEVICES = {  # A100, H100, B200
    80: triton_device.Device(multiprocessors=108, shared_memory=163 * 1024),
    90: triton_device.Device(multiprocessors=132, shared_memory=227 * 1024),
    100: triton_device.Device(multiprocessors=148, shared_memory=227 * 1024),
}


class TargetDriver:
    """What a launch asks of a driver, for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)


def compile_instead_of_launching(capability: int) -> None:
    """From here on ``kernel[grid](...)`` compiles, once a specialisation, and prints what came out."""
    driver.set_active(TargetDriver(capability))
    device = DEVICES[capability]
    attention_launches: Any = triton_attention
    attention_launches.device_of = lambda _: device
    seen: set[str] = set()

    def launch(self: Any, grid: tuple[int, ...]) -> Any:
        def compiled(*args: Any, **kwargs: Any) -> None:
            assert min(grid) > 0, grid
            assert max(grid[1:], default=1) < 2**16, grid
            kernel = self.run(*args, grid=grid, warmup=True, **kwargs)
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                ptx = kernel.asm["ptx"]
                report = {
                    "kernel": self.fn.__name__,
                    "constants": {k: str(v) for k, v in kwargs.items()},
                    "cubin": len(kernel.asm["cubin"]),
                    "ptx_target": next(x for x in ptx.splitlines() if x.startswith(".target")),
                    "tensor_cores": any(x in ptx for x in ("mma.sync", "wgmma.mma", "tcgen05.mma")),
                    "tf32": "tf32" in ptx,
                    "shared": kernel.metadata.shared,
                    "limit": device.shared_memory,
                }
                print(json.dumps(report), flush=True)

        return compiled

    launches: Any = JITFunction
    launches.__getitem__ = launch


def batch_of(queries: list[int], decodes: int) -> PagedBatch:
    count = len(queries)
    return PagedBatch(
        block_tables=torch.zeros(count, 256, dtype=torch.int32),
        rows=torch.zeros(count, dtype=torch.int32),
        query_starts=torch.zeros(count + 1, dtype=torch.int32),
        context_lens=torch.zeros(count, dtype=torch.int32),
        num_decodes=decodes,
        max_query_len=max(queries),
        max_context_len=4096,
    )


def attention(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_tokens: int, queries: list[int]
) -> None:
    tokens = sum(queries)
    qkv = torch.empty(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    kv = torch.empty(4, 3, 2, kv_heads, block_tokens, head_dim, dtype=dtype)[:, 1]
    batch = batch_of(queries, sum(q == 1 for q in queries))
    triton_ops.paged_attention(qkv[:, :heads], kv, batch, scale=head_dim**-0.5)


def everything() -> None:
    """The kernels as common models use them, and the corners of the table."""
    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    # Llama-3.1-8B: decode of a small and a large batch, chunks of few, some and many rows.
    for queries in ([1] * 2, [1] * 256, [1, 9], [1, 100], [1, 2048]):
        attention(brain, 32, 8, 128, 16, queries)
    attention(half, 32, 32, 128, 16, [1, 1, 512])  # Llama-2-7B: no groups
    attention(brain, 9, 3, 64, 16, [1, 300])  # SmolLM2
    attention(full, 9, 3, 64, 16, [1, 300])
    attention(brain, 14, 2, 64, 64, [1, 4000])  # Qwen2-0.5B; a tile within a block
    attention(brain, 8, 4, 256, 32, [1, 16, 5000])  # Gemma's heads
    attention(full, 4, 1, 256, 8, [1, 100])
    attention(half, 32, 32, 80, 8, [1, 700])  # Phi-2
    attention(half, 71, 1, 64, 16, [1, 900])  # Falcon-7B
    attention(full, 4, 4, 128, 16, [1, 2])
    attention(half, 8, 2, 96, 32, [1, 40])  # Phi-3's head dim
    attention(full, 6, 3, 8, 16, [1, 40])  # narrower than a tensor core takes, as tests' models are
    attention(half, 6, 3, 8, 16, [1, 40])
    q = torch.empty(10, 32, 128, dtype=brain)
    kv = torch.empty(4, 2, 8, 16, 128, dtype=brain)
    for causal, queries in itertools.product((True, False), ([1] * 10, [5, 5])):
        batch = batch_of(queries, queries.count(1))
        part = triton_ops.paged_attention_partial(q, kv, batch, scale=0.1, causal=causal)
        triton_ops.merge_partials([part, part, part], brain)

    positions = torch.zeros(5, dtype=torch.int64)
    for dtype, heads, kv_heads, head_dim, norm in (
        (brain, 32, 8, 128, False),
        (brain, 16, 8, 128, True),  # Qwen3
        (half, 32, 32, 80, False),
        (full, 9, 3, 64, False),
        (full, 4, 1, 256, True),
    ):
        weight = torch.ones(head_dim, dtype=dtype) if norm else None
        table = torch.zeros(64, head_dim // 2)
        qkv = torch.empty(5, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
        kv = torch.empty(4, 3, 2, kv_heads, 16, head_dim, dtype=dtype)[:, 1]
        q = triton_ops.rope_and_write_kv(
            qkv, kv, positions, positions, table, table, num_heads=heads, q_norm=weight, k_norm=weight
        )
        triton_ops.rope(q, table, table, positions)
        triton_ops.write_kv(q[:, :kv_heads], q[:, :kv_heads], kv, positions)

    for dtype, width, inner in (
        (brain, 4096, 14336),
        (half, 896, 4864),
        (full, 576, 1536),
        (brain, 16384, 100),
    ):
        x, weight = torch.empty(3, width, dtype=dtype), torch.ones(width, dtype=dtype)
        triton_ops.rms_norm(x, weight, 1e-5)
        triton_ops.add_rms_norm(x, x.clone(), weight, 1e-5)
        triton_ops.swiglu(torch.empty(3, 2 * inner, dtype=dtype))

    pool = torch.empty(4, 2, 2, 3, 16, 64, dtype=brain)
    triton_ops.copy_blocks(pool, pool, torch.tensor([[0, 1]]))
    odd = torch.empty(4, 3, dtype=brain)
    triton_ops.copy_blocks(odd, odd.clone(), torch.tensor([[0, 1]]))


if __name__ == "__main__":
    if triton.knobs.runtime.interpret:
        sys.exit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    compile_instead_of_launching(int(sys.argv[1]))
    everything()
