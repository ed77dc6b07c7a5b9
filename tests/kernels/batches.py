"""Random paged batches that tests of every implementation share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blockyard.kernels.batch import PagedBatch


def random_batch(
    generator: torch.Generator,
    queries: list[int],
    contexts: list[int],
    *,
    block_tokens: int,
    device: str = "cpu",
    shared: bool = False,
) -> tuple[PagedBatch, int]:
    """A batch with these query and context lengths over shuffled blocks -> (batch, blocks in the pool).

    Rows are permuted, tables have spare entries that point nowhere; with ``shared`` all sequences begin
    with the same blocks as far as both reach.
    """
    order = sorted(range(len(queries)), key=lambda s: queries[s] > 1)
    queries, contexts = [queries[s] for s in order], [contexts[s] for s in order]
    needed = [-(-c // block_tokens) for c in contexts]
    width = max(needed, default=0) + 2
    num_blocks = sum(needed) + 3
    ids = torch.randperm(num_blocks, generator=generator).to(torch.int32)
    rows = torch.randperm(len(queries) + 2, generator=generator)[: len(queries)].to(torch.int32)
    tables = torch.full((len(queries) + 2, width), 2**30, dtype=torch.int32)
    used = 0
    for s, count in enumerate(needed):
        tables[rows[s], :count] = ids[used : used + count]
        if shared and s:
            common = min(count, needed[0], max(0, contexts[s] - queries[s]) // block_tokens)
            tables[rows[s], :common] = tables[rows[0], :common]
        used += count
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    batch = PagedBatch(
        block_tables=tables.to(device),
        rows=rows.to(device),
        query_starts=starts.to(device),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        num_decodes=sum(q <= 1 for q in queries),
        max_query_len=max(queries, default=0),
        max_context_len=max(contexts, default=0),
    )
    return batch, num_blocks


def random_kv(
    generator: torch.Generator,
    num_blocks: int,
    *,
    kv_heads: int,
    block_tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> Tensor:
    """One layer of a pool of three: a strided view, as the engine passes it."""
    pool = torch.randn(num_blocks, 3, 2, kv_heads, block_tokens, head_dim, generator=generator)
    return pool.to(dtype).to(device)[:, 1]


def poisoned(kv: Tensor, batch: PagedBatch) -> Tensor:
    """The same layer with NaN in every slot that no context covers, and in the layers beside it."""
    clean = torch.full((kv.shape[0], 3, *kv.shape[1:]), math.nan, dtype=kv.dtype, device=kv.device)[:, 1]
    block_tokens = kv.shape[3]
    for row, length in zip(batch.rows.tolist(), batch.context_lens.tolist(), strict=True):
        for index, block in enumerate(batch.block_tables[row, : -(-length // block_tokens)].tolist()):
            used = min(block_tokens, length - index * block_tokens)
            clean[block, :, :, :used] = kv[block, :, :, :used]
    return clean


SHAPES: list[tuple[list[int], list[int]]] = [
    ([1], [1]),
    ([1, 1, 1], [15, 16, 17]),
    ([1, 1], [0, 33]),  # padding
    ([7], [7]),
    ([16, 1, 33], [16, 70, 40]),
    ([1, 5, 64, 0, 3], [129, 5, 200, 0, 3]),
    ([2, 100], [300, 131]),
]
