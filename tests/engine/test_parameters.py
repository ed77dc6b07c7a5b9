"""Every sampling parameter in every mode: it changes the output, or is refused by name, or is listed below
with the reason why it changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import product
from typing import Any

import pytest

from blockyard.engine.config import EngineConfig
from blockyard.engine.engine import Engine
from blockyard.engine.errors import RequestError
from blockyard.engine.sampling_params import SamplingParams, Structure

from .models import CHARACTERS, make_model, make_tokenizer

EOS = 2
PROMPT = [11, 54, 117, 30]
# Of all schemas' texts a number alone may end at any digit.
NUMBER = Structure("json_schema", json.dumps({"type": "integer"}))

GREEDY = SamplingParams(temperature=0, max_tokens=10)
SAMPLED = SamplingParams(temperature=1, seed=3, max_tokens=10)
BEAMS = SamplingParams(temperature=0, n=2, best_of=3, beam_search=True, max_tokens=10)
MODES = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "n": replace(SAMPLED, n=3, best_of=3),
    "best_of": replace(SAMPLED, best_of=3),
    "beams": BEAMS,
    "greedy grammar": replace(GREEDY, structure=NUMBER),
    "sampled grammar": replace(SAMPLED, structure=NUMBER),
    "beams grammar": replace(BEAMS, structure=NUMBER),
}

Choices = list[tuple[list[int], Any, str | None]]  # of each choice: tokens, log-probs, finish reason
Changes = dict[str, Any]


@pytest.fixture(scope="module")
def decode(tmp_path_factory: pytest.TempPathFactory) -> Callable[[SamplingParams], Choices]:
    model = make_model("llama", tmp_path_factory.mktemp("parameters"), num_hidden_layers=1)
    make_tokenizer(model)
    engine = Engine(EngineConfig(model=str(model), device="cpu", threads=1, kv_blocks=64, block_tokens=8))

    def decode(params: SamplingParams) -> Choices:
        found: dict[int, tuple[list[int], Any, str | None]] = {}
        engine.add_request("r", PROMPT, params)
        while engine.has_work:
            for output in engine.step():
                ids, logprobs, _ = found.get(output.index, ([], [], None))
                found[output.index] = (
                    ids + output.token_ids,
                    logprobs + (output.logprobs or []),
                    output.finish_reason,
                )
            engine.check()
        return [found[i] for i in range(params.n)]

    return decode


def tokens_of(choices: Choices, place: int) -> list[int]:
    return sorted({ids[place] for ids, _, _ in choices if len(ids) > place})


# For each parameter: (what to ask for as well, so that there is something to change; the parameter's value,
# which may depend on what is decoded without it).
Value = Callable[[SamplingParams, Choices], Any]
ENDS_EARLY = {"logit_bias": {EOS: 100.0}}
ENDS_SOON = {"logit_bias": {EOS: 2.0}}
PARAMETERS: dict[str, tuple[Changes, Value]] = {
    "max_tokens": ({}, lambda base, _: base.max_tokens - 3),
    "min_tokens": (ENDS_EARLY, lambda *_: 6),
    "n": ({"best_of": 4}, lambda base, _: base.n + 1),
    "best_of": ({}, lambda base, _: base.best_of + 3),
    "temperature": ({}, lambda base, _: base.temperature + 2.0),
    "top_p": ({}, lambda *_: 0.01),
    "top_k": ({}, lambda *_: 1),
    "min_p": ({}, lambda *_: 1.0),
    "repetition_penalty": ({}, lambda *_: 0.2),
    "presence_penalty": ({}, lambda *_: -2.0),
    "frequency_penalty": ({}, lambda *_: -2.0),
    "seed": ({}, lambda *_: 8),
    "logit_bias": ({}, lambda _, plain: dict.fromkeys(tokens_of(plain, 0), -100.0)),
    "stop_token_ids": ({}, lambda _, plain: tuple(tokens_of(plain, 1))),
    "ignore_eos": (ENDS_EARLY, lambda *_: True),
    "logprobs": ({}, lambda *_: 2),
    "structure": ({}, lambda *_: Structure("json_object")),
    "beam_search": ({"temperature": 0, "best_of": 3}, lambda base, _: not base.beam_search),
    "length_penalty": (ENDS_SOON, lambda *_: 5.0),
    "early_stopping": (ENDS_SOON, lambda *_: True),
}

# (parameter, a word in the mode's name)
REFUSED = {
    *((name, "beams") for name in ("temperature", "top_p", "top_k", "min_p")),
    *product(("length_penalty", "early_stopping"), ("greedy", "sampled", "n", "best_of")),
}
# (parameter, a word in the mode's name) -> why it changes nothing
CHANGES_NOTHING = {
    ("top_p", "greedy"): "the most probable token is among those that are left",
    ("top_k", "greedy"): "the most probable token is among those that are left",
    ("min_p", "greedy"): "the most probable token is among those that are left",
    ("best_of", "greedy"): "all candidates are the same, so that one is the best",
    ("seed", "greedy"): "nothing is drawn, so that all seeds give the same",
    ("seed", "beams"): "nothing is drawn, so that all seeds give the same",
    ("ignore_eos", "grammar"): "the end of a grammar is followed by nothing",
}


def test_no_parameter_is_forgotten() -> None:
    assert set(PARAMETERS) == {field.name for field in fields(SamplingParams)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameter_is_honoured_or_refused(
    decode: Callable[[SamplingParams], Choices], name: str, mode: str
) -> None:
    setting, value = PARAMETERS[name]
    base = replace(MODES[mode], **setting)
    plain = decode(base)
    changed = replace(base, **{name: value(base, plain)})
    pairs = {(name, word) for word in mode.split()}
    if pairs & REFUSED:
        with pytest.raises(RequestError, match=name) as caught:
            decode(changed)
        assert caught.value.field == name
    elif pairs & CHANGES_NOTHING.keys():
        assert decode(changed) == plain
    else:
        assert decode(changed) != plain


@pytest.mark.parametrize("mode", [mode for mode in MODES if "grammar" in mode])
def test_a_finished_grammar_ends_an_answer_before_min_tokens(
    decode: Callable[[SamplingParams], Choices], mode: str
) -> None:
    schema = Structure("json_schema", json.dumps({"enum": ["ab"]}))
    params = replace(MODES[mode], min_tokens=10, structure=schema)
    answer = [CHARACTERS.index(character) for character in '"ab"']
    assert decode(params) == [(answer, [], "stop")] * params.n
    # A stop token that the grammar needs ends the answer too: nothing else is allowed there.
    stopped = replace(params, stop_token_ids=(CHARACTERS.index("b"),))
    assert decode(stopped) == [(answer[:2], [], "stop")] * params.n
