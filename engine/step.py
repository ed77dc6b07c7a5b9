"""StepInput: all the data that the scheduler hands to the runner for one step.

The scheduler works with Python objects; the runner, and every tensor-parallel worker, gets only these
flat integer arrays. They contain only what changed: a sequence keeps one row of the runner's block tables
while it is on the device, so unchanged entries are not sent again, and workers need only one small message
per step (vLLM's central scheduler, SOSP'23 section 4.6).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Ints = NDArray[np.int32]


@dataclass(slots=True)
class StepInput:
    """One step, in the order in which a runner carries it out.

    1. ``swap_out`` [N, 2]: (device block, host block) copies, 2. ``swap_in`` [N, 2]: (host, device)
    copies, 3. ``block_copies`` [N, 2]: (from, to) on the device, for copy-on-write, 4. ``table_updates``
    [N, 3]: (row, index, block id) written to the block tables, 5. the forward pass over S sequences:
    sequence ``s`` sits in row ``rows[s]`` and computes ``counts[s]`` tokens from position
    ``starts[s]``; their ids are consecutive in ``token_ids`` [T]. The first ``num_decodes`` have count 1.
    ``sampled`` [L]: indices of the sequences (into rows) whose last token's logits are wanted.
    All arrays are int32.
    """

    swap_out: Ints
    swap_in: Ints
    block_copies: Ints
    table_updates: Ints
    rows: Ints
    starts: Ints
    counts: Ints
    token_ids: Ints
    sampled: Ints
    num_decodes: int

    def pack(self) -> bytes:
        """One message for a worker: a header of sizes, then the arrays back to back."""
        arrays = [getattr(self, f.name).ravel() for f in fields(self) if f.name != "num_decodes"]
        header = np.array([self.num_decodes, *(a.size for a in arrays)], dtype=np.int32)
        return b"".join(a.tobytes() for a in (header, *arrays))

    @classmethod
    def unpack(cls, message: bytes) -> StepInput:
        names = [f.name for f in fields(cls) if f.name != "num_decodes"]
        flat = np.frombuffer(message, dtype=np.int32)
        sizes = flat[1 : len(names) + 1]
        parts = np.split(flat[len(names) + 1 :], np.cumsum(sizes)[:-1])
        widths = {"swap_out": 2, "swap_in": 2, "block_copies": 2, "table_updates": 3}
        arrays = {
            name: part.reshape(-1, widths[name]) if name in widths else part
            for name, part in zip(names, parts, strict=True)
        }
        return cls(num_decodes=int(flat[0]), **arrays)


class StepRunner(Protocol):
    """The interface that carries out steps: on one device, or on several under tensor parallelism.

    The sizes are those after loading, when every setting that was None has been decided.
    """

    layout_digest: str
    dtype: torch.dtype
    device: torch.device
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    max_num_seqs: int
    max_batch_tokens: int
    num_blocks: int
    block_bytes: int
    host_blocks: int

    def execute(self, step: StepInput) -> torch.Tensor | None:
        """Carry out one step -> logits [L, V] of ``step.sampled``, None if there are none."""

    def close(self) -> None:
        """Free all memory and end all worker processes before returning."""
