"""Applies every CPU operation to the same inputs; as a program, says which implementation did that."""

from __future__ import annotations

import sys

import torch

from blockyard import kernels
from blockyard.kernels import PagedBatch


def everything() -> list[torch.Tensor]:
    """What all operations give, by whatever implementation this process has."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    batch = PagedBatch(
        block_tables=torch.tensor([[4, 0, 2], [1, 5, 3]], dtype=torch.int32),
        rows=torch.tensor([1, 0], dtype=torch.int32),
        query_starts=torch.tensor([0, 1, 10], dtype=torch.int32),
        context_lens=torch.tensor([40, 33], dtype=torch.int32),
        num_decodes=1,
        max_query_len=9,
        max_context_len=40,
    )
    kv, x, residual, weight, angles = (
        random(6, 2, 2, 16, 32),
        random(10, 256),
        random(10, 256),
        random(256),
        random(50, 16),
    )
    q = kernels.rope_and_write_kv(
        x.clone(),
        kv,
        torch.arange(-1, 9),
        torch.arange(10),
        angles.cos(),
        angles.sin(),
        num_heads=4,
        q_norm=weight[:32],
        k_norm=weight[32:64],
    )
    part = kernels.paged_attention_partial(q, kv, batch, scale=0.2)
    kernels.copy_blocks(kv, kv, torch.tensor([[0, 1]]))
    kernels.write_kv(q[:, :2], q[:, 2:], kv, torch.arange(20, 30))
    normed = kernels.add_rms_norm(x, residual, weight, 1e-5)
    return [
        q,
        kv,
        *part,
        residual,
        normed,
        kernels.paged_attention(q, kv, batch, scale=0.2),
        kernels.merge_partials([part, part], torch.float32),
        kernels.rope(q, angles.cos(), angles.sin(), torch.arange(10)),
        kernels.rms_norm(x, weight, 1e-5),
        kernels.swiglu(x),
        kernels.linear(x / 16, kernels.prepare_linear(random(40, 256), weight[:40])),
    ]


if __name__ == "__main__":
    print(kernels.backend(torch.device("cpu")))
    torch.save(everything(), sys.argv[1])
