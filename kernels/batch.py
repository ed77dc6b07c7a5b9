"""Which tokens of a step belong to which sequence, and where their KV is: all that attention needs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """One step's S sequences with T tokens in all; every tensor is on the model's device.

    Sequence ``s`` owns the query rows ``query_starts[s]:query_starts[s+1]`` and the KV of
    ``context_lens[s]`` tokens (this step's tokens included); its block ids are
    ``block_tables[rows[s]]``. A sequence keeps its row while it is on the device, so a step writes only
    the new block ids and never copies the tables. A sequence with no query rows or with ``context_lens``
    0 is padding and is skipped. The first ``num_decodes`` sequences have exactly one query row
    (padding may stand among them); the others have any number.
    """

    block_tables: Tensor  # int32 [max_rows, max_blocks_per_row]
    rows: Tensor  # int32 [S]
    query_starts: Tensor  # int32 [S + 1]
    context_lens: Tensor  # int32 [S]
    num_decodes: int
    max_query_len: int
    max_context_len: int
