"""Text of a reply as it comes: whole characters, and no part of a stop text."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from ahn import tiny
from ahn.checkpoint.loading import load_tokenizer
from ahn.serve.engine.text import TextStream


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny.path())


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", ["def f(x):\n    return 1\n", "naïve – 漢字 🎉🎉 end", " spaces  and\ttabs"])
def test_pieces_make_the_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    stream = TextStream(tokenizer, ids(tokenizer, "before"))
    pieces = [stream.add(token) for token in ids(tokenizer, text)]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + stream.end() == text == stream.text


def test_bytes_that_never_become_a_character_are_shown(tokenizer: PreTrainedTokenizerBase) -> None:
    stream, half = TextStream(tokenizer, []), ids(tokenizer, "🎉")[:-1]
    assert [stream.add(token) for token in half] == [""] * len(half)
    assert "\ufffd" in stream.end()


def test_a_stop_text_is_never_shown(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "one two three four"
    for stop in ("two", "wo thr", " three f", "four", "one"):
        stream, shown = TextStream(tokenizer, [], [stop, "not there"]), ""
        for token in ids(tokenizer, text):
            shown += stream.add(token)
            if stream.stopped:
                break
        assert stream.stopped and shown + stream.end() == text[: text.index(stop)] == stream.text


def test_what_only_looked_like_a_stop_is_shown(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = TextStream(tokenizer, [], ["two thousand"])
    shown = "".join(stream.add(token) for token in ids(tokenizer, "one two three two"))
    assert shown == "one two three "
    assert shown + stream.end() == "one two three two" and not stream.stopped
