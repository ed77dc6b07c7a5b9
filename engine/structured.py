"""Grammars that an output must follow: any JSON object, or JSON of one schema, by llguidance's token masks.

llguidance builds its automaton lazily, so most schemas cost microseconds to a few milliseconds. A few cost
minutes and gigabytes, some of them short ones (``{"multipleOf": 9999991}``), and none of its limits prevents
that. So each schema is compiled for trial in a child process first, whose time and memory are limited
(grammar_trial.py). What passes is compiled here once more, within about the same time and without the GIL:
the owner of an engine does both in a thread of its own, and steps go on meanwhile.

llguidance is imported on first use, so that a machine without it can serve all requests that need no grammar.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import RequestError
from .grammar_trial import Trials, make_matcher, make_tokenizer
from .sampling_params import Structure

log = logging.getLogger("blockyard.engine")

MAX_SCHEMA_BYTES = 64 * 1024
_ANY_OBJECT = '{"type": "object"}'


class Grammar:
    """The position of one sequence in its grammar.

    ``error`` is set if the output cannot be continued within llguidance's limits; only end of text is allowed
    then, and what was generated is not what was asked for.
    """

    def __init__(self, matcher: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self.finished = False
        self.error: str | None = None

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, bool [V]. If the grammar allows none, only end of text is allowed."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        mask = np.zeros(self._vocab_size, dtype=bool)
        known = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
        mask[: len(known)] = known
        if not mask.any():
            mask[self._eos] = True
            self._note_error()
        return mask

    def accept(self, token_id: int) -> None:
        """Advance by one token, which ``allowed`` must have allowed."""
        if token_id in self._eos or not self._matcher.consume_token(token_id):
            self.finished = True
        else:
            self.finished = bool(self._matcher.is_stopped())
        self._note_error()

    def _note_error(self) -> None:
        if self._matcher.is_error():
            cause = self._matcher.get_error().partition("\n")[0]
            self.error = f"the JSON schema is too complex to go on with; simplify it ({cause})"

    def fork(self) -> Grammar:
        twin = Grammar(self._matcher.deep_copy(), self._vocab_size, self._eos)
        twin.finished, twin.error = self.finished, self.error
        return twin


class GrammarCompiler:
    """Makes grammars for one model's vocabulary. Thread-safe.

    What is slow at first use, the table of tokens and a process for trials, is made at once.
    """

    def __init__(self, model: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._tokenizer: Any = None
        self._trials: Trials | None = None
        tokenizer_file = Path(model) / "tokenizer.json"
        if find_spec("llguidance") is None or not tokenizer_file.is_file():
            return
        self._trials = Trials(tokenizer_file, vocab_size, self._eos)
        try:
            self._tokenizer = make_tokenizer(tokenizer_file, vocab_size, self._eos)
        except ValueError as error:
            self._trials.close()
            log.warning("response_format cannot be served, since llguidance cannot use %s", error)

    def compile(self, structure: Structure) -> Grammar:
        """A new grammar; RequestError on ``response_format`` if the schema cannot be used."""
        if self._tokenizer is None or self._trials is None:
            raise RequestError(
                "response_format needs the package llguidance and a model with a tokenizer.json that it can "
                "use, and this server lacks one of them; install it or leave response_format out",
                field="response_format",
            )
        schema = structure.schema if structure.kind == "json_schema" else _ANY_OBJECT
        if len(schema) > MAX_SCHEMA_BYTES:
            raise RequestError(
                f"the JSON schema has {len(schema)} characters; at most {MAX_SCHEMA_BYTES} are accepted",
                field="response_format",
            )
        try:
            parsed = json.loads(schema)
            if isinstance(parsed, dict):
                # If whitespace is free, a small model may produce blanks until its tokens are used up.
                parsed["x-guidance"] = {"whitespace_flexible": False}
            schema = json.dumps(parsed)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the JSON schema cannot be used: {error}", field="response_format") from None
        if fault := self._trials.run(schema):
            raise RequestError(f"the JSON schema cannot be used: {fault}", field="response_format")
        return Grammar(make_matcher(self._tokenizer, schema), self._vocab_size, self._eos)

    def close(self) -> None:
        if self._trials is not None:
            self._trials.close()
