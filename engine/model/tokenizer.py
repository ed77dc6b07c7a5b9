"""Text to tokens and back, without torch: done in the HTTP process, the engine only gets ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from ..errors import ConfigError, RequestError
from .config import read_eos_token_ids

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """The tokenizer of one model folder (tokenizer.json) and its chat template."""

    def __init__(
        self,
        fast: FastTokenizer,
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
        special: dict[str, str] | None = None,
    ) -> None:
        self._fast = fast
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self._special = special or {}
        self._template = None if chat_template is None else _compile(chat_template)

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json, chat_template.jinja and config.json of a model."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"model {directory} has no tokenizer.json; save it with a fast tokenizer")
        config = _read(directory / "tokenizer_config.json")
        template = config.get("chat_template")
        if (directory / "chat_template.jinja").is_file():
            template = (directory / "chat_template.jinja").read_text()
        if isinstance(template, list):  # several templates with names
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        special = {
            name: value if isinstance(value, str) else value["content"]
            for name, value in config.items()
            if name.endswith("_token") and isinstance(value, (str, dict))
        }
        fast = FastTokenizer.from_file(str(path))
        model = _read(directory / "config.json")
        vocab_size = int(model.get("vocab_size") or fast.get_vocab_size())
        return cls(
            fast,
            vocab_size=vocab_size,
            eos_token_ids=read_eos_token_ids(model, directory),
            chat_template=template,
            special=special,
        )

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text. A special token spelled out in the text becomes that special token."""
        try:
            return list(self._fast.encode(text, add_special_tokens=add_special_tokens).ids)
        except (UnicodeEncodeError, TypeError):
            raise RequestError(
                "the text has a lone surrogate, which no UTF-8 text can have", field="prompt"
            ) from None

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return str(self._fast.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """One token as text; bytes that are not valid UTF-8 alone become replacement characters."""
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """One token's bytes, exact for byte-level and byte-fallback vocabularies."""
        piece = self._fast.id_to_token(token_id)
        if piece is None:
            return b""
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        text = self.token_text(token_id)
        if _REPLACEMENT not in text:
            return text.encode()
        return bytes(_BYTE_OF[c] for c in piece if c in _BYTE_OF)

    def render_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt for a conversation, from the chat template. RequestError if the template refuses it."""
        if self._template is None:
            raise RequestError(
                "this model has no chat template; use /v1/completions with a prompt of your own",
                field="messages",
            )
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, **self._special
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise RequestError(
                f"the model's chat template refuses the messages: {error}", field="messages"
            ) from None


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _compile(source: str) -> jinja2.Template:
    """In a sandbox, as transformers does it, because templates come with models from other people."""

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().astimezone().strftime(pattern)
    return environment.from_string(source)


def _byte_alphabet() -> dict[str, int]:
    """Map each character with which byte-level BPE writes a byte (GPT-2's table) to that byte."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return {**{chr(b): b for b in visible}, **{chr(256 + i): b for i, b in enumerate(hidden)}}


_BYTE_OF = _byte_alphabet()


class Detokenizer:
    """Turns tokens into text as they arrive: only complete characters, in sum the text of all tokens at once.

    A token is decoded together with the piece before it, since a decoder may treat the first token of a
    text differently; then the text of the earlier piece alone is cut off. A piece ends only where a
    character ends. Constant work per token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._begin = 0  # first token of the piece sent last
        self._end = 0  # first token whose text is not sent

    def feed(self, ids: Sequence[int]) -> str:
        """The text that is complete after these tokens; may be empty."""
        text = ""
        for token_id in ids:
            self._ids.append(token_id)
            text += self._advance(final=False)
        return text

    def flush(self) -> str:
        """The remaining text at the end, with incomplete characters as replacement characters."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        known = self._tokenizer.decode(self._ids[self._begin : self._end])
        grown = self._tokenizer.decode(self._ids[self._begin :])
        if len(grown) <= len(known) or (grown.endswith(_REPLACEMENT) and not final):
            return ""
        self._begin, self._end = self._end, len(self._ids)
        return grown[len(known) :]


class StopStrings:
    """Lets text through up to the first stop string, and never a part of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """(text that is safe to send, whether a stop string was met)."""
        if not self._stops:
            return text, False
        self._held += text
        found = min((at for stop in self._stops if (at := self._held.find(stop)) >= 0), default=-1)
        if found >= 0:
            text, self._held = self._held[:found], ""
            return text, True
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text, False

    def _overlap(self, stop: str) -> int:
        """The longest end of the held text that begins this stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)

    def flush(self) -> str:
        """The rest, when no more text will come."""
        text, self._held = self._held, ""
        return text
