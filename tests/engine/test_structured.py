"""Structured output: whatever the model would like to say, what it says parses and validates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

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
def test_schemas_that_cannot_be_used_are_refused(model: Path, schema: str) -> None:
    compiler = GrammarCompiler(str(model), 49152, [2])
    with pytest.raises(RequestError, match="JSON schema cannot be used") as caught:
        compiler.compile(Structure("json_schema", schema))
    assert caught.value.field == "response_format"


def test_a_huge_schema_is_refused_with_the_limit(model: Path) -> None:
    compiler = GrammarCompiler(str(model), 49152, [2])
    with pytest.raises(RequestError, match=f"at most {MAX_SCHEMA_BYTES}"):
        compiler.compile(Structure("json_schema", json.dumps({"description": "x" * MAX_SCHEMA_BYTES})))


def test_a_fork_goes_its_own_way(model: Path, tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(str(model), tokenizer.vocab_size, [2])
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
