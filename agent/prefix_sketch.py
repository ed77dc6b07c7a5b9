"""Sketches of prompts: hashes that tell a gateway which agent has served the beginning of a prompt.

A prompt is sketched by hashes of its growing beginnings: of 64 characters, 128, 192, ... and, beyond 1024, in
steps of a sixteenth, so that the longest prompt has fewer than two hundred. Two prompts have a hash in common
exactly if they begin with the same text, so the last hash they have in common tells how much KV one can reuse
of the other. The sketch is made of text and not of tokens, because a gateway has no tokenizer. It includes
the tenant, because KV blocks of two tenants are never shared. It is a hint: a wrong one costs time and never
changes an answer.

An agent keeps the hashes it has seen in a ``prefix_log.PrefixLog``; a gateway has a copy of each agent's in a
``gateway.prefix_mirror.PrefixMirror``, which ``PrefixReport`` brings up to date.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

from pydantic import BaseModel, Field

FIRST_STEP = 64  # characters; about one KV block of 16 tokens
LONGEST = 1 << 24  # characters of a prompt that are looked at
CHARACTERS_PER_TOKEN = 4  # a rough mean over languages and tokenizers
MAX_ENTRIES = 1 << 14  # hashes that an agent remembers at most


def _boundaries() -> list[int]:
    found = [FIRST_STEP]
    while found[-1] < LONGEST:
        found.append(found[-1] + max(FIRST_STEP, found[-1] // 16))
    return found


BOUNDARIES = _boundaries()  # lengths, in characters, at which a prompt's beginning is hashed


@dataclass(frozen=True, slots=True)
class Prefix:
    """The sketch of one prompt: ``hashes[i]`` is that of its first ``BOUNDARIES[i]`` characters."""

    hashes: tuple[int, ...] = ()
    length: int = 0

    def shared_with(self, known: Container[int]) -> int:
        """How many characters at the prompt's beginning are known there.

        By bisection: a log that knows a beginning also knows all shorter ones of it, because they were used
        together with it and are forgotten no sooner.
        """
        first_unknown = bisect_left(self.hashes, True, key=lambda entry: entry not in known)
        return BOUNDARIES[first_unknown - 1] if first_unknown else 0


def sketch(parts: Iterable[str], tenant: str) -> Prefix:
    """The sketch of a prompt that is given in parts; how it is cut into parts makes no difference."""
    text = "".join(parts)[:LONGEST]
    digest = blake2b(tenant.encode("utf-8", "surrogatepass"), digest_size=8)
    digest.update(b"\0")
    hashes, begin = [], 0
    for end in BOUNDARIES[: bisect_right(BOUNDARIES, len(text))]:
        digest.update(text[begin:end].encode("utf-8", "surrogatepass"))
        hashes.append(int.from_bytes(digest.digest(), "big"))
        begin = end
    return Prefix(tuple(hashes), len(text))


def chat_parts(messages: Iterable[tuple[str, str]]) -> Iterator[str]:
    """A conversation of (role, text), in a form in which a continued conversation begins with the text of the
    earlier one.
    """
    for role, text in messages:
        yield f"{role}\0"
        yield text
        yield "\0"


def prompt_parts(prompt: str | list[int]) -> Iterator[str]:
    """A prompt that is text or token ids."""
    if isinstance(prompt, str):
        yield prompt
    else:
        yield "\0"  # ids are no text
        yield " ".join(map(str, prompt))


class PrefixUse(BaseModel):
    """The hashes that one request has used, as 16 hexadecimal digits each."""

    version: int
    hashes: list[str]


class PrefixReport(BaseModel):
    """What ``GET /prefixes`` answers."""

    incarnation: str
    version: int = Field(description="pass it as ?since=, with the incarnation, to wait for what comes next")
    oldest: int = Field(description="hashes last used by an older version are forgotten")
    uses: list[PrefixUse] = Field(description="all uses after since, the oldest first")
