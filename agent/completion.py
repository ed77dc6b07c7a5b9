"""One completion request from its tokens to its answer: the text of each choice, log-probs, usage.

The two OpenAI endpoints differ in how a prompt is made and in the shape of what is sent; the ``Shape``
classes hold those differences, everything else is here once.
"""

from __future__ import annotations

import asyncio
import codecs
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..engine.model.tokenizer import Detokenizer, StopStrings, Tokenizer
from ..engine.outputs import FinishReason, SequenceOutput, TokenLogprob
from .engine_client import Generation


@dataclass(slots=True)
class Piece:
    """What is new of one choice: its text, the log-probs of its new tokens, and why it ended if it did."""

    index: int
    tokens: int
    text: str
    logprobs: list[TokenLogprob]
    finish_reason: FinishReason | None


@dataclass(slots=True)
class Totals:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Choice:
    """The text of one choice as it grows. Stop strings count only after ``min_tokens`` tokens."""

    def __init__(self, tokenizer: Tokenizer, stops: list[str], min_tokens: int, index: int) -> None:
        self.index = index
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(stops)
        self._unstoppable = min_tokens  # tokens that are still to come before a stop string counts

    def advance(self, output: SequenceOutput) -> tuple[Piece, bool]:
        """(what is new, whether a stop string ended the choice before the engine did)."""
        text, stopped, tokens = "", False, 0
        for token_id in output.token_ids:  # many, if choices are ranked
            tokens += 1
            new = self._detokenizer.feed([token_id])
            if self._unstoppable:
                self._unstoppable -= 1
            else:
                new, stopped = self._stops.feed(new)
            text += new
            if stopped:
                break
        reason: FinishReason | None = "stop" if stopped else output.finish_reason
        if output.finish_reason is not None and not stopped:
            rest, stopped_at_end = self._stops.feed(self._detokenizer.flush())
            text += rest if stopped_at_end else rest + self._stops.flush()
            reason = "stop" if stopped_at_end else reason
        piece = Piece(self.index, tokens, text, (output.logprobs or [])[:tokens], reason)
        return piece, stopped and output.finish_reason is None


@dataclass(slots=True)
class Completion:
    """A request of one or more prompts, all in the engine. Choices are numbered through the prompts."""

    tokenizer: Tokenizer
    generations: list[Generation]
    prompts: list[list[int]]
    choices_each: int
    stops: list[str]
    min_tokens: int
    totals: Totals = field(default_factory=Totals)

    @property
    def choices(self) -> int:
        return self.choices_each * len(self.generations)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """New text of any choice, as it comes. Raises what ``Generation.outputs`` raises."""
        self.totals.prompt_tokens = sum(map(len, self.prompts))
        if len(self.generations) == 1:
            async with aclosing(self._follow(0)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        merged: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

        async def forward(number: int) -> None:
            try:
                async for piece in self._follow(number):
                    merged.put_nowait(piece)
                merged.put_nowait(None)
            except Exception as error:  # noqa: BLE001 - raised where the pieces are read
                merged.put_nowait(error)

        tasks = [asyncio.create_task(forward(i)) for i in range(len(self.generations))]
        try:
            running = len(tasks)
            while running:
                item = await merged.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    async def _follow(self, number: int) -> AsyncGenerator[Piece, None]:
        generation = self.generations[number]
        first = number * self.choices_each
        choices = [
            Choice(self.tokenizer, self.stops, self.min_tokens, first + i) for i in range(self.choices_each)
        ]
        counted = False
        async for output in generation.outputs():
            if not counted:
                self.totals.cached_tokens += output.cached_tokens
                counted = True
            self.totals.completion_tokens += len(output.token_ids)
            piece, stopped = choices[output.index].advance(output)
            if stopped:
                generation.stop(output.index)
            yield piece


# ── The two shapes ────────────────────────────────────────────────────────────────────────────────


LOWEST_LOGPROB = -9999.0  # OpenAI's, for what JSON has no number for


def _escaped(data: bytes) -> str:
    """Bytes that are no valid UTF-8 by themselves, in the form that OpenAI gives them."""
    return "".join(f"\\x{byte:02x}" for byte in data)


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


class Shape(Protocol):
    """The form in which an endpoint sends its answers."""

    def first_chunks(self, count: int) -> list[dict[str, Any]]: ...
    def chunk(self, piece: Piece) -> dict[str, Any]: ...
    def usage_chunk(self, totals: Totals) -> dict[str, Any]: ...
    def response(self, pieces: list[list[Piece]], totals: Totals) -> dict[str, Any]: ...


def _text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _reason(pieces: list[Piece]) -> FinishReason:
    return pieces[-1].finish_reason or "abort"


def _logprobs(pieces: list[Piece]) -> list[TokenLogprob]:
    return [entry for piece in pieces for entry in piece.logprobs]


class ChatShape:
    """/v1/chat/completions."""

    def __init__(self, model: str, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._with_logprobs = logprobs

    def _entries(self, logprobs: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None

        def token(token_id: int, logprob: float) -> dict[str, Any]:
            data = self._tokenizer.token_bytes(token_id)
            text = self._tokenizer.token_text(token_id) if _is_text(data) else _escaped(data)
            return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(data)}

        content = [
            {**token(e.token_id, e.logprob), "top_logprobs": [token(i, value) for i, value in e.top]}
            for e in logprobs
        ]
        return {"content": content, "refusal": None}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}

    def first_chunks(self, count: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": i, "delta": delta, "logprobs": None, "finish_reason": None}])
            for i in range(count)
        ]

    def chunk(self, piece: Piece) -> dict[str, Any]:
        choice = {
            "index": piece.index,
            "delta": {"content": piece.text} if piece.text or piece.logprobs else {},
            "logprobs": self._entries(piece.logprobs) if piece.logprobs else None,
            "finish_reason": piece.finish_reason,
        }
        return self._chunk([choice])

    def usage_chunk(self, totals: Totals) -> dict[str, Any]:
        return {**self._chunk([]), "usage": totals.usage()}

    def response(self, pieces: list[list[Piece]], totals: Totals) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": _text(parts), "refusal": None},
                "logprobs": self._entries(_logprobs(parts)),
                "finish_reason": _reason(parts),
            }
            for i, parts in enumerate(pieces)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": totals.usage()}


class CompletionShape:
    """/v1/completions."""

    def __init__(self, model: str, tokenizer: Tokenizer, *, logprobs: bool, echoes: list[str]) -> None:
        identity = f"cmpl-{uuid.uuid4().hex}"
        self._head = {
            "id": identity,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._tokenizer = tokenizer
        self._with_logprobs = logprobs
        self._echoes = echoes  # of each choice; empty strings where no echo is wanted
        self._offsets = [len(echo) for echo in echoes]
        # A token may be a part of a character: offsets count the characters that are complete.
        self._decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in echoes]

    def _entries(self, index: int, logprobs: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        offsets = []
        for entry in logprobs:
            offsets.append(self._offsets[index])
            data = self._tokenizer.token_bytes(entry.token_id)
            self._offsets[index] += len(self._decoders[index].decode(data))
        return {
            "tokens": [self._token(entry.token_id) for entry in logprobs],
            "token_logprobs": [max(entry.logprob, LOWEST_LOGPROB) for entry in logprobs],
            "top_logprobs": [self._alternatives(entry) for entry in logprobs],
            "text_offset": offsets,
        }

    def _token(self, token_id: int) -> str:
        data = self._tokenizer.token_bytes(token_id)
        return self._tokenizer.token_text(token_id) if _is_text(data) else f"bytes:{_escaped(data)}"

    def _alternatives(self, entry: TokenLogprob) -> dict[str, float]:
        """The best tokens, and the chosen one even if it is not among them, as OpenAI has it."""
        pairs = [*entry.top, (entry.token_id, entry.logprob)]
        return {self._token(token_id): max(value, LOWEST_LOGPROB) for token_id, value in pairs}

    def _choice(
        self, index: int, text: str, logprobs: list[TokenLogprob], reason: str | None
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": self._entries(index, logprobs),
            "finish_reason": reason,
        }

    def first_chunks(self, count: int) -> list[dict[str, Any]]:
        return [
            {**self._head, "choices": [self._choice(i, self._echoes[i], [], None)]}
            for i in range(count)
            if self._echoes[i]
        ]

    def chunk(self, piece: Piece) -> dict[str, Any]:
        return {
            **self._head,
            "choices": [self._choice(piece.index, piece.text, piece.logprobs, piece.finish_reason)],
        }

    def usage_chunk(self, totals: Totals) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": totals.usage()}

    def response(self, pieces: list[list[Piece]], totals: Totals) -> dict[str, Any]:
        choices = [
            self._choice(i, self._echoes[i] + _text(parts), _logprobs(parts), _reason(parts))
            for i, parts in enumerate(pieces)
        ]
        return {**self._head, "choices": choices, "usage": totals.usage()}
