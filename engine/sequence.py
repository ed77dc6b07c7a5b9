"""Requests and their sequences: the tokens, how many of them are computed, and which blocks hold their KV.

A request is what a client sent; it decodes one sequence, or several that start with the same prompt
(``best_of``, beams). A sequence owns its tokens and the lists of its blocks; the blocks themselves
belong to the BlockPool, and only the scheduler changes a sequence's place.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

from .kv.block_key import child_key
from .outputs import FinishReason, TokenLogprob
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from .beam import BeamSearch
    from .sampler import SamplingState


class Place(Enum):
    """Where a sequence's KV is."""

    WAITING = auto()  # nowhere: nothing is computed, or it was dropped
    DEVICE = auto()  # in device blocks; has a row in the runner
    HOST = auto()  # in host blocks, preempted by swap
    GONE = auto()  # finished or aborted; holds nothing


class Sequence:
    """One continuation of a prompt that is being decoded.

    ``token_ids`` is the prompt and all output. The KV of the first ``num_computed`` tokens is in blocks; the
    others, at least one until the sequence is gone, are still to be computed. ``keys`` are the keys of the
    first blocks, computed as far as they were needed; the first ``num_published`` blocks are published in
    the pool. ``rows_sent`` is how many entries of ``blocks`` were sent to the runner's block table.
    """

    __slots__ = (
        "blocks",
        "cached_tokens",
        "cumulative_logprob",
        "finish_reason",
        "host_blocks",
        "index",
        "keys",
        "logprobs",
        "num_computed",
        "num_published",
        "output_ids",
        "place",
        "request",
        "row",
        "rows_sent",
        "sampling",
        "stop_token_id",
        "token_ids",
    )

    def __init__(self, request: Request, index: int, sampling: SamplingState) -> None:
        self.request = request
        self.index = index
        self.sampling = sampling
        self.token_ids = list(request.prompt_ids)
        self.output_ids = sampling.output_ids
        self.num_computed = 0
        self.blocks: list[int] = []
        self.host_blocks: list[int] = []
        self.keys: list[bytes] = []
        self.num_published = 0
        self.row = -1
        self.rows_sent = 0
        self.place = Place.WAITING
        self.cached_tokens = 0
        self.logprobs: list[TokenLogprob] = []
        self.cumulative_logprob = 0.0
        self.finish_reason: FinishReason | None = None
        self.stop_token_id: int | None = None

    def __repr__(self) -> str:
        return (
            f"<{self.request.id}[{self.index}] {self.place.name} {self.num_computed}/{len(self.token_ids)} "
            f"tokens in blocks {self.blocks}>"
        )

    @property
    def remaining(self) -> int:
        """Tokens whose KV is still to be computed before the next one can be sampled."""
        return len(self.token_ids) - self.num_computed

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.output_ids.append(token_id)

    def extend_keys(self, num_blocks: int, block_tokens: int) -> list[bytes]:
        """The keys of the first ``num_blocks`` blocks, which must all be full of known tokens."""
        while len(self.keys) < num_blocks:
            begin = len(self.keys) * block_tokens
            parent = self.keys[-1] if self.keys else self.request.root_key
            self.keys.append(child_key(parent, self.token_ids[begin : begin + block_tokens]))
        return self.keys[:num_blocks]

    def fork(self, index: int, sampling: SamplingState) -> Sequence:
        """A twin with the same tokens and blocks. The scheduler adds its row and its references to blocks."""
        twin = Sequence(self.request, index, sampling)
        twin.token_ids = list(self.token_ids)
        twin.num_computed = self.num_computed
        twin.blocks = list(self.blocks)
        twin.keys = list(self.keys)
        twin.num_published = self.num_published
        twin.place = self.place
        twin.cached_tokens = self.cached_tokens
        twin.logprobs = list(self.logprobs)
        twin.cumulative_logprob = self.cumulative_logprob
        return twin


class Request:
    """One prompt and its choices. ``arrival`` numbers the requests in their order of arrival."""

    __slots__ = (
        "arrival",
        "beam",
        "finished",
        "forked",
        "id",
        "live",
        "params",
        "priority",
        "prompt_ids",
        "root_key",
        "tenant",
    )

    def __init__(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        tenant: str,
        priority: int,
        arrival: int,
        root_key: bytes,
        beam: BeamSearch | None = None,
    ) -> None:
        self.id = request_id
        self.prompt_ids = prompt_ids
        self.params = params
        self.tenant = tenant
        self.priority = priority
        self.arrival = arrival
        self.root_key = root_key
        self.beam = beam
        self.live: list[Sequence] = []  # sequences still decoding; one until the prompt is computed
        self.finished: list[Sequence] = []
        self.forked = params.best_of == 1  # whether all sequences exist

    @property
    def width(self) -> int:
        """How many sequences it may decode at once. A running request reserves this number of runner rows."""
        return self.params.best_of

    @property
    def holds_back(self) -> bool:
        """Whether choices are ranked, and therefore output, only when all sequences have finished."""
        return self.beam is not None or self.params.best_of > self.params.n
