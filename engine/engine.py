"""The engine: requests in, tokens out, one step at a time.

It joins the parts: the scheduler decides what a step computes, the runner computes it, the sampler chooses
tokens. The consequences of a token (it ends a sequence, it forks the prompt into ``best_of`` sequences, it
moves the beams) are decided here. Not thread-safe by design: the owner of an engine calls it from one thread,
except for ``compile``.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .beam import BeamSearch
from .config import EngineConfig
from .errors import RequestError, WorkerDied
from .kv.block_key import root_key
from .kv.block_pool import BlockPool
from .outputs import EngineStats, FinishReason, SequenceOutput, TierUsage, TokenLogprob
from .sampler import SampledToken, Sampler, SamplingState
from .sampling_params import SamplingParams, Structure
from .scheduler import Chunk, Limits, Scheduler
from .sequence import Request, Sequence
from .step import StepRunner
from .structured import Grammar, GrammarCompiler

STEP_TIME_DECAY = 0.95
HOTTEST_PREFIXES = 8
_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """The properties of a loaded engine. ``max_model_len`` is the length that both model and pool allow."""

    model: str
    layout_digest: str
    dtype: str
    device: str
    vocab_size: int
    eos_token_ids: list[int]
    max_model_len: int
    max_num_seqs: int
    max_batch_tokens: int
    block_tokens: int
    kv_blocks: int
    block_bytes: int
    host_blocks: int


class Engine:
    """One model on one device group. Raises ConfigError if it cannot be loaded as configured.

    ``runner`` replaces the model that ``config`` names, for tests of everything around the model. If a
    tensor-parallel worker has died, the next step raises WorkerDied. ``on_death`` is called with the same
    error, from another thread, so that the death is also noticed while the engine is idle.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: StepRunner | None = None,
        *,
        on_death: Callable[[WorkerDied], None] | None = None,
    ) -> None:
        if runner is None:
            from .workers import load_runner  # tests bring a runner of their own and need no workers

            runner = load_runner(config, on_death)
        self.runner = runner
        self.info = EngineInfo(
            model=config.model,
            layout_digest=runner.layout_digest,
            dtype=str(runner.dtype).removeprefix("torch."),
            device=str(runner.device),
            vocab_size=runner.vocab_size,
            eos_token_ids=list(runner.eos_token_ids),
            max_model_len=min(runner.max_model_len, runner.num_blocks * config.block_tokens),
            max_num_seqs=runner.max_num_seqs,
            max_batch_tokens=runner.max_batch_tokens,
            block_tokens=config.block_tokens,
            kv_blocks=runner.num_blocks,
            block_bytes=runner.block_bytes,
            host_blocks=runner.host_blocks,
        )
        self.scheduler = Scheduler(
            Limits(
                block_tokens=config.block_tokens,
                max_rows=self.info.max_num_seqs,
                max_batch_tokens=self.info.max_batch_tokens,
                max_model_len=self.info.max_model_len,
                watermark=config.watermark,
                prefix_cache=config.prefix_cache,
                preemption=config.preemption,
            ),
            BlockPool(runner.num_blocks),
            BlockPool(runner.host_blocks) if runner.host_blocks else None,
        )
        self._sampler = Sampler(runner.vocab_size, self.info.eos_token_ids)
        self._grammars = GrammarCompiler(config.model, runner.vocab_size, self.info.eos_token_ids)
        self._eos = frozenset(self.info.eos_token_ids)
        self._requests: dict[str, Request] = {}
        self._arrivals = 0
        self._outputs: list[SequenceOutput] = []  # not yet returned by a step
        self._steps = 0
        self._prompt_tokens = 0
        self._cached_prompt_tokens = 0
        self._generated_tokens = 0
        self._finished: Counter[str] = Counter()
        self._last_step = self._mean_step = 0.0

    # ── Requests ──────────────────────────────────────────────────────────────────────────────────

    def add_request(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        tenant: str = "",
        priority: int = 0,
        grammar: Grammar | None = None,
    ) -> None:
        """Queue a request. RequestError if it can never be served; then nothing of it is kept.

        ``grammar`` is what ``compile`` made of ``params.structure``; without it, it is compiled now.

        ``tenant`` salts the block keys, so that tenants never share KV, and is the unit of fair scheduling. A
        lower ``priority`` is served sooner.
        """
        if request_id in self._requests:
            raise RequestError(f"a request with id {request_id!r} is being served", field="request_id")
        if not prompt_ids:
            raise RequestError("the prompt has no tokens; at least one is needed", field="prompt")
        outside = next((t for t in prompt_ids if not 0 <= t < self.info.vocab_size), None)
        if outside is not None:
            raise RequestError(
                f"the prompt has token {outside}; this model's tokens are 0 to {self.info.vocab_size - 1}",
                field="prompt",
            )
        params.check(vocab_size=self.info.vocab_size)
        if params.structure is not None and grammar is None:
            grammar = self.compile(params.structure)
        request = Request(
            request_id,
            prompt_ids,
            params,
            tenant=tenant,
            priority=priority,
            arrival=self._arrivals,
            root_key=root_key(self.info.layout_digest, tenant),
            beam=BeamSearch(params.best_of, params, self.info.eos_token_ids) if params.beam_search else None,
        )
        seed = secrets.randbits(64) if params.seed is None else params.seed & _MASK
        self.scheduler.add(request, Sequence(request, 0, self._sampling_state(request, seed, grammar)))
        self._arrivals += 1
        self._requests[request_id] = request

    def compile(self, structure: Structure) -> Grammar:
        """The grammar for one request. RequestError if it cannot be used.

        The only method that may be called from another thread, where it holds up no step: it takes
        milliseconds, but seconds if the schema is large.
        """
        return self._grammars.compile(structure)

    @staticmethod
    def _sampling_state(request: Request, seed: int, grammar: Grammar | None) -> SamplingState:
        return SamplingState(
            params=request.params, seed=seed, prompt_ids=request.prompt_ids, output_ids=[], grammar=grammar
        )

    def abort(self, request_id: str, index: int | None = None, reason: FinishReason = "abort") -> None:
        """Drop a request, or one choice of it; its blocks are free at once. Unknown ids are ignored.

        The request is counted under ``reason``: "stop" if the caller, which sees the text, has found its end.
        A single choice cannot be dropped if the choices are ranked at the end (``best_of > n``, beams) or do
        not decode separately yet; such a call is ignored.
        """
        request = self._requests.get(request_id)
        if request is None or (index is not None and (request.holds_back or not request.forked)):
            return
        for sequence in list(request.live):
            if index is None or sequence.index == index:
                self.scheduler.finish(sequence, reason)
        if not request.live:
            self._forget(request, reason)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    # ── One step ──────────────────────────────────────────────────────────────────────────────────

    def step(self) -> list[SequenceOutput]:
        """Compute one step and return its new tokens, those of sequences that finished included.

        If it raises, every request goes on, in the next step, from the tokens that it has.
        """
        plan = self.scheduler.schedule()
        if plan.empty:
            return []
        begin = time.perf_counter()
        try:
            logits = self.runner.execute(plan.to_step_input())
            self.scheduler.commit()
            sampled = [chunk for chunk in plan.chunks if chunk.samples]
            if sampled:
                assert logits is not None
                self._sample(sampled, logits)
        except BaseException:
            self.scheduler.revoke()
            raise
        self._last_step = time.perf_counter() - begin
        decay = STEP_TIME_DECAY if self._steps else 0.0
        self._mean_step = decay * self._mean_step + (1 - decay) * self._last_step
        self._steps += 1
        outputs, self._outputs = self._outputs, []
        return outputs

    def _sample(self, chunks: list[Chunk], logits: Tensor) -> None:
        beams: dict[Request, list[int]] = {}
        states: list[SamplingState] = []
        owners: list[Sequence] = []
        source: list[int] = []  # logits row of each state
        for row, chunk in enumerate(chunks):
            sequence = chunk.sequence
            request = sequence.request
            if request.beam is not None:
                beams.setdefault(request, []).append(row)
                continue
            for twin in [sequence] if request.forked else self._fork(sequence):
                states.append(twin.sampling)
                owners.append(twin)
                source.append(row)
        if states:
            rows = logits if source == list(range(len(logits))) else logits[source]
            for sequence, token in zip(owners, self._sampler.sample(rows, states), strict=True):
                if sequence.request.live:  # else it has failed with one of its other sequences
                    self._advance(sequence, token)
        for request, rows_of in beams.items():
            self._advance_beams(request, logits[rows_of])

    def _fork(self, first: Sequence) -> list[Sequence]:
        """The prompt is computed: make the other ``best_of`` sequences, which go on separately."""
        request = first.request
        request.forked = True
        for index in range(1, request.width):
            seed = (first.sampling.seed + index * 0x9E3779B97F4A7C15) & _MASK
            self.scheduler.fork(first, first.fork(index, first.sampling.fork(seed, list(first.output_ids))))
        return list(request.live)

    def _advance(self, sequence: Sequence, token: SampledToken) -> None:
        """Append one token to a sequence, and finish it if the token says so."""
        request, params = sequence.request, sequence.request.params
        if not sequence.output_ids:
            self._count_prompt(sequence)
        grammar = sequence.sampling.grammar
        if grammar is not None and grammar.error is not None:
            self._fail(request, grammar.error)
            return
        sequence.cumulative_logprob += token.logprob
        reason: FinishReason | None = None
        heeds_eos = not params.ignore_eos or grammar is not None  # after a grammar's end nothing can follow
        if (token.token_id in self._eos and heeds_eos) or token.token_id in params.stop_token_ids:
            reason, sequence.stop_token_id = "stop", token.token_id
        else:
            sequence.append(token.token_id)
            self._generated_tokens += 1
            if params.logprobs is not None:
                sequence.logprobs.append(TokenLogprob(token.token_id, token.logprob, token.top or []))
            if grammar is not None and grammar.finished:
                reason = "stop"
            elif len(sequence.output_ids) >= params.max_tokens:
                reason = "length"
        if not request.holds_back:
            new = sequence.output_ids[-1:] if sequence.stop_token_id is None else []
            logprobs = None if params.logprobs is None else sequence.logprobs[-len(new) :] if new else []
            self._outputs.append(self._output(sequence, sequence.index, new, logprobs, reason))
        if reason is not None:
            self.scheduler.finish(sequence, reason)
            if not request.live:
                self._complete(request)

    def _fail(self, request: Request, error: str) -> None:
        """End a request whose output cannot go on as it was asked for."""
        self._outputs.append(SequenceOutput(request.id, 0, [], finish_reason="abort", error=error))
        self.abort(request.id)

    def _count_prompt(self, sequence: Sequence) -> None:
        if sequence.index == 0:
            self._prompt_tokens += len(sequence.request.prompt_ids)
            self._cached_prompt_tokens += sequence.cached_tokens

    @staticmethod
    def _output(
        sequence: Sequence,
        index: int,
        token_ids: list[int],
        logprobs: list[TokenLogprob] | None,
        reason: FinishReason | None,
    ) -> SequenceOutput:
        return SequenceOutput(
            request_id=sequence.request.id,
            index=index,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=reason,
            stop_token_id=sequence.stop_token_id,
            cached_tokens=sequence.cached_tokens,
            cumulative_logprob=sequence.cumulative_logprob,
        )

    def _complete(self, request: Request) -> None:
        """All sequences have finished: send the choices that were held back, best first."""
        params = request.params
        if request.holds_back and request.beam is None:

            def mean_logprob(sequence: Sequence) -> float:
                return sequence.cumulative_logprob / max(1, len(sequence.output_ids))

            for rank, sequence in enumerate(
                sorted(request.finished, key=mean_logprob, reverse=True)[: params.n]
            ):
                logprobs = None if params.logprobs is None else sequence.logprobs
                self._outputs.append(
                    self._output(sequence, rank, list(sequence.output_ids), logprobs, sequence.finish_reason)
                )
        self._forget(request, request.finished[0].finish_reason or "stop")

    def _forget(self, request: Request, reason: str) -> None:
        self._finished[reason] += 1
        del self._requests[request.id]

    # ── Beam search ───────────────────────────────────────────────────────────────────────────────

    def _advance_beams(self, request: Request, logits: Tensor) -> None:
        """Replace the live beams by the best continuations of all of them."""
        beam = request.beam
        assert beam is not None
        parents = list(request.live)
        if not parents[0].output_ids:
            self._count_prompt(parents[0])
        states = [sequence.sampling for sequence in parents]
        candidates = self._sampler.continuations(logits, states, beam.totals, beam.considered)
        if error := next((s.grammar.error for s in states if s.grammar and s.grammar.error), None):
            self._fail(request, error)
            return
        decision = beam.step(candidates, lambda parent, token_id: states[parent].completes(token_id))
        if beam.done:
            self._finish_beams(request)
            return
        children: dict[int, list[tuple[int, int, float]]] = {}
        for place, (parent, token_id, cumulative) in enumerate(decision.continue_):
            children.setdefault(parent, []).append((place, token_id, cumulative))
        for index, parent_sequence in enumerate(parents):
            if index not in children:
                self.scheduler.discard(parent_sequence)  # first, since a fork may need the freed row
        placed: list[Sequence] = []
        for index, offspring in children.items():
            parent_sequence = parents[index]
            twins = [parent_sequence]
            for _ in offspring[1:]:
                sampling = parent_sequence.sampling.fork(
                    parent_sequence.sampling.seed, list(parent_sequence.output_ids)
                )
                twin = parent_sequence.fork(0, sampling)
                self.scheduler.fork(parent_sequence, twin)
                twins.append(twin)
            for twin, (place, token_id, cumulative) in zip(twins, offspring, strict=True):
                twin.index = place
                twin.append(token_id)
                if twin.sampling.grammar is not None:
                    twin.sampling.grammar.accept(token_id)
                twin.cumulative_logprob = cumulative
                placed.append(twin)
        request.live.sort(key=lambda sequence: sequence.index)
        self._generated_tokens += len(placed)

    def _finish_beams(self, request: Request) -> None:
        assert request.beam is not None
        first = request.live[0]
        best = request.beam.results(request.params.n)
        for rank, hypothesis in enumerate(best):
            self._outputs.append(
                SequenceOutput(
                    request_id=request.id,
                    index=rank,
                    token_ids=[token.token_id for token in hypothesis.tokens],
                    logprobs=None if request.params.logprobs is None else list(hypothesis.tokens),
                    finish_reason=hypothesis.reason,
                    cached_tokens=first.cached_tokens,
                    cumulative_logprob=hypothesis.score,
                )
            )
        for sequence in list(request.live):
            self.scheduler.finish(sequence, best[0].reason)
        self._forget(request, best[0].reason)

    # ── Statistics and checks ─────────────────────────────────────────────────────────────────────

    def stats(self) -> EngineStats:
        """A snapshot; cheap enough to be taken ten times a second."""
        scheduler, info = self.scheduler, self.info
        host = scheduler.host_pool
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.queue),
            swapped=sum(bool(r.live[0].host_blocks) for r in scheduler.queue),
            device=scheduler.pool.usage(info.block_bytes),
            host=TierUsage() if host is None else host.usage(info.block_bytes),
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._cached_prompt_tokens,
            generated_tokens=self._generated_tokens,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            preemptions_recompute=scheduler.preemptions["recompute"],
            preemptions_swap=scheduler.preemptions["swap"],
            finished=dict(self._finished),
            last_step_ms=self._last_step * 1e3,
            mean_step_ms=self._mean_step * 1e3,
            hottest_prefixes=scheduler.pool.hottest(HOTTEST_PREFIXES, block_tokens=info.block_tokens),
        )

    def check(self) -> None:
        """Check the engine's invariants; AssertionError names the broken one. For tests and idle times."""
        self.scheduler.check()
        known = {id(request) for request in self.scheduler.requests()}
        assert known == {id(request) for request in self._requests.values()}, (
            "requests are lost or kept too long"
        )
        for request in self._requests.values():
            assert request.forked or request.beam or len(request.live) == 1, (
                f"{request.id} has too many sequences"
            )

    def close(self) -> None:
        """End worker and child processes and free the device."""
        self._grammars.close()
        self.runner.close()
