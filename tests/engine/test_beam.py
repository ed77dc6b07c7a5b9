"""Beam search: ids and scores equal transformers' generate(num_beams=...)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from blockyard.engine.config import EngineConfig
from blockyard.engine.engine import Engine
from blockyard.engine.model.tokenizer import Tokenizer
from blockyard.engine.outputs import SequenceOutput
from blockyard.engine.sampling_params import SamplingParams, Structure

from .models import load_reference, make_model, make_tokenizer

EOS = 2
MAX_TOKENS = 12


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 160, (n,), generator=generator).tolist() for n in (1, 8, 30)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some beams end at once, some after a while, some never; some ends come too late in the ranking."""
    path = make_model("llama", tmp_path_factory.mktemp("beam"), num_hidden_layers=2, initializer_range=0.12)
    reference = load_reference(path)
    with torch.no_grad():
        # Turn the end of text towards what the last layer says on average.
        hidden = reference.model(torch.tensor([prompts()[-1]])).last_hidden_state[0].mean(0)
        weight = reference.lm_head.weight
        weight[EOS] = hidden * 0.8 * weight.norm(dim=1).mean() / hidden.norm()
    reference.save_pretrained(path)
    make_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def reference(model: Path) -> PreTrainedModel:
    return load_reference(model)


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return Engine(EngineConfig(model=str(model), device="cpu", kv_blocks=400, block_tokens=8))


def transformers_beams(
    reference: PreTrainedModel, prompt: list[int], width: int, **settings: object
) -> list[tuple[list[int], float]]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **{"eos_token_id": EOS, **settings},
        )
    ends = settings.get("eos_token_id", [EOS])
    beams = []
    for row, score in zip(
        out.sequences[:, len(prompt) :].tolist(), out.sequences_scores.tolist(), strict=True
    ):
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        beams.append((row[:end], score))
    return beams


def run(engine: Engine, params: SamplingParams) -> dict[str, list[SequenceOutput]]:
    """All prompts at once, so that the beams of several requests share each step."""
    outputs: dict[str, list[SequenceOutput]] = {}
    for i, prompt in enumerate(prompts()):
        engine.add_request(str(i), prompt, params)
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.check()
    assert engine.stats().device.active == 0
    return outputs


def ids_of(outputs: dict[str, list[SequenceOutput]]) -> dict[str, list[list[int]]]:
    return {key: [o.token_ids for o in choices] for key, choices in outputs.items()}


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.0, 2.0])
@pytest.mark.parametrize("width", [2, 5])
def test_beams_equal_transformers(
    engine: Engine, reference: PreTrainedModel, width: int, length_penalty: float, early_stopping: bool
) -> None:
    params = SamplingParams(
        temperature=0,
        max_tokens=MAX_TOKENS,
        n=width,
        best_of=width,
        beam_search=True,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    outputs = run(engine, params)
    ended = 0
    for i, prompt in enumerate(prompts()):
        expected = transformers_beams(
            reference, prompt, width, length_penalty=length_penalty, early_stopping=early_stopping
        )
        got = outputs[str(i)]
        assert [o.index for o in got] == list(range(width))
        assert [o.token_ids for o in got] == [ids for ids, _ in expected]
        assert [o.cumulative_logprob for o in got] == pytest.approx([s for _, s in expected], abs=2e-4)
        ended += sum(len(ids) < MAX_TOKENS for ids, _ in expected)
        assert all((o.finish_reason == "stop") == (len(o.token_ids) < MAX_TOKENS) for o in got)
    # With a high length penalty the longest beams win.
    assert ended > 0 or length_penalty > 1, (
        "no beam ended before its last token: nothing of interest was compared"
    )


@pytest.mark.parametrize(
    ("params", "settings"),
    [
        ({"logit_bias": {EOS: -2.0, 9: 1.5}}, {"sequence_bias": {(EOS,): -2.0, (9,): 1.5}}),
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"min_tokens": 5}, {"min_new_tokens": 5}),
        ({"stop_token_ids": tuple(range(3, 67))}, {"eos_token_id": [EOS, *range(3, 67)]}),
        (
            {"logit_bias": {9: 1.5}, "repetition_penalty": 0.8, "min_tokens": 3, "length_penalty": 2.0},
            {
                "sequence_bias": {(9,): 1.5},
                "repetition_penalty": 0.8,
                "min_new_tokens": 3,
                "length_penalty": 2.0,
            },
        ),
    ],
    ids="-".join,
)
def test_what_changes_the_scores_does_so_as_in_transformers(
    engine: Engine, reference: PreTrainedModel, params: dict[str, Any], settings: dict[str, Any]
) -> None:
    base = {"temperature": 0, "max_tokens": MAX_TOKENS, "n": 4, "best_of": 4, "beam_search": True}
    outputs = run(engine, SamplingParams(**base, **params))
    assert ids_of(outputs) != ids_of(run(engine, SamplingParams(**base)))
    for i, prompt in enumerate(prompts()):
        expected = transformers_beams(reference, prompt, 4, **settings)
        got = outputs[str(i)]
        assert [o.token_ids for o in got] == [ids for ids, _ in expected]
        assert [o.cumulative_logprob for o in got] == pytest.approx([s for _, s in expected], abs=2e-4)


def test_logprobs_are_the_unchanged_model_s(engine: Engine, reference: PreTrainedModel) -> None:
    params = SamplingParams(
        temperature=0,
        max_tokens=MAX_TOKENS,
        n=3,
        best_of=3,
        beam_search=True,
        repetition_penalty=1.4,
        logprobs=2,
    )
    outputs = run(engine, params)
    for i, prompt in enumerate(prompts()):
        for output in outputs[str(i)]:
            ids = torch.tensor([prompt + output.token_ids])
            with torch.inference_mode():
                logprobs = torch.log_softmax(reference(ids).logits[0, len(prompt) - 1 : -1], -1)
            assert output.logprobs is not None
            assert [entry.token_id for entry in output.logprobs] == output.token_ids
            for row, entry in zip(logprobs, output.logprobs, strict=True):
                assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=2e-4)
                assert [token for token, _ in entry.top] == row.topk(2).indices.tolist()
                assert [value for _, value in entry.top] == pytest.approx(
                    row.topk(2).values.tolist(), abs=2e-4
                )


@pytest.mark.parametrize("width", [2, 3, 4])
def test_beams_find_the_best_answers_of_a_grammar(
    model: Path, engine: Engine, reference: PreTrainedModel, width: int
) -> None:
    """Wide enough beams try all answers; each ends with its last quote, and if there are too few, the best is
    sent again.
    """
    tokenizer = Tokenizer.from_directory(model)
    words = [tokenizer.encode(f'"{word}"') for word in ("ab", "ac", "dog")]
    schema = Structure("json_schema", json.dumps({"enum": ["ab", "ac", "dog"]}))
    params = SamplingParams(
        temperature=0, max_tokens=MAX_TOKENS, n=width, best_of=width, beam_search=True, structure=schema
    )
    outputs = run(engine, params)
    for i, prompt in enumerate(prompts()):
        scores = []
        for word in words:
            with torch.inference_mode():
                logits = reference(torch.tensor([prompt + word])).logits[0, len(prompt) - 1 : -1]
            logprobs = torch.log_softmax(logits, -1).gather(1, torch.tensor(word).unsqueeze(1))
            scores.append(float(logprobs.sum()) / len(word))
        ranked = sorted(zip(scores, words, strict=True), reverse=True)[:width]
        ranked += ranked[:1] * (width - len(ranked))
        got = outputs[str(i)]
        assert [o.token_ids for o in got] == [word for _, word in ranked]
        assert [o.cumulative_logprob for o in got] == pytest.approx([s for s, _ in ranked], abs=2e-4)
        assert [o.finish_reason for o in got] == ["stop"] * width


def test_n_is_how_many_of_the_beams_are_sent(engine: Engine) -> None:
    wide = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, n=4, best_of=4, beam_search=True)
    few = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, n=2, best_of=4, beam_search=True)
    best = {key: ids[:2] for key, ids in ids_of(run(engine, wide)).items()}
    assert ids_of(run(engine, few)) == best


def test_stopping_early_makes_a_difference_here(engine: Engine) -> None:
    """Else the comparison above would say nothing about it."""
    found = []
    for early in (False, True):
        params = SamplingParams(
            temperature=0, max_tokens=MAX_TOKENS, n=2, best_of=2, beam_search=True, early_stopping=early
        )
        found.append(ids_of(run(engine, params)))
    assert found[0] != found[1]
