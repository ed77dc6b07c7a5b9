"""Whatever the scheduler does with memory and order, every request gets the tokens it would get alone."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from blockyard.engine.engine import Engine
from blockyard.engine.errors import RequestError
from blockyard.engine.outputs import SequenceOutput
from blockyard.engine.sampler import SampledToken
from blockyard.engine.sampling_params import SamplingParams
from blockyard.engine.sequence import Place, Request, Sequence

from .oracle import EOS, VOCAB, MakeEngine, OracleRunner, StepFailed, greedy_reference

Tokens = dict[tuple[str, int], list[int]]


def drain(engine: Engine, tokens: Tokens | None = None, *, limit: int = 5000) -> Tokens:
    """Step until idle, checking every invariant after every step; returns all tokens by choice."""
    tokens = {} if tokens is None else tokens
    for _ in range(limit):
        if not engine.has_work:
            break
        collect(engine.step(), tokens)
        engine.check()
    assert not engine.has_work, "the engine makes no progress"
    usage = engine.stats().device
    assert usage.active == 0 and usage.free + usage.cached == usage.total
    return tokens


def collect(outputs: list[SequenceOutput], tokens: Tokens) -> None:
    for output in outputs:
        tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of which many share a beginning."""
    rng = random.Random(seed)
    stems = [[rng.randrange(4, VOCAB) for _ in range(rng.randrange(1, 30))] for _ in range(3)]
    return [
        rng.choice(stems) + [rng.randrange(4, VOCAB) for _ in range(rng.randrange(1, 12))]
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("block_tokens", "num_blocks", "max_batch_tokens", "preemption", "prefix_cache", "host_blocks"),
    [
        combination
        for combination in itertools.product(
            (2, 8), (40, 200), (5, 64), ("recompute", "swap"), (False, True), (0, 30)
        )
        if not (combination[3] == "recompute" and combination[5])
    ],
)
def test_same_tokens_under_every_combination(
    oracle_engine: MakeEngine,
    block_tokens: int,
    num_blocks: int,
    max_batch_tokens: int,
    preemption: str,
    prefix_cache: bool,
    host_blocks: int,
) -> None:
    engine = oracle_engine(
        block_tokens=block_tokens,
        num_blocks=num_blocks,
        host_blocks=host_blocks,
        max_batch_tokens=max_batch_tokens,
        preemption=preemption,
        prefix_cache=prefix_cache,
        max_num_seqs=5,
    )
    wanted = {}
    for i, prompt in enumerate(prompts(14)):
        engine.add_request(str(i), prompt, SamplingParams(temperature=0, max_tokens=20))
        wanted[str(i), 0] = greedy_reference(prompt, 20)
    assert drain(engine) == wanted
    if not prefix_cache:
        assert engine.stats().prefix_hits == 0


def test_the_matrix_above_preempts_in_both_ways(oracle_engine: MakeEngine) -> None:
    for preemption, host_blocks in (("recompute", 0), ("swap", 100)):
        engine = oracle_engine(num_blocks=24, block_tokens=4, preemption=preemption, host_blocks=host_blocks)
        for i, prompt in enumerate(prompts(8)):
            engine.add_request(str(i), prompt, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
        drain(engine)
        stats = engine.stats()
        assert (stats.preemptions_recompute > 0) == (preemption == "recompute"), stats
        assert (stats.preemptions_swap > 0) == (preemption == "swap"), stats
        assert stats.host.active == 0


def test_a_full_host_tier_falls_back_to_recompute(oracle_engine: MakeEngine) -> None:
    engine = oracle_engine(num_blocks=24, preemption="swap", host_blocks=3)
    wanted = {}
    for i, prompt in enumerate(prompts(8)):
        engine.add_request(str(i), prompt, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
        wanted[str(i), 0] = greedy_reference(prompt, 40, ignore_eos=True)
    assert drain(engine) == wanted
    assert engine.stats().preemptions_recompute > 0


def test_requests_admitted_in_one_step_share_what_that_step_computes(oracle_engine: MakeEngine) -> None:
    engine = oracle_engine(num_blocks=200, max_batch_tokens=100, max_num_seqs=8)
    prompt = [5, 6, 7, 8] * 10
    for i in range(4):
        engine.add_request(str(i), [*prompt, 10 + i], SamplingParams(temperature=0, max_tokens=1))
    engine.step()
    assert isinstance(engine.runner, OracleRunner)
    assert engine.runner.computed_tokens == len(prompt) + 4


def test_a_conversation_hits_its_own_output(oracle_engine: MakeEngine) -> None:
    engine = oracle_engine(num_blocks=200)
    history = [9, 10, 11, 12, 13]
    known = 0  # tokens of which the engine has seen all but the last
    for turn in range(4):
        engine.add_request(
            str(turn), list(history), SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
        )
        outputs: list[SequenceOutput] = []
        while engine.has_work:
            outputs += engine.step()
        # The last token's KV is never computed; everything before it is, in whole blocks.
        assert outputs[0].cached_tokens == (0 if turn == 0 else (known - 1) // 4 * 4)
        history += [t for output in outputs for t in output.token_ids]
        known = len(history)
        history += [20 + turn]


def test_tenants_never_share_blocks(oracle_engine: MakeEngine) -> None:
    engine = oracle_engine(num_blocks=200)
    prompt = [7] * 33
    for tenant in ("a", "b", "a"):
        engine.add_request(tenant, prompt, SamplingParams(temperature=0, max_tokens=1), tenant=tenant)
        drain(engine)
    assert engine.stats().prefix_hits == 32  # the second visit of tenant a alone


def test_priorities_go_first_and_tenants_take_turns(oracle_engine: MakeEngine) -> None:
    engine = oracle_engine(num_blocks=200, max_num_seqs=1)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    for i in range(6):
        engine.add_request(f"greedy-{i}", [5, i + 6], params, tenant="greedy")
    engine.add_request("modest-0", [5, 20], params, tenant="modest")
    engine.add_request("modest-1", [5, 21], params, tenant="modest")
    engine.add_request("urgent", [5, 22], params, tenant="greedy", priority=-1)
    finished = []
    while engine.has_work:
        finished += [o.request_id for o in engine.step() if o.finish_reason]
    assert finished[0] == "urgent"
    assert {"modest-0", "modest-1"} <= set(finished[1:6]), finished


def test_n_shares_the_prompt_and_matches_single_requests(oracle_engine: MakeEngine) -> None:
    prompt = [5, 6, 7, 8, 9, 10]
    alone = oracle_engine(num_blocks=100)
    together = oracle_engine(num_blocks=100)
    params = SamplingParams(temperature=1.0, seed=11, n=4, best_of=4, max_tokens=12, ignore_eos=True)
    together.add_request("r", prompt, params)
    tokens = drain(together)
    assert len(tokens) == 4 and len({tuple(t) for t in tokens.values()}) == 4
    alone.add_request("r", prompt, SamplingParams(temperature=1.0, seed=11, max_tokens=12, ignore_eos=True))
    assert drain(alone)["r", 0] == tokens["r", 0]


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("kind", ["n", "best_of", "beam"])
def test_forked_requests_survive_preemption(oracle_engine: MakeEngine, kind: str, preemption: str) -> None:
    params = {
        "n": SamplingParams(
            temperature=0.9, seed=3, n=3, best_of=3, max_tokens=24, ignore_eos=True, logprobs=1
        ),
        "best_of": SamplingParams(temperature=0.9, seed=3, n=1, best_of=3, max_tokens=24, ignore_eos=True),
        "beam": SamplingParams(temperature=0, n=2, best_of=3, beam_search=True, max_tokens=24),
    }[kind]

    def run(num_blocks: int) -> tuple[Tokens, int]:
        engine = oracle_engine(
            num_blocks=num_blocks, preemption=preemption, host_blocks=60, max_num_seqs=12, max_batch_tokens=16
        )
        for i, prompt in enumerate(prompts(6, seed=5)):
            engine.add_request(str(i), prompt, params)
        tokens = drain(engine)
        stats = engine.stats()
        return tokens, stats.preemptions_recompute + stats.preemptions_swap

    roomy, none = run(600)
    tight, some = run(36)
    assert none == 0 < some
    assert tight == roomy
    assert len(roomy) == 6 * params.n


def test_impossible_requests_are_refused_with_the_numbers(oracle_engine: MakeEngine) -> None:
    engine = oracle_engine(num_blocks=8, block_tokens=4, max_num_seqs=4)
    params = SamplingParams(temperature=0, max_tokens=8)
    with pytest.raises(RequestError, match=r"30 tokens.*together 38.*at most 32") as caught:
        engine.add_request("long", [5] * 30, params)
    assert caught.value.field == "max_tokens"
    with pytest.raises(RequestError, match=r"10 KV blocks.*the pool has 8"):
        engine.add_request("wide", [5] * 4, SamplingParams(temperature=1, max_tokens=13, n=3, best_of=3))
    with pytest.raises(RequestError, match="at most 4"):
        engine.add_request("wider", [5], SamplingParams(n=5, best_of=5, max_tokens=1))
    with pytest.raises(RequestError, match="no tokens"):
        engine.add_request("empty", [], params)
    with pytest.raises(RequestError, match=f"token {VOCAB}"):
        engine.add_request("unknown", [VOCAB], params)
    engine.add_request("twin", [5], params)
    with pytest.raises(RequestError, match="is being served"):
        engine.add_request("twin", [5], params)
    engine.check()
    drain(engine)


def test_a_request_as_large_as_the_pool_is_served(oracle_engine: MakeEngine) -> None:
    for width in (1, 2):
        engine = oracle_engine(num_blocks=8, block_tokens=4, max_batch_tokens=8)
        params = SamplingParams(
            temperature=0, max_tokens=33 - 16 - 8 * (width - 1), n=width, best_of=width, ignore_eos=True
        )
        engine.add_request("large", [5] * (15 if width == 1 else 16), params)
        engine.add_request("next", [6] * 15, SamplingParams(temperature=0, max_tokens=17, ignore_eos=True))
        tokens = drain(engine)
        assert tokens["next", 0] == greedy_reference([6] * 15, 17, ignore_eos=True)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("kind", ["n", "best_of", "beam"])
@pytest.mark.parametrize("width", [2, 3, 5])
@pytest.mark.parametrize("prompt_length", [1, 3, 4, 7])
@pytest.mark.parametrize("max_tokens", [2, 5, 6])
def test_a_forked_request_is_served_by_exactly_the_blocks_it_was_admitted_for(
    oracle_engine: MakeEngine, preemption: str, kind: str, width: int, prompt_length: int, max_tokens: int
) -> None:
    """Of the sequences that share a half-filled block the last one writes to it, and needs no copy."""
    blocks = -(-(prompt_length + max_tokens - 1) // 4)
    blocks += (width - 1) * (blocks - prompt_length // 4)
    params = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        n=1 if kind == "best_of" else width,
        best_of=width,
        beam_search=kind == "beam",
        ignore_eos=True,
    )
    prompt = [5] * prompt_length
    with pytest.raises(RequestError, match=r"the pool has|serves at most"):
        oracle_engine(num_blocks=blocks - 1, preemption=preemption).add_request("r", prompt, params)
    engine = oracle_engine(num_blocks=blocks, host_blocks=50, preemption=preemption)
    engine.add_request("r", prompt, params)
    drain(engine, limit=100)
    stats = engine.stats()
    assert stats.preemptions_recompute == stats.preemptions_swap == 0, "alone it fits"


class EngineMachine(RuleBasedStateMachine):
    """Requests of every kind come, are stepped and aborted in any order under little memory."""

    make: Callable[..., Engine]

    def __init__(self) -> None:
        super().__init__()
        self.tokens: Tokens = {}
        self.wanted: Tokens = {}
        self.aborted: set[str] = set()
        self.count = 0

    @initialize(
        block_tokens=st.sampled_from([1, 2, 4]),
        num_blocks=st.integers(6, 40),
        host_blocks=st.sampled_from([0, 8, 60]),
        max_batch_tokens=st.integers(3, 20),
        preemption=st.sampled_from(["recompute", "swap"]),
        prefix_cache=st.booleans(),
    )
    def start(self, **sizes: object) -> None:
        self.engine = type(self).make(max_num_seqs=6, **sizes)

    @rule(
        stem=st.integers(0, 2),
        length=st.integers(1, 12),
        max_tokens=st.integers(1, 10),
        tenant=st.sampled_from(["", "a", "b"]),
        priority=st.integers(-1, 1),
        width=st.sampled_from([1, 1, 1, 2, 3]),
        kind=st.sampled_from(["n", "best_of", "beam"]),
    )
    def add(
        self, stem: int, length: int, max_tokens: int, tenant: str, priority: int, width: int, kind: str
    ) -> None:
        request_id = str(self.count)
        self.count += 1
        prompt = [5 + stem + (i % 3) for i in range(length)]
        beam = kind == "beam" and width > 1
        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            n=1 if kind == "best_of" or beam else width,
            best_of=width,
            beam_search=beam,
        )
        try:
            self.engine.add_request(request_id, prompt, params, tenant=tenant, priority=priority)
        except RequestError as error:
            if "the pool has" not in str(error) and "at most" not in str(error):
                raise
            return
        if not beam:
            expected = greedy_reference(prompt, max_tokens)
            for index in range(params.n):
                self.wanted[request_id, index] = expected

    @precondition(lambda self: self.engine.has_work)
    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            collect(self.engine.step(), self.tokens)
            self.engine.check()

    @precondition(lambda self: self.engine.has_work)
    @rule(writes=st.integers(0, 40))
    def fail(self, writes: int) -> None:
        assert isinstance(self.engine.runner, OracleRunner)
        self.engine.runner.fuse = writes
        with contextlib.suppress(StepFailed):
            collect(self.engine.step(), self.tokens)

    @precondition(lambda self: self.count)
    @rule(which=st.integers(0, 100), index=st.sampled_from([None, None, 0, 1]))
    def abort(self, which: int, index: int | None) -> None:
        request_id = str(which % self.count)
        self.engine.abort(request_id, index)
        self.aborted.add(request_id)

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        drain(self.engine, self.tokens)
        for choice, expected in self.wanted.items():
            got = self.tokens.get(choice, [])
            if choice[0] in self.aborted:
                assert got == expected[: len(got)]
            else:
                assert got == expected
        host = self.engine.stats().host
        assert host.active == 0


@pytest.mark.parametrize("examples", [150])
def test_engine_machine(oracle_engine: MakeEngine, examples: int) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    machine = type("Machine", (EngineMachine,), {"make": staticmethod(oracle_engine)})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=30, deadline=None)
    )


# ── Steps that fail ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("kind", ["single", "n", "beam"])
def test_a_step_that_fails_at_any_point_leaves_no_lies(
    oracle_engine: MakeEngine, kind: str, preemption: str
) -> None:
    """Every fifth step fails before its first write, then before its second, and so on until it succeeds."""
    sizes = {"num_blocks": 22, "host_blocks": 40, "max_num_seqs": 6, "preemption": preemption}
    width = 1 if kind == "single" else 2
    params = SamplingParams(
        temperature=0,
        max_tokens=12,
        ignore_eos=True,
        best_of=width,
        n=1 if kind == "beam" else width,
        beam_search=kind == "beam",
    )

    def add(engine: Engine) -> None:
        for i in range(5):
            engine.add_request(str(i), [5, 6, 7, 8, 9, 10, 11, 12, 13, i % 3], params)

    unharmed = oracle_engine(**sizes)
    add(unharmed)
    wanted = drain(unharmed)
    engine = oracle_engine(**sizes)
    runner = engine.runner
    assert isinstance(runner, OracleRunner)
    add(engine)
    tokens: Tokens = {}
    failed = writes = 0
    calm = 0  # steps that succeed before the next one fails; siblings need several to come back
    for _ in range(20_000):
        if not engine.has_work:
            break
        runner.fuse = None if calm else writes
        try:
            collect(engine.step(), tokens)
            calm, writes = (calm - 1, 0) if calm else (4, 0)
        except StepFailed:
            writes += 1
            failed += 1
        engine.check()
    assert tokens == wanted and failed > 50
    add(engine)  # finds what is published, and the oracle finds what is not true of it
    assert drain(engine) == wanted


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_step_whose_sampling_fails_is_sampled_again(
    oracle_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    engine = oracle_engine()
    sample, calls = engine._sampler.sample, itertools.count()

    def fail_at_times(*args: Any) -> list[SampledToken]:
        fails = next(calls) % 3 > 0
        if fails and when == "before":
            raise StepFailed
        tokens = sample(*args)
        if fails:
            raise StepFailed
        return tokens

    monkeypatch.setattr(engine._sampler, "sample", fail_at_times)
    params = SamplingParams(temperature=1, seed=7, max_tokens=9, ignore_eos=True)
    wanted: Tokens = {}
    for i, prompt in enumerate(prompts(4)):
        engine.add_request(str(i), prompt, params)
        alone = oracle_engine()
        alone.add_request(str(i), prompt, params)
        wanted |= drain(alone)
    tokens: Tokens = {}
    while engine.has_work:
        with contextlib.suppress(StepFailed):
            collect(engine.step(), tokens)
        engine.check()
    assert tokens == wanted


# ── Aborting in every state ───────────────────────────────────────────────────────────────────────


def _state(engine: Engine, request_id: str) -> str | None:
    """What a request is going through, seen from outside of a step."""
    scheduler = engine.scheduler
    request = engine._requests.get(request_id)
    if request is None:
        return None
    first = request.live[0]
    if request in scheduler.running:
        if not first.output_ids:
            return "prefilling"
        return "catching up" if first.remaining > 1 else "decoding"
    if first.output_ids:
        return "swapped" if any(s.host_blocks for s in request.live) else "dropped"
    return "waiting"


STATES = {
    "recompute": ["waiting", "prefilling", "decoding", "dropped", "catching up"],
    "swap": ["waiting", "prefilling", "decoding", "swapped"],
}


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("kind", ["single", "n", "best_of", "beam"])
@pytest.mark.parametrize(
    ("preemption", "wanted"), [(kind, state) for kind, states in STATES.items() for state in states]
)
def test_a_request_aborted_in_any_state_leaves_nothing(
    oracle_engine: MakeEngine, preemption: str, wanted: str, kind: str, prefix_cache: bool
) -> None:
    width = 1 if kind == "single" else 2
    params = SamplingParams(
        temperature=0,
        max_tokens=30,
        ignore_eos=kind != "beam",
        n=1 if kind == "best_of" else width,
        best_of=width,
        beam_search=kind == "beam",
    )
    engine = oracle_engine(
        num_blocks=30,
        max_batch_tokens=9,
        max_num_seqs=8,
        host_blocks=100,
        preemption=preemption,
        prefix_cache=prefix_cache,
    )
    requests = {str(i): prompt for i, prompt in enumerate(prompts(7, seed=2))}
    for request_id, prompt in requests.items():
        engine.add_request(request_id, prompt, params)
    aborted: set[str] = set()
    tokens: Tokens = {}
    while engine.has_work:
        collect(engine.step(), tokens)
        engine.check()
        for request_id in requests:
            if len(aborted) < 3 and _state(engine, request_id) == wanted:
                held = engine.stats()
                engine.abort(request_id)
                engine.check()
                after = engine.stats()
                assert after.device.active <= held.device.active
                assert after.host.active <= held.host.active
                aborted.add(request_id)
                break  # others move on before the next one goes
    assert aborted, f"no request was ever {wanted}"
    usage = engine.stats()
    assert usage.device.active == usage.host.active == 0
    assert usage.finished["abort"] == len(aborted)
    if kind in ("single", "n"):
        for request_id in requests.keys() - aborted:
            for index in range(width):
                assert tokens[request_id, index] == greedy_reference(
                    requests[request_id], 30, ignore_eos=True
                )


# ── Corruption ────────────────────────────────────────────────────────────────────────────────────


def _first(engine: Engine) -> Sequence:
    return engine.scheduler.running[0].live[0]


def _in_two_places(engine: Engine) -> None:
    engine.scheduler.running.append(engine.scheduler.running[0])


def _running_out_of_order(engine: Engine) -> None:
    engine.scheduler.running.reverse()


def _step_in_the_air(engine: Engine) -> None:
    engine.scheduler._unpublished[b"key"] = 0, 1


def _miscount_reserved_rows(engine: Engine) -> None:
    engine.scheduler._reserved_rows += 1


def _no_live_sequence(engine: Engine) -> None:
    engine.scheduler.running[0].live.clear()


def _adopted(engine: Engine) -> None:
    _first(engine).request = engine.scheduler.running[1]


def _wrong_place(engine: Engine) -> None:
    _first(engine).place = Place.HOST


def _no_row(engine: Engine) -> None:
    _first(engine).row = -1


def _compute_too_far(engine: Engine) -> None:
    _first(engine).num_computed = len(_first(engine).token_ids)


def _mixed_output(engine: Engine) -> None:
    _first(engine).token_ids[-1] += 1


def _waiting_with_blocks(engine: Engine) -> None:
    next(iter(engine.scheduler.queue)).live[0].blocks = [0]


def _leak_a_block(engine: Engine) -> None:
    _first(engine).blocks.pop()


def _two_tiers(engine: Engine) -> None:
    _first(engine).host_blocks = [0]


def _sent_too_much(engine: Engine) -> None:
    _first(engine).rows_sent += 1


def _published_too_much(engine: Engine) -> None:
    _first(engine).num_published += 1


def _free_a_used_row(engine: Engine) -> None:
    engine.scheduler._free_rows.append(_first(engine).row)


def _lose_a_row(engine: Engine) -> None:
    engine.scheduler._free_rows.pop()


def _share_without_reference(engine: Engine) -> None:
    engine.scheduler.running[1].live[0].blocks[0] = _first(engine).blocks[0]


def _leak_a_host_block(engine: Engine) -> None:
    assert engine.scheduler.host_pool is not None
    engine.scheduler.host_pool.take(1)


def _forgotten_tenant(engine: Engine) -> None:
    engine.scheduler.queue._waiting.clear()


def _lost_request(engine: Engine) -> None:
    queue = engine.scheduler.queue
    request = queue.peek()
    assert request is not None
    queue.remove(request)
    queue.settle(request)


def _kept_request(engine: Engine) -> None:
    engine._requests["ghost"] = Request(
        "ghost", [5], SamplingParams(), tenant="", priority=0, arrival=99, root_key=b""
    )


def _too_many_sequences(engine: Engine) -> None:
    request = next(r for r in engine.scheduler.running if len(r.live) > 1)
    request.forked = False


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (_in_two_places, "a request is in two places"),
        (_running_out_of_order, "running requests are out of order"),
        (_step_in_the_air, "neither committed nor revoked"),
        (_miscount_reserved_rows, "reserved rows are miscounted"),
        (_no_live_sequence, "has no live sequence but has not left"),
        (_adopted, "belongs to another request"),
        (_wrong_place, "is not where its request is"),
        (_no_row, "has row -1"),
        (_compute_too_far, "has no token left to compute"),
        (_mixed_output, "mixes up its output"),
        (_waiting_with_blocks, "holds blocks"),
        (_leak_a_block, "holds blocks it does not use"),
        (_two_tiers, "is in two tiers"),
        (_sent_too_much, "sent table entries it does not have"),
        (_published_too_much, "published a block that is not full"),
        (_free_a_used_row, "rows are lost or used twice"),
        (_lose_a_row, "rows are lost or used twice"),
        (_share_without_reference, "references but"),
        (_leak_a_host_block, "references but"),
        (_forgotten_tenant, "is queued but does not wait"),
        (_lost_request, "requests are lost or kept too long"),
        (_kept_request, "requests are lost or kept too long"),
        (_too_many_sequences, "has too many sequences"),
    ],
)
def test_check_notices(oracle_engine: MakeEngine, corrupt: Callable[[Engine], None], message: str) -> None:
    engine = oracle_engine(num_blocks=36, max_num_seqs=9, preemption="swap", host_blocks=100)
    scheduler = engine.scheduler
    for i in range(7):
        width = 1 + (i == 0)
        params = SamplingParams(temperature=0, max_tokens=50, n=width, best_of=width, ignore_eos=True)
        engine.add_request(str(i), [5 + i] * 13, params)
    while not (len(scheduler.queue) > 1 and len(scheduler.running) > 1):
        engine.step()
    engine.add_request("late", [5] * 9, SamplingParams(temperature=0, max_tokens=9))
    engine.check()
    corrupt(engine)
    with pytest.raises(AssertionError, match=message):
        engine.check()


def test_end_of_text_ends_and_is_not_sent(oracle_engine: MakeEngine) -> None:
    prompt = next(
        p
        for p in ([5, i, j] for i in range(4, 40) for j in range(4, 40))
        if len(greedy_reference(p, 30)) < 30
    )
    engine = oracle_engine()
    engine.add_request("r", prompt, SamplingParams(temperature=0, max_tokens=30))
    last = None
    while engine.has_work:
        for output in engine.step():
            last = output
    assert last is not None and last.finish_reason == "stop" and last.stop_token_id == EOS
    assert last.token_ids == []
