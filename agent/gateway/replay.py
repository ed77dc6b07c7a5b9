"""What a client has received of a stream, so that another agent can go on with it.

A request that is greedy or seeded gives the same text wherever it is computed. When its agent is lost, the
request is sent to another one. Of the new stream everything that the client already has is left out, and the
rest is sent under the first stream's id, so that the client notices nothing. Agents divide the text
differently into events, so positions are counted in characters of each choice and in tokens of its log-probs,
not in events.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json

DONE = b"[DONE]"


class Diverged(Exception):
    """The replay is not what the client already has; the stream cannot go on."""


class BrokenStream(Exception):
    """The agent sent what is not a stream of completion events."""


class AgentFailed(Exception):
    """The agent ended the stream with an error. ``final``: another agent would answer the same."""

    def __init__(self, message: str, *, code: str, final: bool) -> None:
        super().__init__(message)
        self.code, self.final = code, final


# Codes of errors that are about the agent and not about the request.
RETRYABLE = ("engine_failed", "server_shutdown", "server_draining", "server_drained", "server_failed")


@dataclass(slots=True)
class _Choice:
    """What the client has of one choice, and the position in it of the stream that is being read."""

    text: str = ""
    tokens: list[str] = field(default_factory=list)  # those whose log-probs were sent
    begun: bool = False  # its role was sent
    finish_reason: str | None = None
    text_at: int = 0
    tokens_at: int = 0


class Ledger:
    """Follows one request's stream through all the agents that it takes."""

    def __init__(self) -> None:
        self.replaying = False
        self.sent_anything = False
        self._usage_sent = False  # usage comes in one event without choices, after all others
        self._choices: dict[int, _Choice] = {}
        self._head: dict[str, Any] = {}  # id and created of the stream's first event, kept for all later ones

    def rewind(self) -> None:
        """The next events come from the beginning of another agent's stream."""
        self.replaying = self.sent_anything
        for choice in self._choices.values():
            choice.text_at = choice.tokens_at = 0

    def take(self, data: bytes) -> bytes:
        """One event's data as an agent sent it -> the data that the client is to get, or nothing.

        Diverged, BrokenStream or AgentFailed.
        """
        if data == DONE:
            self._check_end()
            return data
        try:
            event = from_json(data)
            if "error" in event:
                error = event["error"]
                code = str(error.get("code"))
                raise AgentFailed(str(error.get("message")), code=code, final=code not in RETRYABLE)
            if not self._head:
                self._head = {"id": event["id"], "created": event["created"]}
            kept = [choice for choice in event["choices"] if self._advance(choice)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BrokenStream(f"an event that is none: {data[:200]!r} ({error!r})") from None
        if not kept and (event["choices"] or self._usage_sent):
            return b""
        self._usage_sent = not event["choices"]
        self.sent_anything = True
        if not self.replaying:
            return data
        return json.dumps({**event, **self._head, "choices": kept}, separators=(",", ":")).encode()

    def _advance(self, new: dict[str, Any]) -> bool:
        """Cut off what the client has of this choice already; False if that leaves nothing."""
        known = self._choices.setdefault(new["index"], _Choice())
        delta = new.get("delta")  # chat has a delta; completions have the text itself
        text = (delta.get("content") if delta is not None else new["text"]) or ""
        rest = self._unsent_text(known, text)
        logprobs = self._unsent_logprobs(known, new.get("logprobs"))
        begins = delta is not None and "role" in delta and not known.begun
        ends = new.get("finish_reason") is not None and known.finish_reason is None
        if known.finish_reason is not None and (rest or logprobs):
            raise Diverged(f"choice {new['index']} goes on where it had ended")
        if new.get("finish_reason") is not None and known.text_at < len(known.text):
            raise Diverged(f"choice {new['index']} ends before what was already sent")
        if begins:
            known.begun = True
        if ends:
            known.finish_reason = new["finish_reason"]
        if self.replaying:
            if delta is not None:
                content = {"content": rest} if "content" in delta else {}
                new["delta"] = {**({"role": delta["role"]} if begins else {}), **content}
            else:
                new["text"] = rest
            new["logprobs"] = logprobs
            new["finish_reason"] = known.finish_reason if ends else None
        return bool(not self.replaying or rest or logprobs or begins or ends)

    @staticmethod
    def _unsent_text(known: _Choice, text: str) -> str:
        have = known.text[known.text_at : known.text_at + len(text)]
        if not text.startswith(have):
            raise Diverged(f"at character {known.text_at} it says {text[:40]!r} and not {have[:40]!r}")
        rest = text[len(have) :]
        known.text_at += len(text)
        known.text += rest
        return rest

    @staticmethod
    def _unsent_logprobs(known: _Choice, logprobs: dict[str, Any] | None) -> dict[str, Any] | None:
        """Chat has a list of entries under content, completions parallel lists."""
        if not logprobs:
            return None
        chat = "content" in logprobs
        tokens = [entry["token"] for entry in logprobs["content"]] if chat else list(logprobs["tokens"])
        have = known.tokens[known.tokens_at : known.tokens_at + len(tokens)]
        if tokens[: len(have)] != have:
            raise Diverged(f"token {known.tokens_at} and what follows is {tokens[:8]} and not {have[:8]}")
        known.tokens_at += len(tokens)
        known.tokens += tokens[len(have) :]
        if len(have) == len(tokens):
            return None
        return {
            name: value[len(have) :] if isinstance(value, list) and len(value) == len(tokens) else value
            for name, value in logprobs.items()
        }

    def _check_end(self) -> None:
        for index, choice in self._choices.items():
            if choice.text_at < len(choice.text) or choice.finish_reason is None:
                raise Diverged(f"the stream ends before the end of choice {index}")
