"""SamplingParams: how the tokens of one request are chosen; checked once, when the request enters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from .errors import RequestError

MAX_SEQUENCES = 64
MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Structure:
    """A grammar that the output must follow. ``schema`` is JSON text, empty for ``json_object``."""

    kind: Literal["json_object", "json_schema"]
    schema: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The sampling settings of one request.

    Greedy is ``temperature == 0``. ``best_of`` sequences are decoded and the ``n`` with the best
    mean log-probability are returned. With ``beam_search``, ``best_of`` is the beam width, and bias and
    penalties change the scores by which beams are ranked.
    ``logprobs`` is how many alternatives to report per token (0: the chosen token alone, None:
    nothing). ``top_k == 0``, ``top_p == 1`` and ``min_p == 0`` each switch their filter off. Before
    ``min_tokens`` tokens no end of text and no stop token is chosen, unless ``structure`` allows nothing
    else: a grammar that is finished ends the answer.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    n: int = 1
    best_of: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    structure: Structure | None = None
    beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool = False

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def check(self, *, vocab_size: int) -> None:
        """Raise RequestError, naming field, limit and remedy, unless every value is valid."""

        def bounded(name: str, low: float, high: float, *, open_low: bool = False) -> None:
            value = getattr(self, name)
            if not math.isfinite(value) or value < low or value > high or (open_low and value == low):
                bracket = "(" if open_low else "["
                raise RequestError(f"{name} is {value}; it must be in {bracket}{low}, {high}]", field=name)

        bounded("max_tokens", 1, MAX_SEED)
        bounded("min_tokens", 0, self.max_tokens)
        bounded("n", 1, MAX_SEQUENCES)
        bounded("best_of", 1, MAX_SEQUENCES)
        bounded("temperature", 0.0, 100.0)
        bounded("top_p", 0.0, 1.0, open_low=True)
        bounded("top_k", 0, MAX_SEED)
        bounded("min_p", 0.0, 1.0)
        bounded("repetition_penalty", 0.0, 100.0, open_low=True)
        bounded("presence_penalty", -2.0, 2.0)
        bounded("frequency_penalty", -2.0, 2.0)
        bounded("length_penalty", -10.0, 10.0)
        if self.best_of < self.n:
            raise RequestError(
                f"best_of is {self.best_of} but n is {self.n}; best_of must be at least n", field="best_of"
            )
        if self.seed is not None and not -MAX_SEED - 1 <= self.seed <= MAX_SEED:
            raise RequestError(f"seed is {self.seed}; it must fit in 64 signed bits", field="seed")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise RequestError(
                f"logprobs is {self.logprobs}; at most {MAX_LOGPROBS} alternatives are reported",
                field="logprobs",
            )
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                f"{len(self.stop_token_ids)} stop_token_ids; at most {MAX_STOP_TOKEN_IDS} are allowed",
                field="stop_token_ids",
            )
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias has {len(self.logit_bias)} entries; at most {MAX_LOGIT_BIAS} are allowed",
                field="logit_bias",
            )
        for token, bias in self.logit_bias.items():
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"logit_bias names token {token}; this model's tokens are 0 to {vocab_size - 1}",
                    field="logit_bias",
                )
            if not -100.0 <= bias <= 100.0:
                raise RequestError(
                    f"logit_bias of token {token} is {bias}; it must be in [-100, 100]", field="logit_bias"
                )
        if self.beam_search:
            if self.best_of < 2:
                raise RequestError("beam search needs a width (best_of) of at least 2", field="best_of")
            if not self.greedy:
                raise RequestError(
                    f"beam search is deterministic; set temperature to 0 (it is {self.temperature})",
                    field="temperature",
                )
        unused: dict[str, float]
        if self.beam_search:
            unused, why = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}, "beam search draws no tokens"
        else:
            unused, why = {"length_penalty": 1.0, "early_stopping": False}, "only beam search uses it"
        for name, off in unused.items():
            if getattr(self, name) != off:
                raise RequestError(f"{name} is {getattr(self, name)}, but {why}; leave it out", field=name)
