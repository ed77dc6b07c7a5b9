"""BeamSearch: which continuations of which beams are kept; for one request, without tensors.

Follows transformers' beam search, so that scores and ids are equal to it: each step considers the best ``2 *
width`` continuations of all beams, those that end become hypotheses if they are among the best ``width``, and
the search ends when no live beam can beat the worst kept hypothesis (or as soon as ``width`` are kept, with
``early_stopping``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .outputs import FinishReason
from .sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Decision:
    """The new beams, best first: (index of the parent among the live beams, token, sum of log-probs)."""

    continue_: list[tuple[int, int, float]]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished continuation. ``score`` is the sum of log-probs divided by length ** length_penalty."""

    token_ids: list[int]
    score: float
    reason: FinishReason


class BeamSearch:
    """The beams of one request, from its prompt's logits to ``done``."""

    def __init__(self, width: int, params: SamplingParams, eos_token_ids: Sequence[int]) -> None:
        self.width = width
        self.done = False
        self._params = params
        stops = set(params.stop_token_ids)
        self._ends = stops if params.ignore_eos else stops | set(eos_token_ids)
        self._beams: list[tuple[list[int], float]] = [([], 0.0)]
        self._finished: list[Hypothesis] = []  # best first, at most ``width``

    def step(self, candidates: list[list[tuple[int, float]]]) -> Decision:
        """Advance by one token. ``candidates``: for each live beam its best ``2 * width`` (token, log-prob).

        Afterwards ``done`` tells whether the search is over; if it is, ignore the returned decision.
        """
        scored = [
            (total + logprob, parent, token)
            for parent, (_, total) in enumerate(self._beams)
            for token, logprob in candidates[parent]
        ]
        scored.sort(key=lambda item: -item[0])
        length = len(self._beams[0][0]) + 1
        chosen: list[tuple[int, int, float]] = []
        for rank, (total, parent, token) in enumerate(scored[: 2 * self.width]):
            if token in self._ends:
                if rank < self.width:
                    self._keep(self._beams[parent][0], total, length, "stop")
            elif len(chosen) < self.width:
                chosen.append((parent, token, total))
        self._beams = [([*self._beams[parent][0], token], total) for parent, token, total in chosen]
        if length == self._params.max_tokens:
            for token_ids, total in self._beams:
                self._keep(token_ids, total, length, "length")
            self.done = True
        elif not chosen or self._decided(length):
            self.done = True
        return Decision(chosen)

    def _score(self, total: float, length: int) -> float:
        return float(total / length**self._params.length_penalty)

    def _keep(self, token_ids: list[int], total: float, length: int, reason: FinishReason) -> None:
        self._finished.append(Hypothesis(token_ids, self._score(total, length), reason))
        self._finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self._finished[self.width :]

    def _decided(self, length: int) -> bool:
        if len(self._finished) < self.width:
            return False
        if self._params.early_stopping:
            return True
        best_possible = self._score(self._beams[0][1], length)
        return best_possible <= self._finished[-1].score

    def results(self, count: int) -> list[tuple[list[int], float, FinishReason]]:
        """The best hypotheses: (token ids without the ending token, score, why it ended)."""
        return [(h.token_ids, h.score, h.reason) for h in self._finished[:count]]
