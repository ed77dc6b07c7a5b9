"""Requests that are wrong in every way there is: each fails alone and affects no other.

Every one is answered with a 4xx in OpenAI's error shape that names the field, the limit and the remedy;
afterwards the agent is idle, has every block, and answers.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from .load import ask
from .process import MODEL, AgentProcess

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(autouse=True)
def _the_agent_is_unharmed(agent: AgentProcess) -> Iterator[None]:
    yield
    status, answer = agent.post(TEXT, ask(1))
    assert (status, answer["usage"]["completion_tokens"]) == (200, 1)
    agent.idle()


def send(agent: AgentProcess, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
    """(status, answer) of a request sent as it is."""
    connection = http.client.HTTPConnection(agent.url.removeprefix("http://"), timeout=120)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): v for name, v in headers.items()})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def check(answer: Any, *, param: str | None, says: str) -> None:
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert says in error["message"]
    assert len(error["message"]) < 600  # a message stays short, however much was wrong


# (what is changed in a good chat request, the field that is named, what is said about it)
FIELDS: list[tuple[dict[str, Any], str, str]] = [
    # wrong types: exact ones are asked for, so that nothing is guessed
    ({"model": 7}, "model", "valid string"),
    ({"model": None}, "model", "valid string"),
    ({"messages": "Hello"}, "messages", "valid list"),
    ({"messages": [7]}, "messages.0", "valid dictionary"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content", "a string or a list of text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content.0",
        "only parts of type text",
    ),
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "valid boolean"),
    ({"temperature": "0"}, "temperature", "valid number"),
    ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
    ({"max_tokens": "9"}, "max_tokens", "valid integer"),
    ({"seed": 1e30}, "seed", "valid integer"),
    ({"stop": 7}, "stop", "a string or a list of strings"),
    ({"stop": ["x", None]}, "stop.1", "valid string"),
    ({"logprobs": 3}, "logprobs", "valid boolean"),
    ({"logit_bias": [1]}, "logit_bias", "valid dictionary"),
    ({"response_format": "json"}, "response_format", "valid dictionary"),
    # unknown and unsupported fields, here and further down
    ({"temprature": 0}, "temprature", "leave it out"),
    ({"x" * 5000: 0}, "x" * 97 + "...", "leave it out"),
    ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages.0.colour", "leave it out"),
    ({"stream_options": {"include": True}}, "stream_options.include", "leave it out"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "use response_format"),
    ({"functions": [{}]}, "functions", "use response_format"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "leave it out"),
    ({"modalities": ["audio"]}, "modalities.0", "text"),
    # outside of the limits
    ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
    ({"top_p": -1}, "top_p", "greater than 0"),
    ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
    ({"top_k": -2}, "top_k", "greater than or equal to -1"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": -1}, "n", "greater than or equal to 1"),
    ({"n": 2, "best_of": 1}, "best_of", "at least n"),
    ({"n": 40}, "best_of", "Lower n or best_of"),
    ({"max_tokens": -5}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 2**40}, "max_tokens", "less than or equal to"),
    ({"max_tokens": 8192}, "max_tokens", "context is 8192 tokens"),
    ({"max_completion_tokens": 9000, "max_tokens": None}, "max_tokens", "lower max_tokens"),
    ({"max_completion_tokens": 9}, "max_tokens", "leave one out"),
    ({"min_tokens": 9}, "min_tokens", "must be in [0, 4]"),
    ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", "greater than or equal to -2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
    ({"seed": 2**63}, "seed", "less than or equal to"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"stop": ""}, "stop", "at least 1 character"),
    ({"stop": "x" * 300}, "stop", "at most 256 characters"),
    ({"stop": ["x"] * 5000}, "stop", "at most 16 items"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0", "greater than or equal to 0"),
    ({"logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias", "at most 1024"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
    ({"logit_bias": {"-5": 1}}, "logit_bias.-5", "pattern"),
    ({"logit_bias": {"999999": 1}}, "logit_bias", "tokens are 0 to 49151"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": HELLO * 5000}, "messages", "at most 4096 items"),
    ({"messages": [{"role": "user", "content": "no " * 9000}]}, "messages", "Shorten the prompt"),
    ({"use_beam_search": True, "temperature": 1}, "temperature", "set temperature to 0"),
    ({"use_beam_search": True, "top_p": 0.5}, "top_p", "beam search draws no tokens"),
    ({"use_beam_search": True, "top_k": 5}, "top_k", "beam search draws no tokens"),
    ({"use_beam_search": True, "min_p": 0.1}, "min_p", "beam search draws no tokens"),
    ({"length_penalty": 2}, "length_penalty", "only beam search uses it"),
    ({"early_stopping": True}, "early_stopping", "only beam search uses it"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"cache_salt": "x" * 300}, "cache_salt", "at most 256 characters"),
    # grammars
    ({"response_format": {"type": "yaml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "is missing"),
    (
        {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
        "response_format",
        "needs type json_schema",
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "object", "properties": 7}},
            }
        },
        "response_format",
        "schema cannot be used",
    ),
]


@pytest.mark.parametrize(
    ("change", "param", "says"), FIELDS, ids=[f"{i}-{p[:24]}" for i, (_, p, _) in enumerate(FIELDS)]
)
def test_a_bad_field_is_named_with_its_limit(
    agent: AgentProcess, change: dict[str, Any], param: str, says: str
) -> None:
    status, answer = agent.post(CHAT, {"model": MODEL, "messages": HELLO, "max_tokens": 4, **change})
    assert status == 400, answer
    check(answer, param=param, says=says)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (None, "a string, a list of strings, a list of token ids"),
        ([], "at least 1 item"),
        ([[]], "at least 1"),
        ([1, "a"], "prompt.1: Input should be a valid integer (got 'a')"),
        (["a", "b", 7], "prompt.2: Input should be a valid string (got 7)"),
        ([[1], [2, "a"]], "prompt.1.1: Input should be a valid integer (got 'a')"),
        ([-1], "greater than or equal to 0"),
        ([2**40], "less than or equal to"),
        ([49152], "tokens are 0 to 49151"),
        ("", "no tokens"),
        (["a"] * 129, "at most 128"),
        ([1] * 9000, "Shorten the prompt"),
    ],
)
def test_a_bad_prompt_is_refused(agent: AgentProcess, prompt: Any, says: str) -> None:
    status, answer = agent.post(TEXT, {"model": MODEL, "prompt": prompt, "max_tokens": 4})
    assert status == 400, answer
    check(answer, param=answer["error"]["param"], says=says)
    assert answer["error"]["param"].split(".")[0] == "prompt"


GOOD = b'{"model": "%s", "prompt": "x", "max_tokens": 1, ' % MODEL.encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x",
        b"[]",
        b"7",
        b"null",
        b'"text"',
        b"{",
        GOOD,
        b"\xff\xfe{}",
        GOOD + b'"user": "\xff"}',
        GOOD + b'"user": "\xc3("}',
        GOOD + b'"user": "\\ud800"}',
        GOOD + b'"temperature": NaN}',
        GOOD + b'"temperature": Infinity}',
        GOOD + b'"top_p": -Infinity}',
        GOOD + b'"temperature": 1e999}',
        GOOD + b'"metadata": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
        GOOD + b'"metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        GOOD + b'"seed": ' + b"9" * 100_000 + b"}",
        b"\x1f\x8b" + b"\x00" * 100,
    ],
    ids=lambda body: repr(body[-24:]),
)
def test_a_body_that_is_no_good_json_is_refused(agent: AgentProcess, body: bytes) -> None:
    status, answer = send(agent, "POST", TEXT, body, Content_Type="application/json")
    assert status == 400, answer
    check(answer, param=answer["error"]["param"], says="")


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize"])
def test_a_huge_body_is_refused_whether_its_length_is_announced_or_not(
    agent: AgentProcess, path: str
) -> None:
    body = json.dumps({"model": MODEL, "prompt": "x" * 1_100_000}).encode()
    status, answer = send(agent, "POST", path, body)
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    check(answer, param=None, says="max_body_bytes")
    connection = http.client.HTTPConnection(agent.url.removeprefix("http://"), timeout=120)
    pieces = (body[i : i + 65536] for i in range(0, len(body), 65536))
    connection.request("POST", path, pieces, encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
    response = connection.getresponse()
    assert response.status == 413
    check(json.loads(response.read()), param=None, says="max_body_bytes")
    connection.close()


def test_a_compressed_body_counts_as_large_as_it_unpacks(agent: AgentProcess) -> None:
    import zlib

    bomb = zlib.compress(b" " * 50_000_000)
    assert len(bomb) < 100_000
    status, answer = send(agent, "POST", TEXT, bomb, Content_Encoding="deflate")
    assert status == 413, answer
    status, answer = send(agent, "POST", TEXT, b"not deflated", Content_Encoding="deflate")
    assert status == 400, answer
    check(answer, param=None, says="")


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("GET", CHAT, 405, "Method Not Allowed"),
        ("DELETE", TEXT, 405, "Method Not Allowed"),
        ("POST", "/status", 405, "Method Not Allowed"),
        ("POST", "/metrics", 405, "Method Not Allowed"),
        ("GET", "/v1/nothing", 404, "Not Found"),
        ("POST", "/v1/embeddings", 404, "Not Found"),
        ("GET", "/%00%ff/../x", 404, "Not Found"),
        ("GET", "/" + "x" * 4000, 404, "Not Found"),
        ("GET", "/status?since=x", 400, "a whole number"),
        ("GET", "/status?since=" + "9" * 400, 400, "a whole number"),
        ("GET", "/status?wait=-1", 400, "a number of seconds"),
        ("GET", "/status?wait=61", 400, "at most 60 seconds"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_wrong_path_or_method_is_refused(
    agent: AgentProcess, method: str, path: str, status: int, says: str
) -> None:
    got, answer = send(agent, method, path)
    assert got == status
    check(answer, param=answer["error"]["param"], says=says)
    if status != 400:
        assert answer["error"]["message"].startswith(f"{method} {path[:150]}")
        assert "/openapi.json" in answer["error"]["message"]


def test_another_model_is_not_found(agent: AgentProcess) -> None:
    for path, body in ((CHAT, {"messages": HELLO}), (TEXT, {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
        status, answer = agent.post(path, {"model": "gpt-4", **body})
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        check(answer, param="model", says=MODEL)


@pytest.mark.parametrize("tenant", ["x" * 129, "m\xfcller"])
def test_a_bad_tenant_is_refused(agent: AgentProcess, tenant: str) -> None:
    status, answer = agent.post(TEXT, ask(1), {"x-tenant": tenant})
    assert status == 400
    check(answer, param="x-tenant", says="at most 128")


def test_what_is_not_http_is_refused(agent: AgentProcess) -> None:
    port = int(agent.url.rpartition(":")[2])
    for nonsense in (b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\nA: " + b"x" * 99_999):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(nonsense)
            assert connection.recv(65536).startswith(b"HTTP/1.1 400") or not connection.recv(65536)
