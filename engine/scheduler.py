"""The scheduler: which tokens of which sequences the next step computes, and which requests are preempted.

There is no prefill phase and no decode phase (as in vLLM): each sequence has some tokens left to compute,
and all sequences share one budget of tokens per step. ``schedule`` plans a step in three parts:

1. *Serve* the running requests: decodes first, then prefill chunks, while the pool has blocks for their
   growth. Blocks are only counted here. If there are not enough, the request that is last in service order
   is preempted with all its sequences: by recompute (drop the KV) or by swap (move it to the host tier).
2. *Grow*: take the blocks that were counted, and copy shared blocks before a write (copy-on-write).
3. *Admit* preempted requests, then waiting ones, unless a request was preempted in this step. The pool must
   have blocks for all known tokens of the new request, for the tokens that running prefills have left, and
   for a watermark. Otherwise the admission itself would cause the next preemption.

Blocks are published to the prefix index as soon as the step that fills them is planned. A request admitted
in the same step may already use them, because a step writes each layer's KV before any of its queries reads
that layer.

Every exit of a sequence (finish, abort, preempt) releases its resources through ``_vacate`` alone: several
release paths are where other engines got leaks.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from dataclasses import dataclass, field
from math import ceil

import numpy as np

from .config import PreemptionKind
from .errors import RequestError
from .fair_queue import OUTPUT_WEIGHT, FairQueue, order
from .kv.block_pool import BlockPool
from .outputs import FinishReason
from .sequence import Place, Request, Sequence
from .step import StepInput


@dataclass(slots=True)
class Chunk:
    """``count`` tokens of one sequence from ``start``. If ``samples``, the next token is then sampled."""

    sequence: Sequence
    start: int
    count: int
    samples: bool


@dataclass(slots=True)
class Schedule:
    """One planned step. Chunks of one token come first."""

    chunks: list[Chunk] = field(default_factory=list)
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    table_updates: list[tuple[int, int, int]] = field(default_factory=list)
    preempted: int = 0

    @property
    def empty(self) -> bool:
        return not (self.chunks or self.swap_out or self.swap_in)

    def to_step_input(self) -> StepInput:
        """The same as flat arrays for the runner."""
        chunks = self.chunks
        token_ids: list[int] = []
        for chunk in chunks:
            token_ids += chunk.sequence.token_ids[chunk.start : chunk.start + chunk.count]

        def table(rows: list[tuple[int, ...]], width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
            return np.array(rows, dtype=np.int32).reshape(-1, width)

        return StepInput(
            swap_out=table([*self.swap_out], 2),
            swap_in=table([*self.swap_in], 2),
            block_copies=table([*self.copies], 2),
            table_updates=table([*self.table_updates], 3),
            rows=np.array([c.sequence.row for c in chunks], dtype=np.int32),
            starts=np.array([c.start for c in chunks], dtype=np.int32),
            counts=np.array([c.count for c in chunks], dtype=np.int32),
            token_ids=np.array(token_ids, dtype=np.int32),
            sampled=np.array([i for i, c in enumerate(chunks) if c.samples], dtype=np.int32),
            num_decodes=sum(c.count == 1 for c in chunks),
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """The scheduler's limits: ``max_rows`` sequences on the device, ``max_batch_tokens`` tokens per step."""

    block_tokens: int
    max_rows: int
    max_batch_tokens: int
    max_model_len: int
    watermark: float = 0.01
    prefix_cache: bool = True
    preemption: PreemptionKind = "recompute"


class Scheduler:
    """Owns the waiting, preempted and running requests, the runner's rows, and all references to blocks."""

    def __init__(self, limits: Limits, pool: BlockPool, host_pool: BlockPool | None = None) -> None:
        self.limits = limits
        self.pool = pool
        self.host_pool = host_pool
        self.waiting: FairQueue[Request] = FairQueue()
        self.preempted: list[Request] = []  # in service order; may hold HOST or WAITING sequences
        self.running: list[Request] = []  # in service order
        self._free_rows = list(range(limits.max_rows - 1, -1, -1))
        self._reserved_rows = 0  # sum of the widths of all running requests
        self._watermark = ceil(len(pool) * limits.watermark)
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.preemptions: Counter[str] = Counter()

    # ── Entering and leaving ──────────────────────────────────────────────────────────────────────

    def add(self, request: Request, first: Sequence) -> None:
        """Queue a request; RequestError if it could not be served even if it were alone."""
        self._refuse_impossible(request)
        request.live.append(first)
        self.waiting.arrive(request.tenant)
        self.waiting.push(request)

    def _refuse_impossible(self, request: Request) -> None:
        limits, params = self.limits, request.params
        prompt = len(request.prompt_ids)
        total = prompt + params.max_tokens
        if total > limits.max_model_len:
            raise RequestError(
                f"the prompt has {prompt} tokens and max_tokens is {params.max_tokens}, together {total}; "
                f"this model serves at most {limits.max_model_len}. Shorten the prompt or lower max_tokens",
                field="max_tokens" if prompt < limits.max_model_len else "prompt",
            )
        if request.width > min(limits.max_rows, limits.max_batch_tokens):
            raise RequestError(
                f"{request.width} sequences are wanted at once; this server decodes at most "
                f"{min(limits.max_rows, limits.max_batch_tokens)}. Lower n or best_of",
                field="best_of",
            )
        # The last sampled token's KV is never written.
        blocks = self._blocks_for(total - 1)
        blocks += (request.width - 1) * (blocks - prompt // limits.block_tokens)
        if blocks > len(self.pool):
            raise RequestError(
                f"the request can grow to {blocks} KV blocks of {limits.block_tokens} tokens "
                f"(prompt {prompt}, max_tokens {params.max_tokens}, {request.width} sequences); the pool has "
                f"{len(self.pool)}. Lower max_tokens or n, or give the server more kv_blocks",
                field="max_tokens",
            )

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """One sequence has its last token, or was aborted."""
        request = sequence.request
        self._vacate(sequence, Place.GONE)
        sequence.finish_reason = reason
        request.live.remove(sequence)
        request.finished.append(sequence)
        if not request.live:
            self._retire(request)

    def discard(self, sequence: Sequence) -> None:
        """Remove a beam that was not continued; the request does not count it as finished."""
        self._vacate(sequence, Place.GONE)
        sequence.request.live.remove(sequence)
        if not sequence.request.live:
            self._retire(sequence.request)

    def _retire(self, request: Request) -> None:
        if request in self.running:
            self.running.remove(request)
            self._reserved_rows -= request.width
        elif request in self.preempted:
            self.preempted.remove(request)
        else:
            self.waiting.remove(request)
        self.waiting.leave(request.tenant)

    def fork(self, parent: Sequence, twin: Sequence) -> None:
        """Start a twin of a running sequence. It shares all blocks, including the half-filled last one."""
        self.pool.share(twin.blocks)
        twin.row = self._free_rows.pop()
        parent.request.live.append(twin)

    def _vacate(self, sequence: Sequence, place: Place) -> None:
        """Release everything that a sequence holds. The only release, whatever the reason."""
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        if sequence.host_blocks:
            assert self.host_pool is not None
            self.host_pool.release(sequence.host_blocks)
            sequence.host_blocks = []
        if sequence.row >= 0:
            self._free_rows.append(sequence.row)
        sequence.row, sequence.rows_sent = -1, 0
        sequence.place = place
        sequence.num_published = 0
        if place is Place.WAITING:
            sequence.num_computed = 0

    # ── Planning a step ───────────────────────────────────────────────────────────────────────────

    def schedule(self) -> Schedule:
        """Plan the next step. An empty schedule means that there is nothing to compute."""
        plan = Schedule()
        wanted, budget = self._serve(plan)
        for sequence, (count, _) in wanted.items():
            self._grow(plan, sequence, count)
        if not plan.preempted:
            self._admit(plan, budget)
        plan.chunks.sort(key=lambda chunk: chunk.count > 1)
        return plan

    def _serve(self, plan: Schedule) -> tuple[dict[Sequence, tuple[int, int]], int]:
        """Choose how many tokens each running sequence gets, preempting until their growth fits.

        Returns (tokens, new blocks) of each sequence, in the order in which they must grow, and the budget
        that is left.
        """
        wanted: dict[Sequence, tuple[int, int]] = {}
        copies: Counter[int] = Counter()  # how many sequences will have copied a shared block in this step
        budget = self.limits.max_batch_tokens
        claimed = 0  # blocks that the chosen sequences will take
        asks = [ask for request in self.running for ask in self._asks(request)]
        asks.sort(key=lambda ask: sum(count for _, count in ask) > len(ask))  # decodes before prefills
        for ask in asks:
            if len(ask) > budget or ask[0][0].place is not Place.DEVICE:  # preempted earlier in this loop
                continue
            chosen = [(sequence, min(count, budget)) for sequence, count in ask]
            growth = [self._growth(sequence, count, copies) for sequence, count in chosen]
            need = sum(growth)
            while claimed + need > self.pool.available and ask[0][0].place is Place.DEVICE:
                victim = self.running[-1]
                for sequence in victim.live:
                    if sequence in wanted:
                        count, blocks = wanted.pop(sequence)
                        budget += count
                        claimed -= blocks
                self._preempt(plan, victim)
            if ask[0][0].place is Place.DEVICE:
                claimed += need
                for (sequence, count), blocks in zip(chosen, growth, strict=True):
                    wanted[sequence] = count, blocks
                    budget -= count
        return wanted, budget

    def _asks(self, request: Request) -> list[list[tuple[Sequence, int]]]:
        """What a running request asks of this step: lists of sequences that are served together or not at
        all.
        """
        ready = [sequence for sequence in request.live if self._adopt(sequence)]
        if request.beam is None or len(request.live) == 1:
            return [[(sequence, sequence.remaining)] for sequence in ready]
        # Beams advance together; after a preemption they first compute all tokens up to their last one.
        behind = [sequence for sequence in ready if sequence.remaining > 1]
        if behind or len(ready) < len(request.live):
            return [[(sequence, sequence.remaining - 1)] for sequence in behind]
        return [[(sequence, 1) for sequence in ready]]

    def _adopt(self, sequence: Sequence) -> bool:
        """After a preemption by recompute, let siblings share the prompt that the first sequence recomputes.

        Otherwise n sequences would need the prompt's blocks n times, and the pool may not have so many.
        Returns whether the sequence can be computed now; a sibling must wait for the shared blocks.
        """
        leader = sequence.request.live[0]
        if sequence is leader or sequence.blocks:
            return True
        shared = len(sequence.request.prompt_ids) // self.limits.block_tokens
        if leader.num_computed < shared * self.limits.block_tokens:
            return False
        sequence.blocks = leader.blocks[:shared]
        self.pool.share(sequence.blocks)
        sequence.num_computed = shared * self.limits.block_tokens
        sequence.num_published = shared
        return True

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.limits.block_tokens)

    def _growth(self, sequence: Sequence, count: int, copies: Counter[int]) -> int:
        """Blocks that computing ``count`` more tokens takes from the pool, copy-on-write included.

        ``copies`` counts the copies that other sequences will make of each shared block before; this one's is
        added.
        """
        new = self._blocks_for(sequence.num_computed + count) - len(sequence.blocks)
        tail = self._shared_tail(sequence)
        if tail is None:
            return new
        block = sequence.blocks[tail]
        if self.pool.references(block) - copies[block] == 1:
            return new  # all other sequences have copied the block: the last one keeps it
        copies[block] += 1
        return new + 1

    def _shared_tail(self, sequence: Sequence) -> int | None:
        """Index of the half-filled block that the next token is written to, if a sibling shares it."""
        index, offset = divmod(sequence.num_computed, self.limits.block_tokens)
        if offset and self.pool.references(sequence.blocks[index]) > 1:
            return index
        return None

    def _grow(self, plan: Schedule, sequence: Sequence, count: int) -> None:
        """Take the blocks for the next ``count`` tokens and put the chunk into the plan."""
        tail = self._shared_tail(sequence)
        if tail is not None:
            source = sequence.blocks[tail]
            (copy,) = self.pool.take(1)
            self.pool.release([source])
            sequence.blocks[tail] = copy
            plan.copies.append((source, copy))
            if tail < sequence.rows_sent:
                plan.table_updates.append((sequence.row, tail, copy))
        end = sequence.num_computed + count
        missing = self._blocks_for(end) - len(sequence.blocks)
        if missing > 0:
            sequence.blocks += self.pool.take(missing)
        for index in range(sequence.rows_sent, len(sequence.blocks)):
            plan.table_updates.append((sequence.row, index, sequence.blocks[index]))
        sequence.rows_sent = len(sequence.blocks)
        samples = end == len(sequence.token_ids)
        plan.chunks.append(Chunk(sequence, sequence.num_computed, count, samples))
        sequence.num_computed = end
        self._publish(sequence)
        self.waiting.charge(sequence.request.tenant, OUTPUT_WEIGHT if samples and count == 1 else count)

    def _publish(self, sequence: Sequence) -> None:
        """Publish the blocks that are full by the end of this step in the prefix index."""
        if not self.limits.prefix_cache:
            return
        full = sequence.num_computed // self.limits.block_tokens
        if full > sequence.num_published:
            keys = sequence.extend_keys(full, self.limits.block_tokens)
            for index in range(sequence.num_published, full):
                self.pool.publish(sequence.blocks[index], keys[index], index + 1)
            sequence.num_published = full

    # ── Preemption ────────────────────────────────────────────────────────────────────────────────

    def _preempt(self, plan: Schedule, request: Request) -> None:
        """Take a running request off the device. It is admitted again before waiting ones of its priority."""
        self.running.remove(request)
        self._reserved_rows -= request.width
        plan.preempted += 1
        by_swap = self.limits.preemption == "swap" and self._swap_out(plan, request)
        self.preemptions["swap" if by_swap else "recompute"] += 1
        if not by_swap:
            for sequence in request.live:
                self._vacate(sequence, Place.WAITING)
        insort(self.preempted, request, key=order)

    def _swap_out(self, plan: Schedule, request: Request) -> bool:
        """Move the request's KV to host blocks, copying a shared block once. False if the host is full."""
        if self.host_pool is None:
            return False
        used = {
            sequence: sequence.blocks[: self._blocks_for(sequence.num_computed)] for sequence in request.live
        }
        moving = list(dict.fromkeys(block for blocks in used.values() for block in blocks))
        if not moving or len(moving) > self.host_pool.available:
            return False
        place = dict(zip(moving, self.host_pool.take(len(moving)), strict=True))
        plan.swap_out += place.items()
        seen: set[int] = set()
        for sequence, blocks in used.items():
            host_blocks = [place[block] for block in blocks]
            self.host_pool.share([block for block in host_blocks if block in seen])
            seen.update(host_blocks)
            self._vacate(sequence, Place.HOST)
            sequence.host_blocks = host_blocks
        return True

    def _swap_in(self, plan: Schedule, request: Request) -> None:
        """Copy a request's KV back to the device, except blocks that are still cached there."""
        assert self.host_pool is not None
        place: dict[int, int] = {}  # host block -> device block
        for sequence in request.live:
            known = self._cached_prefix(sequence, self._reusable(sequence))
            self.pool.share(known)
            sequence.blocks = list(known)
            for host_block in sequence.host_blocks[len(known) :]:
                if host_block in place:
                    self.pool.share([place[host_block]])
                else:
                    (place[host_block],) = self.pool.take(1)
                    plan.swap_in.append((host_block, place[host_block]))
                sequence.blocks.append(place[host_block])
            # The host blocks can be released before the copies run: no later swap-out can overwrite them
            # first, because a step that admits requests preempts none.
            self.host_pool.release(sequence.host_blocks)
            sequence.host_blocks = []
            sequence.place = Place.DEVICE
            sequence.num_published = len(known)
            self._publish(sequence)

    def _reusable(self, sequence: Sequence) -> int:
        """How many of a sequence's first blocks need not be computed or copied if they are cached.

        At least one token is left to compute, because only a computed token gives logits. A swapped sequence
        reuses at most the blocks that it had computed.
        """
        tokens = sequence.num_computed if sequence.place is Place.HOST else len(sequence.token_ids) - 1
        return tokens // self.limits.block_tokens

    def _cached_prefix(self, sequence: Sequence, num_blocks: int) -> list[int]:
        """Device blocks with the same content as the sequence's first blocks, at most ``num_blocks``."""
        if not self.limits.prefix_cache or num_blocks <= 0:
            return []
        return self.pool.find(sequence.extend_keys(num_blocks, self.limits.block_tokens))

    # ── Admission ─────────────────────────────────────────────────────────────────────────────────

    def _admit(self, plan: Schedule, budget: int) -> None:
        promised = sum(self._promised(request) for request in self.running)
        while budget > 0:
            request = self._next()
            if request is None or self._reserved_rows + request.width > self.limits.max_rows:
                return
            need = self._demand(request)
            spare = self._watermark if self.running else 0
            if need + promised + spare > self.pool.available:
                return
            budget = self._start(plan, request, budget)
            promised += self._promised(request)

    def _next(self) -> Request | None:
        fresh = self.waiting.peek()
        if self.preempted and (fresh is None or self.preempted[0].priority <= fresh.priority):
            return self.preempted[0]
        return fresh

    def _demand(self, request: Request) -> int:
        """Blocks that a request, once admitted, takes from ``available`` until its tokens are computed."""
        shared = len(request.prompt_ids) // self.limits.block_tokens
        total = 0
        for position, sequence in enumerate(request.live):
            blocks = self._blocks_for(len(sequence.token_ids))
            if position:
                total += blocks - shared
            else:
                known = self._cached_prefix(sequence, self._reusable(sequence))
                total += blocks - len(known) + self.pool.count_idle(known)
        return total

    def _promised(self, request: Request) -> int:
        """Blocks that a running request will still take until all its known tokens are computed."""
        shared = len(request.prompt_ids) // self.limits.block_tokens
        return sum(
            self._blocks_for(len(s.token_ids)) - (len(s.blocks) or (shared if i else 0))
            for i, s in enumerate(request.live)
        )

    def _start(self, plan: Schedule, request: Request, budget: int) -> int:
        """Put a request on the device and plan its first chunk. Returns the budget that is left."""
        if self.preempted and request is self.preempted[0]:
            self.preempted.pop(0)
        else:
            self.waiting.remove(request)
        insort(self.running, request, key=order)
        self._reserved_rows += request.width
        for sequence in request.live:
            sequence.row = self._free_rows.pop()
        if any(sequence.place is Place.HOST for sequence in request.live):
            self._swap_in(plan, request)
        else:
            for sequence in request.live:
                sequence.place = Place.DEVICE
            self._reuse_prefix(request.live[0])
        for ask in self._asks(request):
            if len(ask) > budget:
                break
            for sequence, wanted in ask:
                count = min(wanted, budget)
                self._grow(plan, sequence, count)
                budget -= count
        return budget

    def _reuse_prefix(self, sequence: Sequence) -> None:
        """Let the sequence start after its longest cached prefix."""
        known = self._cached_prefix(sequence, self._reusable(sequence))
        self.pool.share(known)
        sequence.blocks = list(known)
        sequence.num_published = len(known)
        sequence.num_computed = len(known) * self.limits.block_tokens
        if self.limits.prefix_cache and not sequence.output_ids:
            self.prefix_queries += len(sequence.token_ids)
            self.prefix_hits += sequence.num_computed
            sequence.cached_tokens = sequence.num_computed
            if known:
                self.pool.record_hit(known[-1])

    # ── State and checks ──────────────────────────────────────────────────────────────────────────

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.preempted or len(self.waiting))

    def requests(self) -> list[Request]:
        return [*self.running, *self.preempted, *self.waiting]

    def check(self) -> None:
        """Check that every block, row and request is where it should be; AssertionError if not."""
        bt = self.limits.block_tokens
        owners: Counter[int] = Counter()
        host_owners: Counter[int] = Counter()
        rows = list(self._free_rows)
        requests = self.requests()
        assert len({id(r) for r in requests}) == len(requests), "a request is in two places"
        assert self.running == sorted(self.running, key=order), "running requests are out of order"
        assert self.preempted == sorted(self.preempted, key=order), "preempted requests are out of order"
        assert self._reserved_rows == sum(r.width for r in self.running), "reserved rows are miscounted"
        for request in requests:
            assert request.live, f"request {request.id} has no live sequence but has not left"
            on_device = request in self.running
            for s in request.live:
                owners.update(s.blocks)
                host_owners.update(s.host_blocks)
                assert s.request is request, f"{s} belongs to another request"
                assert (s.place is Place.DEVICE) == on_device, f"{s} is not where its request is"
                assert (s.row >= 0) == on_device, f"{s} has row {s.row}"
                if on_device:
                    rows.append(s.row)
                assert 0 <= s.num_computed < len(s.token_ids), f"{s} has no token left to compute"
                assert s.token_ids[len(request.prompt_ids) :] == s.output_ids, f"{s} mixes up its output"
                held = s.host_blocks if s.place is Place.HOST else s.blocks
                if s.place is Place.WAITING:
                    assert not s.blocks and not s.host_blocks and s.num_computed == 0, f"{s} holds blocks"
                assert len(held) == self._blocks_for(s.num_computed), f"{s} holds blocks it does not use"
                assert not (s.blocks and s.host_blocks), f"{s} is in two tiers"
                assert s.rows_sent <= len(s.blocks), f"{s} sent table entries it does not have"
                assert s.num_published <= s.num_computed // bt, f"{s} published a block that is not full"
        assert sorted(rows) == list(range(self.limits.max_rows)), (
            f"rows are lost or used twice: {sorted(rows)}"
        )
        self.pool.check(owners)
        if self.host_pool is not None:
            self.host_pool.check(host_owners)
        self.waiting.check()
