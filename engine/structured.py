"""Grammars that an output must follow: any JSON object, or JSON of one schema, by llguidance's token masks.

llguidance builds its automaton lazily, so a schema costs microseconds to a few milliseconds when the
request arrives, and no schema can stall the engine for seconds. It is imported on first use, so that a
machine without it can serve all requests that need no grammar.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import RequestError
from .sampling_params import Structure

MAX_SCHEMA_BYTES = 64 * 1024
_ANY_OBJECT = '{"type": "object"}'


class Grammar:
    """The position of one sequence in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self.finished = False

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, bool [V]. If the grammar allows none, only end of text is allowed."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        mask = np.zeros(self._vocab_size, dtype=bool)
        known = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
        mask[: len(known)] = known
        if not mask.any():
            mask[self._eos] = True
        return mask

    def accept(self, token_id: int) -> None:
        """Advance by one token, which ``allowed`` must have allowed."""
        if token_id in self._eos or not self._matcher.consume_token(token_id):
            self.finished = True
        else:
            self.finished = bool(self._matcher.is_stopped())

    def fork(self) -> Grammar:
        twin = Grammar(self._matcher.deep_copy(), self._vocab_size, self._eos)
        twin.finished = self.finished
        return twin


class GrammarCompiler:
    """Makes grammars for one model's vocabulary."""

    def __init__(self, model: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer_file = Path(model) / "tokenizer.json"
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._tokenizer: Any = None

    def compile(self, structure: Structure) -> Grammar:
        """A new grammar; RequestError on ``response_format`` if the schema cannot be used."""
        try:
            import llguidance
        except ImportError:
            raise RequestError(
                "response_format needs the package llguidance, which this server does not have; install it "
                "or leave response_format out",
                field="response_format",
            ) from None
        schema = structure.schema if structure.kind == "json_schema" else _ANY_OBJECT
        if len(schema) > MAX_SCHEMA_BYTES:
            raise RequestError(
                f"the JSON schema has {len(schema)} characters; at most {MAX_SCHEMA_BYTES} are accepted",
                field="response_format",
            )
        if self._tokenizer is None:
            self._tokenizer = llguidance.LLTokenizer(
                str(self._tokenizer_file), n_vocab=self._vocab_size, eos_token=self._eos
            )
        try:
            parsed = json.loads(schema)
            if isinstance(parsed, dict):
                # If whitespace is free, a small model may produce blanks until its tokens are used up.
                parsed["x-guidance"] = {"whitespace_flexible": False}
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(parsed))
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the JSON schema cannot be used: {error}", field="response_format") from None
        matcher = llguidance.LLMatcher(self._tokenizer, grammar)
        if matcher.is_error():
            raise RequestError(
                f"the JSON schema cannot be used: {matcher.get_error()}", field="response_format"
            )
        return Grammar(matcher, self._vocab_size, self._eos)
