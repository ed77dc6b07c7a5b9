"""BeamSearch: which continuations of which beams are kept; for one request, without tensors.

Follows transformers' beam search, so that scores and ids are equal to it: each step considers so many of the
best continuations of all beams that ``width`` of them go on, those that end become hypotheses if they are
among the best ``width``, and the search ends when no live beam can beat the worst kept hypothesis (or as
soon as ``width`` are kept, with ``early_stopping``). Beyond transformers, a token that completes a grammar
ends its beam as well, and is a part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .outputs import FinishReason, TokenLogprob
from .sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Decision:
    """The new beams, best first: (index of the parent among the live beams, token id, score so far)."""

    continue_: list[tuple[int, int, float]]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished continuation, without the token that ended it unless that completed a grammar.

    ``score`` is the sum of the scores of all tokens divided by length ** length_penalty.
    """

    tokens: list[TokenLogprob]
    score: float
    reason: FinishReason


class BeamSearch:
    """The beams of one request, from its prompt's logits to ``done``."""

    def __init__(self, width: int, params: SamplingParams, eos_token_ids: Sequence[int]) -> None:
        self.width = width
        self.done = False
        self._params = params
        self._ends = set(params.stop_token_ids)
        if not params.ignore_eos or params.structure is not None:
            self._ends |= set(eos_token_ids)
        # Each beam may end with each of the ending tokens, and ``width`` others must be left.
        self.considered = max(2, 1 + len(self._ends)) * width
        self._beams: list[tuple[list[TokenLogprob], float]] = [([], 0.0)]
        self._finished: list[Hypothesis] = []  # best first, at most ``width``

    @property
    def totals(self) -> list[float]:
        """The scores so far of the live beams, best first."""
        return [total for _, total in self._beams]

    def step(
        self, candidates: list[tuple[int, TokenLogprob, float]], completes: Callable[[int, int], bool]
    ) -> Decision:
        """Advance by one token. ``candidates``: the ``considered`` best continuations of all live beams, best
        first: (index of the parent, token, score so far).

        ``completes`` tells whether (index of a live beam, token id) completes the beam's grammar. Afterwards
        ``done`` tells whether the search is over; if it is, ignore the returned decision.
        """
        length = len(self._beams[0][0]) + 1
        chosen: list[tuple[int, int, float]] = []
        beams: list[tuple[list[TokenLogprob], float]] = []
        for rank, (parent, token, total) in enumerate(candidates):
            if len(chosen) == self.width <= rank:
                break
            tokens = self._beams[parent][0]
            ends = token.token_id in self._ends
            if ends or completes(parent, token.token_id):
                if rank < self.width:
                    self._keep(tokens if ends else [*tokens, token], total, length, "stop")
            elif len(chosen) < self.width:
                chosen.append((parent, token.token_id, total))
                beams.append(([*tokens, token], total))
        self._beams = beams
        if length == self._params.max_tokens:
            for tokens, total in self._beams:
                self._keep(tokens, total, length, "length")
            self.done = True
        elif not chosen or self._decided(length):
            self.done = True
        return Decision(chosen)

    def _score(self, total: float, length: int) -> float:
        return float(total / length**self._params.length_penalty)

    def _keep(self, tokens: list[TokenLogprob], total: float, length: int, reason: FinishReason) -> None:
        self._finished.append(Hypothesis(tokens, self._score(total, length), reason))
        self._finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self._finished[self.width :]

    def _decided(self, length: int) -> bool:
        if len(self._finished) < self.width:
            return False
        if self._params.early_stopping:
            return True
        best_possible = self._score(self._beams[0][1], length)
        return best_possible <= self._finished[-1].score

    def results(self, count: int) -> list[Hypothesis]:
        """The ``count`` best hypotheses; if a grammar has fewer answers than that, the best one again."""
        best = self._finished[:count]
        return best + best[:1] * (count - len(best))
