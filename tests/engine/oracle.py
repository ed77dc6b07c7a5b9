"""A model that can be checked by hand: it knows whether every slot it reads holds the right past.

``OracleRunner`` carries steps out on a symbolic memory. A slot holds a link of a hash chain over the
tokens up to its position; computing a token reads the *whole* context through the block table and
fails if a single link is missing, stale or another sequence's. The logits are a fixed pseudo-random
function of the chain, so one wrong block, copy, swap or position changes what is decoded.
The idea is that of SGLang's KV canary and token oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

import numpy as np
import torch

from blockyard.engine.engine import Engine
from blockyard.engine.step import StepInput

VOCAB = 40
EOS = 3


def link(previous: bytes, token: int) -> bytes:
    return blake2b(previous + token.to_bytes(4, "little"), digest_size=8).digest()


def chain(token_ids: list[int]) -> bytes:
    state = b""
    for token in token_ids:
        state = link(state, token)
    return state


def oracle_logits(state: bytes) -> torch.Tensor:
    seed = int.from_bytes(state, "little")
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32)) * 3


def greedy_reference(prompt: list[int], max_tokens: int, *, ignore_eos: bool = False) -> list[int]:
    """What any engine must decode from this prompt, computed without one."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        token = int(oracle_logits(chain(tokens)).argmax())
        if token == EOS and not ignore_eos:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


class StepFailed(Exception):
    """A step that ended in the middle."""


class OracleRunner:
    """A StepRunner whose memory is checked at every read.

    With a ``fuse`` the next step raises StepFailed after that many writes.
    """

    layout_digest = "oracle"
    dtype = torch.float32
    device = torch.device("cpu")
    vocab_size = VOCAB
    eos_token_ids = (EOS,)
    max_model_len = 4096
    block_bytes = 1

    def __init__(
        self,
        *,
        block_tokens: int,
        num_blocks: int,
        host_blocks: int,
        max_num_seqs: int,
        max_batch_tokens: int,
    ) -> None:
        self.block_tokens = block_tokens
        self.num_blocks = num_blocks
        self.host_blocks = host_blocks
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self._device: list[list[tuple[bytes, bytes]]] = [self._empty() for _ in range(num_blocks)]
        self._host: list[list[tuple[bytes, bytes]]] = [self._empty() for _ in range(host_blocks)]
        self._tables: list[dict[int, int]] = [{} for _ in range(max_num_seqs)]
        self.computed_tokens = 0
        self.fuse: int | None = None

    def _write(self) -> None:
        """Called before everything that changes memory, and at the end of a step."""
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                self.fuse = None
                raise StepFailed

    def _empty(self) -> list[tuple[bytes, bytes]]:
        return [(b"?", b"?")] * self.block_tokens

    def execute(self, step: StepInput) -> torch.Tensor | None:
        step = StepInput.unpack(step.pack())
        assert len(step.token_ids) == step.counts.sum() <= self.max_batch_tokens
        assert len(set(step.rows.tolist())) == len(step.rows), "a row is computed twice"
        assert (step.counts[: step.num_decodes] == 1).all() and (step.counts[step.num_decodes :] > 1).all()
        for source, target in step.swap_out.tolist():
            self._write()
            self._host[target] = list(self._device[source])
        for source, target in step.swap_in.tolist():
            self._write()
            self._device[target] = list(self._host[source])
        assert not {*step.block_copies[:, 0].tolist()} & {*step.block_copies[:, 1].tolist()}
        for source, target in step.block_copies.tolist():
            self._write()
            self._device[target] = list(self._device[source])
        assert len({(row, index) for row, index, _ in step.table_updates.tolist()}) == len(step.table_updates)
        for row, index, block in step.table_updates.tolist():
            self._write()
            self._tables[row][index] = block
        return self._forward(step)

    def _slot(self, row: int, position: int) -> tuple[int, int]:
        return self._tables[row][position // self.block_tokens], position % self.block_tokens

    def _forward(self, step: StepInput) -> torch.Tensor | None:
        """Within a step all writes of a layer come before its reads: wait for what others write."""
        ends = np.cumsum(step.counts).tolist()
        work = {
            i: (int(row), int(start), step.token_ids[end - count : end].tolist())
            for i, (row, start, count, end) in enumerate(
                zip(step.rows, step.starts, step.counts, ends, strict=True)
            )
        }
        unwritten = {
            self._slot(row, start + k): i for i, (row, start, ids) in work.items() for k in range(len(ids))
        }
        assert len(unwritten) == len(step.token_ids), "two tokens are written to one slot"
        states: dict[int, bytes] = {}
        while work:
            ready = [
                i
                for i, (row, start, _) in work.items()
                if all(self._slot(row, p) not in unwritten for p in range(start))
            ]
            assert ready, "sequences of one step wait for each other"
            for i in ready:
                row, start, ids = work.pop(i)
                states[i] = self._compute(row, start, ids)
                for k in range(len(ids)):
                    del unwritten[self._slot(row, start + k)]
        self.computed_tokens += len(step.token_ids)
        self._write()
        self.fuse = None
        if not len(step.sampled):
            return None
        return torch.stack([oracle_logits(states[i]) for i in step.sampled.tolist()])

    def _compute(self, row: int, start: int, ids: list[int]) -> bytes:
        state = b""
        for position in range(start):
            block, offset = self._slot(row, position)
            before, after = self._device[block][offset]
            assert before == state, f"row {row} reads a foreign or stale slot at position {position}"
            state = after
        for position, token in enumerate(ids, start):
            block, offset = self._slot(row, position)
            after = link(state, token)
            self._write()
            self._device[block][offset] = (state, after)
            state = after
        return state

    def close(self) -> None:
        pass


MakeEngine = Callable[..., Engine]
