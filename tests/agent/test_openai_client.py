"""The official client against a real agent with the real model."""

from __future__ import annotations

import json
import math

import openai
import pytest

from blockyard.engine.model.files import prepare

from .process import MODEL, AgentProcess

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7
    again = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0)
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == (again.usage.prompt_tokens - 1) // 16 * 16
    assert again.choices[0].message.content == answer.choices[0].message.content


def test_stream_equals_the_whole_answer(client: openai.OpenAI) -> None:
    ask = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Count in emojis \U0001f600"}],
        "temperature": 0,
    }
    whole = client.chat.completions.create(**ask, max_tokens=30)
    text, reasons, usages = "", [], []
    for chunk in client.chat.completions.create(
        **ask, max_completion_tokens=30, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons.append(choice.finish_reason)
        if chunk.usage:
            usages.append(chunk.usage)
    assert text == whole.choices[0].message.content
    assert [r for r in reasons if r] == [whole.choices[0].finish_reason]
    assert whole.usage is not None
    assert [u.completion_tokens for u in usages] == [whole.usage.completion_tokens]


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=FRANCE, temperature=0, logprobs=True, top_logprobs=3, max_tokens=5
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content
    for entry in logprobs.content:
        assert bytes(entry.bytes or []).decode() == entry.token
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1.0001
    old = client.completions.create(
        model=MODEL, prompt="The capital of", temperature=0, logprobs=2, max_tokens=4
    )
    legacy = old.choices[0].logprobs
    assert legacy is not None
    assert legacy.tokens is not None
    assert legacy.text_offset is not None
    assert "".join(legacy.tokens) == old.choices[0].text
    assert legacy.text_offset[0] == 0
    assert len(legacy.top_logprobs or []) == 4


def test_n_and_best_of(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=FRANCE, temperature=1.2, n=4, seed=5, max_tokens=12
    )
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 48
    again = client.chat.completions.create(
        model=MODEL, messages=FRANCE, temperature=1.2, n=4, seed=5, max_tokens=12
    )
    assert [choice.message.content for choice in again.choices] == texts
    best = client.completions.create(
        model=MODEL, prompt="Once upon a", temperature=1.0, best_of=4, n=2, seed=1, max_tokens=8, logprobs=0
    )
    means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in best.choices]  # type: ignore[union-attr,arg-type]
    assert means == sorted(means, reverse=True)


def test_beam_search(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="The sun is", max_tokens=8, n=2, best_of=3, extra_body={"use_beam_search": True}
    )
    assert len(answer.choices) == 2
    assert answer.choices[0].text != answer.choices[1].text


def test_beam_search_with_a_response_format_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=FRANCE,
        n=2,
        max_tokens=12,
        logprobs=True,
        top_logprobs=2,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": {"enum": ["Paris", "Rome", "Berlin"]}},
        },
        extra_body={"use_beam_search": True, "best_of": 4, "min_tokens": 9},
    )
    cities = [json.loads(choice.message.content or "") for choice in answer.choices]
    assert cities[0] == "Paris" != cities[1]
    for choice in answer.choices:
        assert choice.finish_reason == "stop"  # the grammar is finished, whatever min_tokens says
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)


@pytest.mark.parametrize("mode", [{"best_of": 2, "seed": 1}, {"use_beam_search": True}])
def test_stop_strings_of_ranked_choices(client: openai.OpenAI, mode: dict[str, object]) -> None:
    """They are found when the choice is sent; its log-probs end where its text ends."""
    ask = {"model": MODEL, "prompt": "1, 2, 3, 4,", "max_tokens": 12, "logprobs": 0}
    plain = client.completions.create(**ask, extra_body=mode).choices[0]
    assert plain.logprobs is not None and plain.logprobs.tokens is not None
    stop = plain.logprobs.tokens[4]
    first = plain.logprobs.tokens.index(stop)
    stopped = client.completions.create(**ask, stop=stop, extra_body=mode).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == plain.text.partition(stop)[0]
    assert stopped.logprobs is not None
    assert stopped.logprobs.tokens == plain.logprobs.tokens[: first + 1]


def test_stop_strings_count_after_min_tokens(client: openai.OpenAI) -> None:
    ask = {"model": MODEL, "prompt": "1, 2, 3, 4,", "temperature": 0, "max_tokens": 24}
    plain = client.completions.create(**ask).choices[0].text
    assert plain.count(",") > 2
    first = client.completions.create(**ask, stop=",").choices[0].text
    later = client.completions.create(**ask, stop=",", extra_body={"min_tokens": 6}).choices[0].text
    assert plain.startswith(later + ",")
    assert len(later) > len(first)
    never = client.completions.create(**ask, stop=",", extra_body={"min_tokens": 24}).choices[0]
    assert (never.text, never.finish_reason) == (plain, "length")


def test_stop_strings(client: openai.OpenAI, agent: AgentProcess) -> None:
    ask = {"model": MODEL, "prompt": "1, 2, 3, 4,", "temperature": 0, "max_tokens": 40}
    plain = client.completions.create(**ask).choices[0]
    assert ", 8" in plain.text
    before = agent.idle()["finished"]
    stopped = client.completions.create(**ask, stop=["zebra", ", 8"]).choices[0]
    after = agent.idle()["finished"]
    assert after["stop"] == before.get("stop", 0) + 1  # and not "abort"
    assert stopped.text == plain.text[: plain.text.index(", 8")]
    assert stopped.finish_reason == "stop"
    streamed = "".join(
        choice.text
        for chunk in client.completions.create(**ask, stop=", 8", stream=True)
        for choice in chunk.choices
    )
    assert streamed == stopped.text


def test_prompts_of_every_kind(client: openai.OpenAI, agent: AgentProcess) -> None:
    one = (
        client.completions.create(model=MODEL, prompt="Water is", temperature=0, max_tokens=5).choices[0].text
    )
    ids = client.post(f"{agent.url}/tokenize", body={"prompt": "Water is"}, cast_to=object)
    assert isinstance(ids, dict)
    several = client.completions.create(
        model=MODEL, prompt=[ids["tokens"], ids["tokens"]], temperature=0, max_tokens=5, echo=True
    )
    assert [c.text for c in several.choices] == ["Water is" + one] * 2
    texts = client.completions.create(
        model=MODEL, prompt=["Water is", "Fire is"], temperature=0, max_tokens=5, n=1
    )
    assert texts.choices[0].text == one != texts.choices[1].text
    assert texts.usage is not None
    assert texts.usage.completion_tokens == 10


def test_response_format(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "population": {"type": "integer", "minimum": 0, "maximum": 99999999},
        },
        "required": ["city", "population"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL,
        messages=FRANCE,
        temperature=0,
        max_tokens=80,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    )
    assert answer.choices[0].finish_reason == "stop"
    assert set(json.loads(answer.choices[0].message.content or "")) == {"city", "population"}
    with pytest.raises(openai.BadRequestError, match="schema"):
        client.chat.completions.create(
            model=MODEL,
            messages=FRANCE,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "bad", "schema": {"type": "x"}},
            },
        )


def test_json_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Describe a cat as JSON."}],
        temperature=0,
        max_tokens=120,
        response_format={"type": "json_object"},
        stop="}",  # a small model may go on describing for long
    )
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert (answer.choices[0].message.content or "").startswith("{")
    # Only what can go on to be an object was allowed: without the format the answer is prose.
    free = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Say hello."}], temperature=0, max_tokens=8
    )
    assert not (free.choices[0].message.content or "").startswith("{")


def test_a_seed_gives_the_same_answer_whatever_else_is_asked(client: openai.OpenAI) -> None:
    ask = {"model": MODEL, "prompt": "My favourite animal is", "temperature": 1.3, "max_tokens": 10}

    def answers(seed: int | None, prompts: int = 1) -> list[str]:
        made = client.completions.create(**{**ask, "prompt": [ask["prompt"]] * prompts}, seed=seed)
        return [choice.text for choice in made.choices]

    alone = answers(7)
    assert answers(7) == alone
    assert answers(7, prompts=5) == alone * 5
    assert answers(-7) != alone
    assert len(set(answers(None, prompts=4))) > 1
    sharp = client.completions.create(**ask, seed=7, extra_body={"min_p": 1.0}).choices[0].text
    greedy = client.completions.create(**{**ask, "temperature": 0}).choices[0].text
    assert sharp == greedy


def test_choices_stop_each_for_itself(client: openai.OpenAI) -> None:
    ask = {"model": MODEL, "prompt": "1, 2, 3, 4,", "temperature": 0.7, "n": 4, "seed": 3, "max_tokens": 24}
    plain = [choice.text for choice in client.completions.create(**ask).choices]
    parts = [part for text in plain for part in text.split(",") if part]
    stop = next(part for part in parts if sum(part in text for text in plain) in (1, 2, 3))  # not all have it
    expected = [text.partition(stop)[0] for text in plain]
    stopped = client.completions.create(**ask, stop=stop)
    assert [choice.text for choice in stopped.choices] == expected
    texts, reasons = [""] * 4, [None] * 4
    for chunk in client.completions.create(**ask, stop=stop, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == expected
    assert reasons == ["stop" if stop in text else "length" for text in plain]


def test_streamed_prompts_and_echo_keep_their_places(client: openai.OpenAI) -> None:
    ask = {"model": MODEL, "prompt": ["Water is", "Fire is"], "temperature": 0, "max_tokens": 4, "echo": True}
    whole = client.completions.create(**ask)
    texts = ["", ""]
    usage = None
    for chunk in client.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert texts[0].startswith("Water is")
    assert texts[1].startswith("Fire is")
    assert usage is not None
    assert usage == whole.usage


def test_tokenize_equals_transformers(client: openai.OpenAI, agent: AgentProcess) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(str(prepare(MODEL)))

    def ours(**body: object) -> list[int]:
        answer = client.post(f"{agent.url}/tokenize", body=body, cast_to=object)
        assert isinstance(answer, dict)
        assert answer["count"] == len(answer["tokens"])
        assert answer["max_model_len"] == 8192
        return answer["tokens"]  # type: ignore[no-any-return]

    texts = [
        "Hello, world!",
        "  two  spaces\n\nand\tlines ",
        "na\u00efve \u6f22\u5b57 \U0001f600\U0001f3fd 12345678",
        "<|im_start|>user",
        "def f(x):\n    return x**2 # \u2264",
        "a" * 3000,
    ]
    for text in texts:
        assert ours(prompt=text) == reference.encode(text, add_special_tokens=False), text
    conversations = [
        FRANCE,
        [
            {"role": "system", "content": "Be brief."},
            *FRANCE,
            {"role": "assistant", "content": " Paris. "},
            {"role": "user", "content": "And \u6f22?"},
        ],
    ]
    for messages in conversations:
        for generation in (True, False):
            expected = reference.apply_chat_template(
                messages, add_generation_prompt=generation, tokenize=True, return_dict=False
            )
            assert ours(messages=messages, add_generation_prompt=generation) == list(expected)


def test_penalties_and_bias_change_the_answer(client: openai.OpenAI, agent: AgentProcess) -> None:
    ask = {"model": MODEL, "prompt": "The cat and the cat and the", "temperature": 0, "max_tokens": 12}
    plain = client.completions.create(**ask).choices[0].text
    assert client.completions.create(**ask, frequency_penalty=2, presence_penalty=2).choices[0].text != plain
    first = client.post(f"{agent.url}/tokenize", body={"prompt": plain}, cast_to=object)["tokens"][0]  # type: ignore[index]
    assert client.completions.create(**ask, logit_bias={str(first): -100}).choices[0].text != plain
    assert client.completions.create(**ask, extra_body={"min_p": 0.1, "top_k": 5}).choices[0].text == plain


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"model": "other"}, "model", "does not exist"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 100000}, "max_tokens", "context is 8192 tokens"),
        ({"n": 65}, "n", "64"),
        ({"n": True}, "n", "integer"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "system"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "pattern"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias", "tokens are 0 to"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"extra_body": {"typo": 1}}, "typo", "not a field"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, "messages", "Shorten the prompt"),
    ],
)
def test_errors_name_field_limit_and_remedy(
    client: openai.OpenAI, change: dict[str, object], param: str, message: str
) -> None:
    with pytest.raises(openai.APIStatusError, match=message) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": FRANCE, "max_tokens": 4, **change})  # type: ignore[call-overload]
    assert caught.value.status_code == (404 if "model" in change else 400)
    assert caught.value.param == param


def test_a_cancelled_stream_frees_its_blocks(client: openai.OpenAI, agent: AgentProcess) -> None:
    before = agent.idle()["generated_tokens"]
    stream = client.completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    for _, _chunk in zip(range(3), stream, strict=False):
        pass
    stream.close()
    after = agent.idle()["generated_tokens"]
    assert after - before < 1000


def test_models_metrics_and_headers(client: openai.OpenAI, agent: AgentProcess) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=FRANCE, max_tokens=2, extra_headers={"x-request-id": "mine", "x-tenant": "a"}
    )
    assert raw.headers["x-request-id"] == "mine"
    metrics = client.get(f"{agent.url}/metrics", cast_to=str)
    for name in (
        "vllm:num_requests_running",
        "vllm:kv_cache_usage_perc",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:prefix_cache_hits_total",
        "vllm:request_success_total",
        "blockyard_kv_blocks",
    ):
        assert name in metrics, name


def test_status_long_poll_answers_on_change(agent: AgentProcess) -> None:
    status = agent.idle()
    assert agent.get(f"/status?since={status['version'] - 1}&wait=60")["version"] >= status["version"]
    assert status["state"] == "ready"
    assert len(status["layout_digest"]) == 64
    assert agent.code("/status?wait=x") == 400
    assert agent.code("/status?wait=1e9") == 400
    assert agent.code("/status?wait=nan") == 400
