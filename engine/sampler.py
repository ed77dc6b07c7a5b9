"""The sampler: from logits to tokens, for a whole batch at once.

Stateless by design: what a sequence draws depends on its distribution, its seed and how many tokens it has
drawn before. It does not depend on other sequences of the batch, on the device or on preemptions. One uniform
number per row comes from a counter-based hash, and the token is found by inverting the cumulative
distribution in vocabulary order, so that a tiny difference in the logits almost never changes the token.
(Gumbel sampling, with one random number per entry, would also cost a pass over S x V random numbers.)

Rows without special parameters cost one argmax; each filter or penalty touches only the rows that ask for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .outputs import TokenLogprob
from .sampling_params import SamplingParams
from .structured import Grammar

NUCLEUS_CANDIDATES = 1024  # top-k and top-p try this many best tokens before they sort the whole vocabulary
_MASK = 2**64 - 1


@dataclass(slots=True)
class SamplingState:
    """The sampler's input for one sequence. ``output_ids`` is the sequence's own list, which grows."""

    params: SamplingParams
    seed: int
    prompt_ids: list[int]
    output_ids: list[int]
    grammar: Grammar | None = None
    _plain: bool = field(init=False)  # greedy, without any filter, penalty or log-probs

    def __post_init__(self) -> None:
        p = self.params
        self._plain = (
            p.greedy
            and not p.logit_bias
            and not p.min_tokens
            and p.logprobs is None
            and p.best_of == 1
            and p.repetition_penalty == 1.0
            and p.presence_penalty == 0.0
            and p.frequency_penalty == 0.0
            and self.grammar is None
        )

    def fork(self, seed: int, output_ids: list[int]) -> SamplingState:
        """The state of a twin that has the same past."""
        grammar = None if self.grammar is None else self.grammar.fork()
        return SamplingState(self.params, seed, self.prompt_ids, output_ids, grammar)

    def completes(self, token_id: int) -> bool:
        """Whether nothing may follow this token, which the grammar allows. The state stays as it is."""
        if self.grammar is None:
            return False
        after = self.grammar.fork()
        after.accept(token_id)
        return after.finished


@dataclass(slots=True)
class SampledToken:
    """``logprob`` is that of the unchanged logits, and 0.0 unless it was requested. ``top`` is best first."""

    token_id: int
    logprob: float = 0.0
    top: list[tuple[int, float]] | None = None


def uniform(seed: int, counter: int) -> float:
    """A number in [0, 1) that is a function of its arguments alone (SplitMix64's finaliser, twice)."""
    x = (seed + 0x9E3779B97F4A7C15 * (counter + 1)) & _MASK
    for _ in range(2):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        x ^= x >> 31
    return (x >> 11) / 2**53


class Sampler:
    """Chooses tokens from logits of one vocabulary."""

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)

    def sample(self, logits: Tensor, states: list[SamplingState]) -> list[SampledToken]:
        """One token for each row. logits [S, V], any float dtype, on any device; they are not changed.

        Plain batches synchronise with the device once, to fetch the tokens.
        """
        if all(state._plain for state in states):
            return [SampledToken(token) for token in _greedy(logits)]
        raw = _finite(logits.float())
        adjusted = self._adjust(raw, states)
        tokens = adjusted.argmax(-1)
        drawn = [i for i, state in enumerate(states) if not state.params.greedy]
        if drawn:
            tokens[drawn] = self._draw(adjusted[drawn], [states[i] for i in drawn])
        token_ids: list[int] = tokens.tolist()
        result = [SampledToken(token) for token in token_ids]
        self._report(raw, states, result)
        for state, token in zip(states, token_ids, strict=True):
            if state.grammar is not None:
                state.grammar.accept(token)
        return result

    def continuations(
        self, logits: Tensor, states: list[SamplingState], totals: list[float], k: int
    ) -> list[tuple[int, TokenLogprob, float]]:
        """The k best continuations of all beams of one request, best first: (beam, token, score).

        logits [S, V]; ``totals`` [S] are the beams' scores so far. As in transformers, bias and penalties
        change the log-probabilities, and the result is not normalised again. What is forbidden is left out.
        """
        raw = torch.log_softmax(_finite(logits.float()), dim=-1)
        scores = self._adjust(raw, states) + torch.tensor(totals, device=raw.device).unsqueeze(1)
        values, flat = scores.flatten().topk(min(k, scores.numel()))
        beams, ids = flat // raw.shape[1], flat % raw.shape[1]
        tops = self._best(raw, states[0].params.logprobs or 0)
        columns = beams.tolist(), ids.tolist(), raw[beams, ids].tolist(), values.tolist()
        return [
            (beam, TokenLogprob(token_id, logprob, tops[beam]), total)
            for beam, token_id, logprob, total in zip(*columns, strict=True)
            if total > -math.inf
        ]

    # ── Changing the distribution ─────────────────────────────────────────────────────────────────

    def _adjust(self, raw: Tensor, states: list[SamplingState]) -> Tensor:
        """Apply bias, penalties, grammar and minimum length, in this order, to a copy if anything changes."""
        adjusted = raw
        for i, state in enumerate(states):
            if state._plain:
                continue
            changed = self._adjust_row(raw[i], state)
            if changed is not None:
                if adjusted is raw:
                    adjusted = raw.clone()
                adjusted[i] = changed
        return adjusted

    def _adjust_row(self, row: Tensor, state: SamplingState) -> Tensor | None:
        p = state.params
        outputs = state.output_ids
        before = row
        if p.logit_bias:
            row = row.clone()
            row[list(p.logit_bias)] += torch.tensor(list(p.logit_bias.values()), device=row.device)
        if p.repetition_penalty != 1.0:
            seen = torch.tensor(sorted({*state.prompt_ids, *outputs}), device=row.device)
            values = row[seen]
            penalised = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
            row = row.scatter(0, seen, penalised)
        if outputs and (p.presence_penalty or p.frequency_penalty):
            ids, counts = np.unique(np.asarray(outputs, dtype=np.int64), return_counts=True)
            penalty = torch.from_numpy(p.presence_penalty + p.frequency_penalty * counts).to(row)
            row = row.scatter_add(0, torch.from_numpy(ids).to(row.device), -penalty)
        if state.grammar is not None:
            allowed = torch.from_numpy(state.grammar.allowed()).to(row.device)
            row = row.masked_fill(~allowed, -torch.inf)
        if len(outputs) < p.min_tokens:
            with_ends, row = row, row.clone()
            row[[*self._eos, *(t for t in p.stop_token_ids if t < self._vocab_size)]] = -torch.inf
            if state.grammar is not None:
                # It may allow nothing but an end, which then comes before min_tokens.
                row = torch.where(row.isneginf().all(), with_ends, row)
        return None if row is before else row

    # ── Drawing ───────────────────────────────────────────────────────────────────────────────────

    def _draw(self, logits: Tensor, states: list[SamplingState]) -> Tensor:
        """Temperature, min-p, top-k and top-p, then one draw a row -> token ids int64 [R]."""

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=logits.device).unsqueeze(1)

        params = [state.params for state in states]
        # Shifting by the maximum first keeps tiny temperatures from overflowing.
        shifted = logits - logits.amax(-1, keepdim=True)
        probs = torch.softmax(shifted / column([max(p.temperature, 1e-6) for p in params]), dim=-1)
        if any(p.min_p > 0 for p in params):
            floor = probs.amax(-1, keepdim=True) * column([p.min_p for p in params])
            probs = probs.masked_fill(probs < floor, 0.0)
        filtered = [i for i, p in enumerate(params) if p.top_p < 1.0 or 0 < p.top_k < self._vocab_size]
        if filtered:
            probs[filtered] = self._keep_best(probs[filtered], [params[i] for i in filtered])
        cumulative = probs.double().cumsum(-1)
        uniforms = [uniform(state.seed, len(state.output_ids)) for state in states]
        target = torch.tensor(uniforms, dtype=torch.float64, device=logits.device).unsqueeze(1)
        # The first entry above the target. It never has probability zero, where the sum does not rise.
        index = torch.searchsorted(cumulative, target * cumulative[:, -1:], right=True)
        last = probs.shape[1] - 1 - (probs.flip(-1) > 0).int().argmax(-1, keepdim=True)
        return torch.minimum(index, last).squeeze(1)

    def _keep_best(self, probs: Tensor, params: list[SamplingParams]) -> Tensor:
        """Zero what top-k and then top-p (of what top-k left) exclude. probs [R, V] -> [R, V]."""
        ks = [min(p.top_k or self._vocab_size, self._vocab_size) for p in params]
        width = min(NUCLEUS_CANDIDATES, self._vocab_size)
        values, ids = probs.topk(width, dim=-1)  # [R, width], best first
        if width < self._vocab_size:
            covered = values.sum(-1) >= probs.sum(-1) * torch.tensor(
                [p.top_p for p in params], device=probs.device
            )
            short = [
                k > width and not (p.top_p < 1.0 and ok)
                for k, p, ok in zip(ks, params, covered.tolist(), strict=True)
            ]
            if any(short):
                values, ids = probs.sort(dim=-1, descending=True)
                width = self._vocab_size
        rank = torch.arange(width, device=probs.device)
        keep = rank < torch.tensor(ks, device=probs.device).unsqueeze(1)
        # top-p is a share of what top-k left; without top-k, of everything.
        within = torch.where(keep, values, 0.0)
        total = torch.where(
            torch.tensor([k < self._vocab_size for k in ks], device=probs.device),
            within.sum(-1),
            probs.sum(-1),
        ).unsqueeze(1)
        top_p = torch.tensor([p.top_p for p in params], device=probs.device).unsqueeze(1)
        before = within.cumsum(-1) - within
        keep &= (before < top_p * total) | (top_p >= 1.0)
        keep[:, 0] = True
        return torch.zeros_like(probs).scatter(1, ids, torch.where(keep, values, 0.0))

    # ── Reporting ─────────────────────────────────────────────────────────────────────────────────

    def _report(self, raw: Tensor, states: list[SamplingState], result: list[SampledToken]) -> None:
        """Fill in log-probabilities for the rows that ask for them."""
        wanted = [
            i for i, s in enumerate(states) if s.params.logprobs is not None or s.params.best_of > s.params.n
        ]
        if not wanted:
            return
        logprobs = torch.log_softmax(raw[wanted], dim=-1)
        chosen = torch.tensor([result[i].token_id for i in wanted], device=raw.device).unsqueeze(1)
        for i, value in zip(wanted, logprobs.gather(1, chosen).squeeze(1).tolist(), strict=True):
            result[i].logprob = value
        tops = self._best(logprobs, max(states[i].params.logprobs or 0 for i in wanted))
        for i, top in zip(wanted, tops, strict=True):
            count = states[i].params.logprobs
            if count is not None:
                result[i].top = top[:count]

    @staticmethod
    def _best(logprobs: Tensor, count: int) -> list[list[tuple[int, float]]]:
        """The best tokens of each row with their log-probabilities, best first. logprobs [R, V]."""
        values, ids = logprobs.topk(min(count, logprobs.shape[1]), dim=-1)
        return [list(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]


def _greedy(logits: Tensor) -> list[int]:
    """The best token of each row, [S, V] -> [S]. NaN is never the best."""
    best, ids = logits.max(-1)  # NaN if any is NaN; an infinity below the maximum does no harm
    token_ids, sound = torch.stack([ids, torch.isfinite(best)]).tolist()  # one transfer
    if all(sound):
        return list(token_ids)
    return list(_finite(logits.float()).argmax(-1).tolist())


def _finite(logits: Tensor) -> Tensor:
    """Rows with NaN or infinities, which must not disturb other rows, are made finite; others stay as they
    are. Extremes tell as much as a sum does, and do not overflow. float32 [S, V], S > 0.
    """
    if bool(torch.isfinite(torch.stack(torch.aminmax(logits))).all()):
        return logits
    return torch.nan_to_num(logits, nan=-1e30, posinf=1e30, neginf=-1e30)
