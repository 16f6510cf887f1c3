"""Text while it comes: the pieces are the whole, and none ends in half a character."""

from pathlib import Path

import pytest

from thimble.data.tokenizer import tokenizer_from_gguf
from thimble.inference.text_stream import TextStream
from thimble.models.base import open_base

GGUF = Path(__file__).parents[1] / "fixtures" / "gguf"
TEXTS = ["Hello, world: it's 12.5 °C!", "ナイフとフォーク 🍴🍴 — ½ ²", "  two  spaces\n\n\tand tabs", "é" * 30, "", " "]


@pytest.mark.parametrize("name", ["smollm2", "llama", "gemma2", "qwen2"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_of_a_text_are_the_text(name, text):
    tokenizer = tokenizer_from_gguf(open_base(GGUF / f"{name}.gguf").metadata)
    ids, stream = tokenizer.encode(text), TextStream(tokenizer)
    pieces = [stream.add(token) for token in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.end() == tokenizer.decode(ids, skip_special=True)


def test_an_answer_that_ends_within_a_character_shows_the_rest_at_its_end():
    tokenizer = tokenizer_from_gguf(open_base(GGUF / "smollm2.gguf").metadata)
    ids = tokenizer.encode("🍴")
    stream = TextStream(tokenizer)
    assert "".join(stream.add(token) for token in ids[:-1]) == ""
    assert stream.end() == tokenizer.decode(ids[:-1], skip_special=True)


def test_each_token_decodes_a_short_window_only(monkeypatch):
    tokenizer = tokenizer_from_gguf(open_base(GGUF / "smollm2.gguf").metadata)
    lengths, decode = [], tokenizer.decode
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids, **o: lengths.append(len(ids)) or decode(ids, **o))
    stream = TextStream(tokenizer)
    for token in tokenizer.encode("a word " * 100):
        stream.add(token)
    assert max(lengths) < 12
