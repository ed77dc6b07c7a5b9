"""The scheduler: which tokens of which sequences the next step computes, and which requests are preempted.

There is no prefill phase and no decode phase (as in vLLM): each sequence has some tokens left to compute,
and all sequences share one budget of tokens per step. Decodes come first. What they leave of the budget goes
to the requests that wait, prompts in progress and requests in the queue alike, in the order of the FairQueue:
lower priority numbers first, then tenants in turn, then the oldest request.

- A request is *admitted* from the queue when the pool has blocks for all its known tokens, for the tokens
  that running requests have left, and for a watermark. Otherwise the admission itself would cause the next
  preemption. The first in the queue is never overtaken by a smaller one.
- A running request is *preempted*, with all its sequences, when the pool has too few blocks for the growth of
  those before it in service order: by recompute (drop the KV) or by swap (move it to the host tier). A step
  that preempts admits nothing.
- A prompt in progress is *displaced* for the first in the queue, which would not fit otherwise, by one of a
  higher priority, or by another tenant over which its own has a lead of twice what it would lose. So a prompt
  that is displaced again and again still makes progress, and is computed at most twice in sum.

What this means for one that waits, if there are blocks: with n tenants that wait, a prompt that fits into a
step gets its first token after about n steps, one of the highest priority in the next step, however long the
prompts in progress are. Those get an equal share of the budget, and lose no more than that.

A block that is full at the end of a step is published to the prefix index when the step has succeeded
(``commit``). Requests of the same step may share it before, because a step writes each layer's KV before any
of its queries reads that layer. After a step that failed (``revoke``) no request keeps what it had on the
device; what earlier steps had published is found again.

Every exit of a sequence (finish, abort, preempt) releases its resources through ``_vacate`` alone: several
release paths are where other engines got leaks.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from math import ceil

import numpy as np

from .config import PreemptionKind
from .errors import RequestError
from .fair_queue import OUTPUT_WEIGHT, FairQueue, order
from .kv.block_pool import BlockPool
from .outputs import FinishReason
from .sequence import Place, Request, Sequence
from .step import StepInput

# Tokens that sequences have left; the sequences of one ask are served together or not at all.
Ask = list[tuple[Sequence, int]]


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
        self.queue: FairQueue[Request] = FairQueue()  # new and preempted requests: WAITING or HOST
        self.running: list[Request] = []  # in service order
        # As many as a step can decode: whoever is admitted then always gets some of the budget.
        self._max_rows = min(limits.max_rows, limits.max_batch_tokens)
        self._free_rows = list(range(limits.max_rows - 1, -1, -1))
        self._reserved_rows = 0  # sum of the widths of all running requests
        self._watermark = ceil(len(pool) * limits.watermark)
        self._unpublished: dict[bytes, tuple[int, int]] = {}  # key -> block and depth, filled by this step
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.preemptions: Counter[str] = Counter()

    # ── Entering and leaving ──────────────────────────────────────────────────────────────────────

    def add(self, request: Request, first: Sequence) -> None:
        """Queue a request; RequestError if it could not be served even if it were alone."""
        self._refuse_impossible(request)
        request.live.append(first)
        self.queue.push(request)

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
        if request.width > self._max_rows:
            raise RequestError(
                f"{request.width} sequences are wanted at once; this server decodes at most "
                f"{self._max_rows}. Lower n or best_of",
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
        else:
            self.queue.remove(request)
        self.queue.settle(request)

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
        """Plan the next step; ``commit`` or ``revoke`` follows. An empty one means: nothing to compute."""
        plan = Schedule()
        room = self._displace(self._room()) if len(self.queue) else -1
        if room < 0:
            self._serve(plan)
        else:
            self._serve_and_admit(plan, room)
        plan.chunks.sort(key=lambda chunk: chunk.count > 1)
        return plan

    def commit(self) -> None:
        """The planned step has succeeded: publish the blocks that it filled."""
        for key, (block, depth) in self._unpublished.items():
            self.pool.publish(block, key, depth)
        self._unpublished.clear()

    def revoke(self) -> None:
        """The planned step has failed: what it should have written, on any tier, is computed again."""
        self._unpublished.clear()
        for request in list(self.running):
            self._to_queue(request)
        for request in self.queue:
            for sequence in request.live:
                self._vacate(sequence, Place.WAITING)

    def _serve(self, plan: Schedule) -> None:
        """Give the running requests tokens, preempting the last ones until the growth of the others fits."""
        wanted: dict[Sequence, tuple[int, int]] = {}  # -> tokens, new blocks; in the order of growth
        copies: Counter[int] = Counter()  # how many sequences will have copied a shared block in this step
        budget = self.limits.max_batch_tokens
        claimed = 0  # blocks that the chosen sequences will take
        decodes, prefills = self._asks_of_running()
        for ask in decodes + prefills:
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
        for sequence, (count, _) in wanted.items():
            self._grow(plan, sequence, count)

    def _serve_and_admit(self, plan: Schedule, room: int) -> None:
        """Give the running requests tokens, whose growth fits, and admit queued ones in their turn.

        ``room`` is how many blocks the pool has beyond what the running requests have left to take.
        """
        budget = self.limits.max_batch_tokens
        decodes, prefills = self._asks_of_running()
        for ask in decodes:
            budget = self._give(plan, ask, budget)
        admits = True
        while budget > 0:
            next_ask = min(prefills, key=self._rank) if prefills else None
            head = self.queue.peek() if admits else None
            if head is not None and (next_ask is None or self.queue.rank(head) < self._rank(next_ask)):
                need = self._demand(head)
                admits = self._fits(head, need, room)
                if admits:
                    room -= need
                    self._start(plan, head)
                    prefills += self._asks(head)
            elif next_ask is not None:
                prefills.remove(next_ask)
                budget = self._give(plan, next_ask, budget)
            else:
                return

    def _give(self, plan: Schedule, ask: Ask, budget: int) -> int:
        """Grow the sequences of an ask within the budget. Returns what is left of it."""
        if len(ask) > budget:
            return budget
        for sequence, wanted in ask:
            count = min(wanted, budget)
            self._grow(plan, sequence, count)
            budget -= count
        return budget

    def _rank(self, ask: Ask) -> tuple[int, int, int]:
        return self.queue.rank(ask[0][0].request)

    def _asks_of_running(self) -> tuple[list[Ask], list[Ask]]:
        """The asks of decodes, in service order, and of sequences that are behind, in fair order."""
        asks = [ask for request in self.running for ask in self._asks(request)]
        decodes = [ask for ask in asks if all(count == 1 for _, count in ask)]
        prefills = [ask for ask in asks if any(count > 1 for _, count in ask)]
        prefills.sort(key=self._rank)
        return decodes, prefills

    def _asks(self, request: Request) -> list[Ask]:
        """What a running request asks of this step."""
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
        self._note_full(sequence)
        request = sequence.request
        self.queue.charge(request.tenant, OUTPUT_WEIGHT if samples and count == 1 else count)
        if samples and all(twin.remaining == 0 for twin in request.live):
            self.queue.settle(request)

    def _note_full(self, sequence: Sequence) -> None:
        """Note the blocks that are full by the end of this step, to be published if it succeeds."""
        if not self.limits.prefix_cache:
            return
        full = sequence.num_computed // self.limits.block_tokens
        if full > sequence.num_published:
            keys = sequence.extend_keys(full, self.limits.block_tokens)
            for index in range(sequence.num_published, full):
                self._unpublished.setdefault(keys[index], (sequence.blocks[index], index + 1))
            sequence.num_published = full

    # ── Preemption ────────────────────────────────────────────────────────────────────────────────

    def _preempt(self, plan: Schedule, request: Request) -> None:
        """Take a running request off the device, with its KV if it can be swapped."""
        plan.preempted += 1
        by_swap = self.limits.preemption == "swap" and self._swap_out(plan, request)
        self.preemptions["swap" if by_swap else "recompute"] += 1
        self._to_queue(request)

    def _to_queue(self, request: Request) -> None:
        """Put a running request back into the queue, without the KV that is still on the device."""
        for sequence in request.live:
            if sequence.place is Place.DEVICE:
                self._vacate(sequence, Place.WAITING)
        self.running.remove(request)
        self._reserved_rows -= request.width
        self.queue.push(request)

    def _displace(self, room: int) -> int:
        """Take prompts in progress off the device if that makes room for the first in the queue.

        Takes and returns the room that there is, see ``_room``.
        """
        head = self.queue.peek()
        assert head is not None
        prompts = [r for r in self.running if not r.live[0].output_ids and self._yields(r, head)]
        if not prompts:
            return room
        prompts.sort(key=self.queue.rank)
        need, rows, gain = self._demand(head), 0, 0
        displaced: list[Request] = []
        wanted = set(self._cached_prefix(head.live[0], self._reusable(head.live[0])))
        while prompts and not self._fits(head, need, room + gain, rows):
            victim = prompts.pop()
            displaced.append(victim)
            own = [b for b in victim.live[0].blocks if self.pool.references(b) == 1 and b not in wanted]
            rows += victim.width
            gain += len(own) + self._promised(victim, Counter())
        if not displaced or not self._fits(head, need, room + gain, rows):
            return room
        for victim in displaced:
            self.preemptions["recompute"] += 1
            self._to_queue(victim)
        return self._room()

    def _yields(self, request: Request, head: Request) -> bool:
        """Whether a prompt in progress must go if the first in the queue needs its blocks."""
        if request.priority != head.priority or request.tenant == head.tenant:
            return request.priority > head.priority
        lost = request.live[0].num_computed
        if self.limits.prefix_cache:  # only the blocks that the other one takes are lost
            grown = self._blocks_for(len(head.prompt_ids) + head.params.max_tokens) * head.width
            lost = min(lost, grown * self.limits.block_tokens)
        return self.queue.lead(request, head) > 2 * lost

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
            self._note_full(sequence)

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
        keys = sequence.extend_keys(num_blocks, self.limits.block_tokens)
        known = self.pool.find(keys)
        for key in islice(keys, len(known), None):
            if key not in self._unpublished:
                break
            known.append(self._unpublished[key][0])
        return known

    # ── Admission ─────────────────────────────────────────────────────────────────────────────────

    def _room(self) -> int:
        """Blocks that the pool has beyond what running requests take until their known tokens are computed.

        Copy-on-write included; negative if it has too few.
        """
        copies: Counter[int] = Counter()
        return self.pool.available - sum(self._promised(request, copies) for request in self.running)

    def _fits(self, request: Request, need: int, room: int, rows: int = 0) -> bool:
        """Whether a request that takes ``need`` blocks can be admitted, with ``rows`` more rows free."""
        spare = self._watermark if self.running else 0
        return self._reserved_rows - rows + request.width <= self._max_rows and need + spare <= room

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

    def _promised(self, request: Request, copies: Counter[int]) -> int:
        """Blocks that a running request will still take until all its known tokens are computed.

        ``copies`` is as in ``_growth``.
        """
        shared = len(request.prompt_ids) // self.limits.block_tokens
        return sum(
            self._growth(s, s.remaining, copies)
            if s.blocks or not i  # the others will share the leader's blocks of the prompt
            else self._blocks_for(len(s.token_ids)) - shared
            for i, s in enumerate(request.live)
        )

    def _start(self, plan: Schedule, request: Request) -> None:
        """Put a queued request on the device."""
        self.queue.remove(request)
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
        return bool(self.running or len(self.queue))

    def requests(self) -> list[Request]:
        return [*self.running, *self.queue]

    def check(self) -> None:
        """Check that every block, row and request is where it should be; AssertionError if not."""
        bt = self.limits.block_tokens
        owners: Counter[int] = Counter()
        host_owners: Counter[int] = Counter()
        rows = list(self._free_rows)
        requests = self.requests()
        assert len({id(r) for r in requests}) == len(requests), "a request is in two places"
        assert self.running == sorted(self.running, key=order), "running requests are out of order"
        assert not self._unpublished, "a step was neither committed nor revoked"
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
        self.queue.check(self.running)
