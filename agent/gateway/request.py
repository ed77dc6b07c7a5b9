"""What a gateway needs to know of a request; the agent validates the rest.

A sampled request without a seed gets a random one, so that it can be replayed: it is as random as before, and
a client whose agent is lost still gets one coherent answer. Several prompts in one request get no seed,
because one seed would give equal prompts equal answers.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from ..errors import BadRequest
from ..prefix_sketch import Prefix, chat_parts, prompt_parts, sketch

SEED_BITS = 53  # what a JSON number holds exactly in every language


@dataclass(frozen=True, slots=True)
class Ask:
    """A completion request: what is sent to agents, and how it may be treated."""

    body: bytes
    stream: bool
    replayable: bool  # its text is the same wherever it is computed
    prefix: Prefix

    @classmethod
    def of(cls, body: bytes, tenant: str) -> Ask:
        """BadRequest if the body is no JSON object."""
        try:
            data = from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise BadRequest(f"the body is not valid JSON in UTF-8: {error}", code="invalid_json") from None
        if not isinstance(data, dict):
            raise BadRequest("the body must be a JSON object", code="invalid_json")
        replayable = _greedy(data) or data.get("seed") is not None
        if not replayable and not _several_prompts(data):
            body = json.dumps({**data, "seed": secrets.randbits(SEED_BITS)}).encode()
            replayable = True
        salt = data.get("cache_salt")
        owner = f"{tenant}\0{salt}" if isinstance(salt, str) and salt else tenant
        return cls(body, data.get("stream") is True, replayable, sketch(_prompt(data), owner))


def _greedy(data: dict[str, Any]) -> bool:
    return data.get("temperature") == 0 or (
        data.get("temperature") is None and data.get("use_beam_search") is True
    )


def _several_prompts(data: dict[str, Any]) -> bool:
    prompt = data.get("prompt")
    return isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)


def _prompt(data: dict[str, Any]) -> Iterator[str]:
    """The text by which an agent is chosen; empty if the prompt is malformed."""
    messages, prompt = data.get("messages"), data.get("prompt")
    if isinstance(messages, list):
        yield from chat_parts(_message(message) for message in messages if isinstance(message, dict))
    elif isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        yield from _one_prompt(prompt[0])
    else:
        yield from _one_prompt(prompt)


def _one_prompt(prompt: Any) -> Iterator[str]:
    if isinstance(prompt, str) or (
        isinstance(prompt, list) and all(isinstance(token, int) for token in prompt)
    ):
        yield from prompt_parts(prompt)


def _message(message: dict[str, Any]) -> tuple[str, str]:
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    role = message.get("role")
    role = "system" if role == "developer" else role if isinstance(role, str) else ""
    return role, content if isinstance(content, str) else ""
