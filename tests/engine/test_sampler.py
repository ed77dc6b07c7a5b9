"""The sampler: frequencies follow the distribution that was asked for, and rows never disturb each other."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockyard.engine.sampler import NUCLEUS_CANDIDATES, Sampler, SamplingState, _finite, uniform
from blockyard.engine.sampling_params import SamplingParams

DRAWS = 8000


def state(
    params: SamplingParams, seed: int = 0, prompt: tuple[int, ...] = (), output: tuple[int, ...] = ()
) -> SamplingState:
    return SamplingState(params, seed, list(prompt), list(output))


def logits_of(vocab: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(vocab).astype(np.float32)) * scale


def expected_probs(logits: torch.Tensor, p: SamplingParams) -> np.ndarray:
    """The distribution by its definition: temperature, then min-p, then top-k, then top-p of what is left."""
    x = logits.double().numpy() / p.temperature
    probs = np.exp(x - x.max())
    probs /= probs.sum()
    keep = probs >= p.min_p * probs.max()
    order = np.argsort(-probs, kind="stable")
    if p.top_k:
        keep[order[p.top_k :]] = False
    probs = np.where(keep, probs, 0)
    probs /= probs.sum()
    if p.top_p < 1:
        before = 0.0
        for token in order:
            if before >= p.top_p:
                probs[token] = 0
            before += probs[token]
        probs /= probs.sum()
    return probs


@pytest.mark.parametrize("vocab", [50, 1500])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0),
        SamplingParams(top_k=5),
        SamplingParams(top_k=1),
        SamplingParams(top_p=0.7),
        SamplingParams(top_p=0.999, temperature=3.0),  # more tokens than the short cut looks at
        SamplingParams(min_p=0.1),
        SamplingParams(min_p=0.05, top_k=8, top_p=0.8, temperature=1.3),
        SamplingParams(top_k=1200, top_p=0.95, temperature=4.0),
    ],
    ids=lambda p: f"t{p.temperature}-k{p.top_k}-p{p.top_p}-m{p.min_p}",
)
def test_frequencies_equal_probabilities(params: SamplingParams, vocab: int) -> None:
    logits = logits_of(vocab)
    sampler = Sampler(vocab, [0])
    states = [state(params, seed) for seed in range(DRAWS)]
    counts: Counter[int] = Counter()
    for begin in range(0, DRAWS, 500):
        batch = states[begin : begin + 500]
        counts.update(t.token_id for t in sampler.sample(logits.expand(len(batch), -1), batch))
    probs = expected_probs(logits, params)
    observed = np.array([counts[t] for t in range(vocab)])
    assert not observed[probs == 0].any(), "a token was drawn that the filters exclude"
    # Chi-square over cells with at least five expected draws; the rest is one cell.
    cells = probs * DRAWS >= 5
    e = np.append(probs[cells], probs[~cells].sum()) * DRAWS
    o = np.append(observed[cells], observed[~cells].sum())
    e, o = e[e > 0], o[e > 0]
    statistic, degrees = ((o - e) ** 2 / e).sum(), len(e) - 1
    assert statistic <= degrees + 5 * math.sqrt(2 * degrees) + 1e-9, (statistic, degrees)


def test_the_short_cut_of_top_p_gives_what_a_full_sort_gives() -> None:
    """A flat distribution, whose nucleus is larger than NUCLEUS_CANDIDATES, next to a peaked one."""
    vocab = 4 * NUCLEUS_CANDIDATES
    flat, peaked = logits_of(vocab, scale=0.1), logits_of(vocab, scale=6.0)
    params = SamplingParams(top_p=0.9)
    sampler = Sampler(vocab, [0])
    probs = torch.softmax(torch.stack([flat, peaked]), -1)
    kept = sampler._keep_best(probs, [params, params])
    for row, logits in zip(kept, (flat, peaked), strict=True):
        allowed = expected_probs(logits, params) > 0
        # Rounding may move the boundary by a token.
        assert abs(int((row > 0).sum()) - int(allowed.sum())) <= 1
    assert (kept[0] > 0).sum() > NUCLEUS_CANDIDATES


def test_uniform_numbers_are_uniform_and_reproducible() -> None:
    values = np.array([uniform(seed, counter) for seed in range(200) for counter in range(50)])
    assert values.min() >= 0 and values.max() < 1
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 19 + 5 * math.sqrt(38)
    for lag in (1, 50):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 0.05
    # Pinned: a resumed or moved sequence must draw what it would have drawn.
    assert (uniform(0, 0), uniform(7, 3)) == (0.28176129772258496, 0.4435643336165034)


@given(
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6, unique=True),
    drawn=st.integers(0, 5),
    position=st.integers(0, 5),
)
def test_same_seed_same_token_whatever_the_batch(seeds: list[int], drawn: int, position: int) -> None:
    vocab = 80
    sampler = Sampler(vocab, [0])
    rows = torch.stack([logits_of(vocab, seed=i) for i in range(len(seeds))])
    mixes = [
        SamplingParams(temperature=0.9),
        SamplingParams(top_p=0.8),
        SamplingParams(temperature=0),
        SamplingParams(temperature=1.5, top_k=9, logprobs=2),
        SamplingParams(min_p=0.1, presence_penalty=0.5),
    ]
    states = [state(mixes[i % 5], seed, output=tuple(range(drawn))) for i, seed in enumerate(seeds)]
    together = [t.token_id for t in sampler.sample(rows, states)]
    alone = [sampler.sample(rows[i : i + 1], [s])[0].token_id for i, s in enumerate(states)]
    assert together == alone
    cut = position % len(seeds)
    turned = [*range(cut, len(seeds)), *range(cut)]
    assert [t.token_id for t in sampler.sample(rows[turned], [states[i] for i in turned])] == [
        together[i] for i in turned
    ]


def test_penalties_and_bias_equal_their_formulas() -> None:
    vocab, prompt, output = 30, (3, 4, 4), (5, 5, 6, 3)
    logits = logits_of(vocab)
    p = SamplingParams(
        temperature=0,
        repetition_penalty=1.3,
        presence_penalty=0.7,
        frequency_penalty=0.4,
        logit_bias={1: 2.5, 5: -1.0},
    )
    expected = logits.clone()
    for token, bias in p.logit_bias.items():
        expected[token] += bias
    for token in {*prompt, *output}:
        expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
    for token, count in Counter(output).items():
        expected[token] -= 0.7 + 0.4 * count
    row = Sampler(vocab, [0])._adjust_row(logits, state(p, prompt=prompt, output=output))
    assert row is not None
    torch.testing.assert_close(row, expected)


def test_repetition_penalty_equals_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = logits_of(30)
    p = SamplingParams(temperature=0, repetition_penalty=1.7)
    row = Sampler(30, [0])._adjust_row(logits, state(p, prompt=(3, 9), output=(4, 3)))
    assert row is not None
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[3, 9, 4, 3]]), logits[None].clone())
    torch.testing.assert_close(row, expected[0])


def test_min_tokens_forbids_every_end() -> None:
    vocab = 20
    logits = logits_of(vocab)
    logits[[2, 7, 9]] = torch.tensor([50.0, 60.0, 70.0])
    sampler = Sampler(vocab, [2, 7])
    params = SamplingParams(temperature=0, min_tokens=3, max_tokens=5, stop_token_ids=(9, 400))
    early = sampler.sample(logits[None], [state(params, output=(1, 1))])[0].token_id
    late = sampler.sample(logits[None], [state(params, output=(1, 1, 1))])[0].token_id
    assert early not in (2, 7, 9)
    assert late == 9


def test_logprobs_are_of_the_model_and_not_of_what_was_done_to_it() -> None:
    vocab = 40
    logits = logits_of(vocab)
    params = SamplingParams(temperature=0.3, logprobs=4, logit_bias={6: 100.0})
    (token,) = Sampler(vocab, [0]).sample(logits[None], [state(params)])
    expected = torch.log_softmax(logits, -1)
    assert token.token_id == 6
    assert token.logprob == pytest.approx(float(expected[6]), abs=1e-5)
    values, ids = expected.topk(4)
    assert token.top is not None
    assert [t for t, _ in token.top] == ids.tolist()
    assert [v for _, v in token.top] == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("whole_row", [True, False])
def test_a_broken_row_does_not_hurt_its_batch_mates(poison: float, whole_row: bool) -> None:
    vocab = 60
    rows = torch.stack([logits_of(vocab, seed=i) for i in range(4)])
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.8, logprobs=3),
        SamplingParams(temperature=0),
        SamplingParams(top_p=0.5, logprobs=2),
    ]
    sampler = Sampler(vocab, [0])
    for chosen in (params, [params[0]] * 4):  # with drawing, and all greedy
        states = [state(p, seed=i) for i, p in enumerate(chosen)]
        healthy = sampler.sample(rows, states)
        broken = rows.clone()
        broken[1, :] = poison if whole_row else broken[1, :]
        broken[1, 5] = poison
        before = broken.clone()
        result = sampler.sample(broken, states)
        assert [r for i, r in enumerate(result) if i != 1] == [r for i, r in enumerate(healthy) if i != 1]
        assert 0 <= result[1].token_id < vocab
        # What is reported goes into JSON, which knows no NaN.
        assert all(math.isfinite(v) for v in (result[1].logprob, *(v for _, v in result[1].top or [])))
        assert torch.equal(torch.nan_to_num(broken), torch.nan_to_num(before)), "logits were changed"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sound_logits_whose_sum_overflows_take_the_fast_path(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    import blockyard.engine.sampler as module

    vocab = 150_000
    rows = torch.full((3, vocab), torch.finfo(dtype).max / 4, dtype=dtype)
    assert not torch.isfinite(rows.sum())
    best = [7, vocab - 1, 70_000]
    rows[[0, 1, 2], best] = torch.finfo(dtype).max
    single = rows.float()
    assert _finite(single) is single
    drawn = [state(SamplingParams(temperature=1e-9), seed=i) for i in range(3)]
    assert [t.token_id for t in Sampler(vocab, [0]).sample(rows, drawn)] == best
    monkeypatch.setattr(module, "_finite", lambda _: pytest.fail("the slow path was taken"))
    plain = [state(SamplingParams(temperature=0))] * 3
    assert [t.token_id for t in Sampler(vocab, [0]).sample(rows, plain)] == best


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("row", "best"),
    [
        ([0.0, 2.0, math.nan, 1.0], 1),
        ([math.nan] * 4, 0),
        ([math.nan, -1e4, -math.inf, -2e4], 1),
        ([-1.0, -math.inf, 3.0, 3.0], 2),
        ([-math.inf] * 4, 0),
        ([0.0, 1.0, math.inf, math.inf], 2),
        ([math.nan, 1.0, math.nan, math.inf], 3),
    ],
)
def test_the_best_of_a_broken_row_is_its_best_number(dtype: torch.dtype, row: list[float], best: int) -> None:
    rows = torch.tensor([[1.0, 5.0, 2.0, 3.0], row], dtype=dtype)
    plain = [state(SamplingParams(temperature=0))] * 2
    assert [t.token_id for t in Sampler(4, [0]).sample(rows, plain)] == [1, best]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_sampled_in_single_precision(dtype: torch.dtype) -> None:
    rows = torch.stack([logits_of(100, seed=i) for i in range(8)]).to(dtype)
    states = [state(SamplingParams(temperature=0.9), seed=i) for i in range(8)]
    sampler = Sampler(100, [0])
    assert sampler.sample(rows, states) == sampler.sample(rows.float(), states)


def test_tiny_temperatures_are_greedy_and_do_not_overflow() -> None:
    rows = torch.stack([logits_of(100, seed=i, scale=200.0) for i in range(4)])
    states = [state(SamplingParams(temperature=t), seed=i) for i, t in enumerate((1e-300, 1e-9, 1e-4, 1e-2))]
    tokens = [t.token_id for t in Sampler(100, [0]).sample(rows, states)]
    assert tokens == rows.argmax(-1).tolist()


def test_draws_at_both_ends_of_the_interval_are_possible_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    import blockyard.engine.sampler as module

    logits = torch.full((3, 10), -math.inf)
    logits[:, 4] = 0.0
    logits[:, 6] = 0.0
    for value, wanted in ((0.0, 4), (1 - 2**-53, 6)):
        monkeypatch.setattr(module, "uniform", lambda *_, value=value: value)
        states = [state(p) for p in (SamplingParams(), SamplingParams(top_p=0.999), SamplingParams(top_k=7))]
        assert [t.token_id for t in Sampler(10, [0]).sample(logits, states)] == [wanted] * 3
