"""A stream that changes agents in the middle: wherever it is cut, the client gets one consistent answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockyard.agent.errors import BadRequest
from blockyard.agent.gateway.replay import DONE, AgentFailed, BrokenStream, Diverged, Ledger
from blockyard.agent.gateway.request import Ask

TOKENS = ["The", " cat", " sat", "\n", "é", "", "🙂", " on", " the", " mat", '"', " "]


@dataclass
class Answer:
    """The tokens of each choice of a request, which are the same wherever it is computed."""

    choices: list[list[str]]
    chat: bool
    logprobs: bool

    def events(self, cuts: st.DataObject, name: str) -> list[bytes]:
        """The answer as one agent may stream it: any number of tokens per event, text later than tokens."""
        head = {"id": name, "created": hash(name) % 1000, "model": "m", "usage": None}
        found = [self._event(head, i, "", [], None, first=True) for i in range(len(self.choices))]
        found = found if self.chat else []
        streams = [list(self._pieces(cuts, head, i)) for i in range(len(self.choices))]
        while any(streams):
            busy = [stream for stream in streams if stream]
            found.append(cuts.draw(st.sampled_from(busy)).pop(0))
        found.append(json.dumps({**head, "choices": [], "usage": {"completion_tokens": 3}}).encode())
        return [*found, DONE]

    def _pieces(self, cuts: st.DataObject, head: dict[str, Any], index: int) -> Iterator[bytes]:
        tokens, at, held = self.choices[index], 0, ""
        while True:
            size = cuts.draw(st.integers(1, 3))
            new = tokens[at : at + size]
            at += size
            held += "".join(new)
            ends = at >= len(tokens)
            shown = len(held) if ends else cuts.draw(st.integers(0, len(held)))
            yield self._event(head, index, held[:shown], new, "length" if ends else None)
            held = held[shown:]
            if ends:
                return

    def _event(
        self, head: Any, index: int, text: str, tokens: list[str], reason: str | None, *, first: bool = False
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": reason}
        if self.chat:
            choice["delta"] = {"role": "assistant", "content": ""} if first else {"content": text}
            if self.logprobs and tokens:
                choice["logprobs"] = {
                    "content": [{"token": t, "logprob": -1.0} for t in tokens],
                    "refusal": None,
                }
        else:
            choice["text"] = text
            if self.logprobs:
                choice["logprobs"] = {
                    "tokens": tokens,
                    "token_logprobs": [-1.0 for _ in tokens],
                    "top_logprobs": [{t: -1.0} for t in tokens],
                    "text_offset": [0 for _ in tokens],
                }
        return json.dumps({**head, "choices": [choice]}).encode()


@dataclass
class Client:
    """What a client that reads the stream has received in the end."""

    answer: Answer

    def read(self, events: list[bytes]) -> None:
        assert events[-1] == DONE and events.count(DONE) == 1
        parsed = [json.loads(event) for event in events[:-1]]
        assert len({(event["id"], event["created"]) for event in parsed}) == 1
        assert [event["usage"] for event in parsed if event["usage"]] == [{"completion_tokens": 3}]
        for index, tokens in enumerate(self.answer.choices):
            mine = [c for event in parsed for c in event["choices"] if c["index"] == index]
            text = "".join(c["delta"].get("content", "") if self.answer.chat else c["text"] for c in mine)
            assert text == "".join(tokens)
            assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["length"]
            assert mine[-1]["finish_reason"] == "length"
            if self.answer.chat:
                assert [("role" in c["delta"]) for c in mine] == [True] + [False] * (len(mine) - 1)
            if self.answer.logprobs:
                assert self._tokens(mine) == tokens

    def _tokens(self, choices: list[Any]) -> list[str]:
        found = []
        for choice in choices:
            logprobs = choice["logprobs"]
            if logprobs and self.answer.chat:
                found += [entry["token"] for entry in logprobs["content"]]
            elif logprobs:
                found += logprobs["tokens"]
                lengths = {len(logprobs[name]) for name in logprobs}
                assert lengths == {len(logprobs["tokens"])}
        return found


def answers(choices: int = 3) -> st.SearchStrategy[Answer]:
    tokens = st.lists(st.sampled_from(TOKENS), min_size=1, max_size=8)
    return st.builds(
        Answer, st.lists(tokens, min_size=1, max_size=choices), chat=st.booleans(), logprobs=st.booleans()
    )


@given(answers(), st.lists(st.integers(0, 30), max_size=3), st.data())
def test_a_stream_through_several_agents_is_one_answer(
    answer: Answer, lost_after: list[int], cuts: st.DataObject
) -> None:
    ledger, got = Ledger(), []
    for number, count in enumerate([*lost_after, 10**9]):
        events = answer.events(cuts, f"agent-{number}")
        last = number == len(lost_after)
        got += [
            kept
            for event in (events if last else events[: min(count, len(events) - 1)])
            if (kept := ledger.take(event))
        ]
        ledger.rewind()
    Client(answer).read(got)


@given(answers(choices=2), st.data())
def test_an_undisturbed_stream_passes_through_byte_for_byte(answer: Answer, cuts: st.DataObject) -> None:
    ledger, events = Ledger(), answer.events(cuts, "agent")
    assert [ledger.take(event) for event in events] == events


@given(answers(choices=1), st.data())
def test_another_answer_is_noticed_before_any_of_it_is_sent(answer: Answer, cuts: st.DataObject) -> None:
    """Whatever is sent of a replay that differs goes on from what was sent before."""
    changed = cuts.draw(st.integers(0, len(answer.choices[0]) - 1))
    other = Answer([list(answer.choices[0])], answer.chat, answer.logprobs)
    other.choices[0][changed] = "OTHER"
    ledger, sent = Ledger(), ""

    def text(event: bytes) -> str:
        choices = [] if event in (b"", DONE) else json.loads(event)["choices"]
        return "".join(c["delta"].get("content", "") if answer.chat else c["text"] for c in choices)

    events = answer.events(cuts, "first")[:-2]  # all of the answer has been sent, but not its end
    for event in events:
        sent += text(ledger.take(event))
    ledger.rewind()
    problem = None
    for event in other.events(cuts, "second"):
        try:
            sent += text(ledger.take(event))
        except Diverged as error:
            problem = error
            break
    assert problem is not None
    assert sent == "".join(answer.choices[0])


def test_a_shorter_or_a_longer_replay_is_noticed() -> None:
    def event(text: str, reason: str | None = None) -> bytes:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        return json.dumps({"id": "x", "created": 1, "choices": [choice]}).encode()

    ledger = Ledger()
    ledger.take(event("abc"))
    ledger.rewind()
    with pytest.raises(Diverged, match="ends before"):
        ledger.take(event("ab", "stop"))
    ledger = Ledger()
    ledger.take(event("abc"))
    ledger.rewind()
    ledger.take(event("ab"))
    with pytest.raises(Diverged, match="ends before the end"):
        ledger.take(DONE)
    ledger = Ledger()
    ledger.take(event("abc", "length"))
    ledger.rewind()
    with pytest.raises(Diverged, match="goes on where it had ended"):
        ledger.take(event("abcd"))


def test_an_agents_error_says_whether_another_agent_may_help() -> None:
    def error(code: str) -> bytes:
        return json.dumps({"error": {"message": "m", "type": "t", "param": None, "code": code}}).encode()

    for code, final in [("engine_failed", False), ("server_shutdown", False), ("internal_error", True)]:
        with pytest.raises(AgentFailed) as caught:
            Ledger().take(error(code))
        assert caught.value.final == final
    for junk in (
        b"",
        b"[]",
        b"{}",
        b'{"id": "x", "created": 1, "choices": [{}]}',
        b"<html>",
        b'{"error": 3}',
    ):
        with pytest.raises(BrokenStream):
            Ledger().take(junk)


# ── What makes a request replayable ───────────────────────────────────────────────────────────────


def body(**more: Any) -> bytes:
    return json.dumps({"model": "m", "prompt": "p", **more}).encode()


@pytest.mark.parametrize(
    "request_body",
    [
        body(temperature=0),
        body(temperature=0.0, seed=None),
        body(temperature=1, seed=7),
        body(seed=0),
        body(use_beam_search=True),
        body(prompt=["a", "b"], temperature=0),
    ],
)
def test_what_is_greedy_or_seeded_is_sent_as_it_came(request_body: bytes) -> None:
    ask = Ask.of(request_body, "")
    assert ask.replayable
    assert ask.body is request_body


def test_a_sampled_request_gets_a_seed_of_its_own() -> None:
    asks = [Ask.of(body(temperature=0.7, seed=None, logit_bias={"1": 0.1}), "") for _ in range(2)]
    sent = [json.loads(ask.body) for ask in asks]
    assert sent[0]["seed"] != sent[1]["seed"]
    assert all(ask.replayable and 0 <= data["seed"] < 2**53 for ask, data in zip(asks, sent, strict=True))
    assert {**sent[0], "seed": None} == json.loads(body(temperature=0.7, seed=None, logit_bias={"1": 0.1}))


def test_several_sampled_prompts_keep_their_own_randomness() -> None:
    for prompt in (["a", "a"], [[1, 2], [1, 2]]):
        ask = Ask.of(body(prompt=prompt), "")
        assert not ask.replayable
        assert "seed" not in json.loads(ask.body)
    assert Ask.of(body(prompt=[1, 2]), "").replayable  # one prompt of two tokens


@pytest.mark.parametrize("junk", [b"", b"[]", b"3", b'{"a": NaN}', b"\xff", b'"\\ud800"', b"{" * 100000])
def test_what_is_no_json_object_is_refused(junk: bytes) -> None:
    with pytest.raises(BadRequest, match="JSON"):
        Ask.of(junk, "")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(
    st.dictionaries(
        st.sampled_from(
            ["messages", "prompt", "temperature", "seed", "stream", "cache_salt", "use_beam_search"]
        ),
        JSON | st.lists(st.fixed_dictionaries({"role": JSON, "content": JSON}), max_size=3),
    )
)
def test_whatever_the_fields_are_the_agent_is_asked(data: dict[str, Any]) -> None:
    """It is the agent that says what is wrong with a field; the gateway only has to survive it."""
    ask = Ask.of(json.dumps(data).encode(), "tenant")
    sent = json.loads(ask.body)
    assert {**sent, "seed": data.get("seed")} == {**data, "seed": data.get("seed")}
