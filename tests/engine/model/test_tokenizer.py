"""Text survives encoding and piecewise decoding, whatever the pieces are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from blockyard.engine.errors import RequestError
from blockyard.engine.model.files import prepare
from blockyard.engine.model.tokenizer import Detokenizer, StopStrings, Tokenizer


@pytest.fixture(scope="module")
def smol() -> Tokenizer:
    return Tokenizer.from_directory(prepare("SmolLM2-135M-Instruct"))


def byte_fallback() -> Tokenizer:
    """A sentencepiece-like vocabulary: words with a space mark, and single bytes for all else."""
    words = ["\u2581", "\u2581a", "a", "\u2581hello", "ll", "o", "e", "h"]
    vocab = [("<unk>", 0.0), *((f"<0x{b:02X}>", -5.0) for b in range(256)), *((w, -1.0) for w in words)]
    fast = FastTokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return Tokenizer(fast, vocab_size=len(vocab))


TEXT = st.text(
    st.sampled_from("aho le\u00e9\u4e16\U0001f600\U0001f468\u200d\U0001f469\n\t\U0001f3fd"), max_size=30
)


@settings(max_examples=200, deadline=None)
@given(text=TEXT, kind=st.sampled_from(["smol", "bytes"]))
def test_text_in_pieces_equals_text_at_once(smol: Tokenizer, text: str, kind: str) -> None:
    tokenizer = smol if kind == "smol" else byte_fallback()
    ids = tokenizer.encode(text)
    stream = Detokenizer(tokenizer)
    pieces = [stream.feed([token_id]) for token_id in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_incomplete_character_is_shown_at_the_end_alone(smol: Tokenizer) -> None:
    ids = smol.encode("\U0001f468")
    assert len(ids) > 1
    stream = Detokenizer(smol)
    assert stream.feed(ids[:-1]) == ""
    assert stream.flush() == smol.decode(ids[:-1])


def test_token_bytes_join_to_the_text(smol: Tokenizer) -> None:
    text = "na\u00efve \u4e16\u754c \U0001f468\u200d\U0001f469 tabs\tand\nlines"
    assert b"".join(smol.token_bytes(i) for i in smol.encode(text)) == text.encode()


def test_equals_transformers(smol: Tokenizer) -> None:
    path = prepare("SmolLM2-135M-Instruct")
    theirs = AutoTokenizer.from_pretrained(path)
    for text in (
        "Hello, world!",
        "  two  spaces ",
        "<|im_start|>user\nhi<|im_end|>",
        "\u4e16\u754c 123 def f(x):\n",
    ):
        assert smol.encode(text) == theirs.encode(text, add_special_tokens=False)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    for messages in (chat, chat[1:2]):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert smol.render_chat(messages) == expected
    assert smol.eos_token_ids == (2,)


def test_bad_text_is_the_requests_fault(smol: Tokenizer) -> None:
    with pytest.raises(RequestError, match="lone surrogate"):
        smol.encode("a\ud800b")
    with pytest.raises(RequestError, match="no chat template"):
        byte_fallback().render_chat([{"role": "user", "content": "hi"}])
    with pytest.raises(RequestError, match="refuses"):
        smol.render_chat([{"role": "user"}])


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.sampled_from("abc"), max_size=40),
    stops=st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=4), max_size=4),
    sizes=st.lists(st.integers(1, 4), min_size=40, max_size=40),
)
def test_stop_strings_cut_where_a_plain_search_would(text: str, stops: list[str], sizes: list[int]) -> None:
    matcher = StopStrings(stops)
    sent, stopped, at = "", False, 0
    for size in sizes:
        piece, stopped = matcher.feed(text[at : at + size])
        sent, at = sent + piece, at + size
        if stopped or at >= len(text):
            break
    seen = text[:at]
    first = min((i for s in stops if (i := seen.find(s)) >= 0), default=-1)
    assert stopped == (first >= 0)
    if stopped:
        assert sent == seen[:first]
    else:
        assert not any(
            sent.endswith(s[:n]) and seen[len(sent) :].startswith(s[n:])
            for s in stops
            for n in range(1, len(s))
        )
        assert sent + matcher.flush() == seen
