"""Structured output: whatever the model would like to say, what it says parses and validates."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import llguidance
import pytest
from pydantic import BaseModel, ConfigDict, Field

from blockyard.engine import grammar_trial
from blockyard.engine.config import EngineConfig
from blockyard.engine.engine import Engine
from blockyard.engine.errors import RequestError
from blockyard.engine.model.files import prepare
from blockyard.engine.model.tokenizer import Tokenizer
from blockyard.engine.sampling_params import SamplingParams, Structure
from blockyard.engine.structured import MAX_SCHEMA_BYTES, GrammarCompiler


class Person(BaseModel):
    """Validates as strictly as the schema made of it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=150)
    colour: Literal["red", "green", "blue"]
    tags: list[Annotated[str, Field(max_length=5)]] = Field(max_length=2)


PERSON = json.dumps(Person.model_json_schema())


@pytest.fixture(scope="module")
def model() -> Path:
    return prepare("SmolLM2-135M-Instruct")


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_directory(model)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    engine = Engine(
        EngineConfig(
            model=str(model), device="cpu", threads=1, kv_blocks=120, max_num_seqs=8, max_model_len=512
        )
    )
    yield engine
    engine.close()


def run(
    engine: Engine, tokenizer: Tokenizer, prompts: list[str], params: SamplingParams
) -> dict[tuple[str, int], tuple[str, str | None]]:
    """(text, finish reason) of each choice."""
    ids: dict[tuple[str, int], list[int]] = {}
    reasons: dict[tuple[str, int], str | None] = {}
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), tokenizer.encode(prompt), params)
    while engine.has_work:
        for output in engine.step():
            key = output.request_id, output.index
            ids.setdefault(key, []).extend(output.token_ids)
            reasons[key] = output.finish_reason
        engine.check()
    return {key: (tokenizer.decode(tokens), reasons[key]) for key, tokens in ids.items()}


def test_greedy_json_of_a_schema_validates(engine: Engine, tokenizer: Tokenizer) -> None:
    params = SamplingParams(temperature=0, max_tokens=120, structure=Structure("json_schema", PERSON))
    for text, reason in run(engine, tokenizer, ["Describe a person.", "Hello"], params).values():
        assert reason == "stop", text
        Person.model_validate_json(text)


def test_hot_sampling_with_forks_still_validates(engine: Engine, tokenizer: Tokenizer) -> None:
    """Each fork has a grammar of its own; at this temperature an unconstrained model says anything."""
    params = SamplingParams(
        temperature=2.0,
        seed=1,
        n=4,
        best_of=4,
        max_tokens=160,
        structure=Structure("json_schema", PERSON),
    )
    texts = run(engine, tokenizer, ["A person:"], params)
    assert len({text for text, _ in texts.values()}) == 4
    for text, reason in texts.values():
        assert reason == "stop", text
        Person.model_validate_json(text)


def test_json_object_is_an_object(engine: Engine, tokenizer: Tokenizer) -> None:
    params = SamplingParams(temperature=0, max_tokens=100, structure=Structure("json_object"))
    finished = 0
    prompt = 'Answer with JSON: {"city": "Paris"}. Now for Rome:'
    for text, reason in run(engine, tokenizer, [prompt, "Write a JSON object."], params).values():
        assert text.startswith("{")
        if reason == "stop":
            finished += 1
            assert isinstance(json.loads(text), dict)
    assert finished > 0


def test_a_grammar_leaves_batch_mates_alone(engine: Engine, tokenizer: Tokenizer) -> None:
    plain = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    alone = run(engine, tokenizer, ["The capital of France is"], plain)["0", 0]
    strict = SamplingParams(temperature=0, max_tokens=12, structure=Structure("json_object"))
    engine.add_request("json", tokenizer.encode("The capital of France is"), strict)
    assert run(engine, tokenizer, ["The capital of France is"], plain)["0", 0] == alone


def test_a_grammar_survives_preemption(model: Path, tokenizer: Tokenizer) -> None:
    """A grammar follows tokens, not KV: recomputing the one must not move the other."""
    params = SamplingParams(
        temperature=1.0, seed=4, max_tokens=100, structure=Structure("json_schema", PERSON)
    )
    engine = Engine(
        EngineConfig(
            model=str(model), device="cpu", threads=1, kv_blocks=8, max_num_seqs=8, max_model_len=128
        )
    )
    texts = run(engine, tokenizer, [f"Person number {i} is" for i in range(8)], params)
    assert engine.stats().preemptions_recompute > 0
    engine.close()
    for text, reason in texts.values():
        assert reason == "stop", text
        Person.model_validate_json(text)


@pytest.fixture(scope="module")
def compiler(model: Path, tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(str(model), tokenizer.vocab_size, [2])
    yield compiler
    compiler.close()


def test_the_first_grammar_finds_everything_made(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llguidance, "LLTokenizer", lambda *_, **__: pytest.fail("made at the request"))
    assert compiler.compile(Structure("json_object")).allowed().any()


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 9999991},
        {"allOf": [{"type": "string", "pattern": f".*a{i}.*"} for i in range(30)]},
    ],
    ids=["multipleOf", "allOf"],
)
def test_a_schema_that_would_take_minutes_or_gigabytes_is_refused(
    compiler: GrammarCompiler, schema: dict[str, Any]
) -> None:
    with pytest.raises(RequestError, match=r"too complex: .* MiB.*simplify") as caught:
        compiler.compile(Structure("json_schema", json.dumps(schema)))
    assert caught.value.field == "response_format"
    assert compiler.compile(Structure("json_schema", PERSON)).allowed().any()


def test_a_trial_that_takes_too_long_is_ended(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.compile(Structure("json_object"))  # so that the child is ready
    monkeypatch.setattr(grammar_trial, "TIMEOUT", 0.0)
    child = compiler._trials._idle
    assert child is not None
    with pytest.raises(RequestError, match="too complex"):
        compiler.compile(Structure("json_schema", json.dumps({"multipleOf": 99991, "type": "integer"})))
    assert child._process.poll() is not None


def test_trials_do_not_wait_for_each_other(compiler: GrammarCompiler) -> None:
    """Only one child stays when all are done."""
    with ThreadPoolExecutor(3) as threads:
        grammars = list(threads.map(compiler.compile, [Structure("json_schema", PERSON)] * 6))
    assert all(grammar.allowed().any() for grammar in grammars)
    assert compiler._trials._idle is not None


def test_a_trial_that_runs_is_ended_with_the_compiler(model: Path, tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(str(model), tokenizer.vocab_size, [2])
    compiler.compile(Structure("json_object"))  # so that the child is ready
    child = compiler._trials._idle
    assert child is not None
    child._process.send_signal(signal.SIGSTOP)  # it would answer when its time is up, no sooner
    with ThreadPoolExecutor(1) as threads:
        trial = threads.submit(compiler.compile, Structure("json_object"))
        while not compiler._trials._busy:
            time.sleep(0.01)
        compiler.close()
        assert isinstance(trial.exception(timeout=5), RequestError)
    assert child._process.poll() is not None


def test_nothing_is_left_when_it_is_closed(model: Path, tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(str(model), tokenizer.vocab_size, [2])
    child = compiler._trials._idle
    assert child is not None
    compiler.close()
    assert child._process.poll() is not None


def test_a_model_without_a_usable_tokenizer_serves_all_but_grammars(tmp_path: Path) -> None:
    for content in (None, "{}"):
        if content is not None:
            (tmp_path / "tokenizer.json").write_text(content)
        compiler = GrammarCompiler(str(tmp_path), 100, [2])
        with pytest.raises(RequestError, match="leave response_format out"):
            compiler.compile(Structure("json_object"))
        compiler.close()


@pytest.mark.parametrize(
    "params", [{}, {"n": 2, "best_of": 2, "temperature": 1e-3}, {"best_of": 2, "temperature": 1e-3}]
)
def test_an_output_that_cannot_be_continued_is_an_error_and_hurts_nobody(
    engine: Engine, tokenizer: Tokenizer, params: dict[str, Any]
) -> None:
    """After its first token, this schema's parser has more items in a row than llguidance allows."""
    schema = {"anyOf": [{"type": "array", "items": {"type": "string", "minLength": i}} for i in range(800)]}
    structure = Structure("json_schema", json.dumps(schema))
    strict = SamplingParams(**{"temperature": 0, "max_tokens": 20, **params, "structure": structure})
    plain = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    ids = tokenizer.encode("The capital of France is")
    alone = run(engine, tokenizer, ["The capital of France is"], plain)["0", 0]
    engine.add_request("strict", ids, strict)
    engine.add_request("plain", ids, plain)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
        engine.check()
    (failed,) = [output for output in outputs if output.error]
    assert failed.request_id == "strict" and failed.finish_reason == "abort"
    assert "too complex" in str(failed.error) and "2000" in str(failed.error)
    assert [output for output in outputs if output.request_id == "strict"][-1] is failed
    tokens = [token for output in outputs if output.request_id == "plain" for token in output.token_ids]
    assert tokenizer.decode(tokens) == alone[0]
    assert engine.stats().device.active == 0


@pytest.mark.parametrize(
    "schema",
    [
        "",
        "{",
        "[1]",
        "3",
        '"x"',
        '{"type": "no such type"}',
        '{"$ref": "#/nowhere"}',
        '{"type": 5}',
        "[" * 50000,
    ],
)
def test_schemas_that_cannot_be_used_are_refused(compiler: GrammarCompiler, schema: str) -> None:
    with pytest.raises(RequestError, match="JSON schema cannot be used") as caught:
        compiler.compile(Structure("json_schema", schema))
    assert caught.value.field == "response_format"


def test_a_huge_schema_is_refused_with_the_limit(compiler: GrammarCompiler) -> None:
    with pytest.raises(RequestError, match=f"at most {MAX_SCHEMA_BYTES}"):
        compiler.compile(Structure("json_schema", json.dumps({"description": "x" * MAX_SCHEMA_BYTES})))


def test_a_fork_goes_its_own_way(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    schema: dict[str, Any] = {"enum": ["ab", "cd"]}
    first = compiler.compile(Structure("json_schema", json.dumps(schema)))
    (quote,) = tokenizer.encode('"')
    first.accept(quote)
    second = first.fork()
    (a,), (c,) = tokenizer.encode("a"), tokenizer.encode("c")
    first.accept(a)
    second.accept(c)
    (b,), (d,) = tokenizer.encode("b"), tokenizer.encode("d")
    assert first.allowed()[b] and not first.allowed()[d]
    assert second.allowed()[d] and not second.allowed()[b]
