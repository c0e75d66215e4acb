"""Rows to token ids: pieces of long texts, conversations that are shortened, and what is left out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from templates import CHATML, STYLES, tokenizer_of
from tiny_run import words
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

import ahn
from ahn.training.messages import BYTES, FORM, WHERE
from ahn.training.tokenise import RowTokenizer, shorten


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return tokenizer_of(STYLES["chatml"])


def tokenised(tokenizer: PreTrainedTokenizerBase, *rows: Any, **settings: Any) -> list[dict[str, Any]]:
    chosen = {"cutoff": 4096, "shortest": 0, "smallest_total": 0} | settings
    contents = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    batch = {BYTES: contents, FORM: ["json"] * len(rows), WHERE: [f"rows:{n}" for n in range(len(rows))]}
    found = RowTokenizer(tokenizer, **chosen)(batch)
    return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]


USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def test_long_texts_become_pieces(tokenizer: PreTrainedTokenizerBase) -> None:
    text = words(120, 0)
    ids = tokenizer(text)["input_ids"]
    pieces = tokenised(tokenizer, {"text": text, "id": 3}, cutoff=50, shortest=20)
    joined = [token for piece in pieces for token in piece["input_ids"]]
    assert [len(piece["input_ids"]) for piece in pieces[:-1]] == [50] * (len(pieces) - 1)
    assert len(ids) - len(joined) <= 20 and joined == ids[: len(joined)], "only a short rest is left out"
    assert all(piece["learn"].all() for piece in pieces)
    assert [piece["first"] for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece["unused"] for piece in pieces] == [["id"]] + [[]] * (len(pieces) - 1), "once for a row"


@pytest.mark.parametrize(("form", "after"), [("<s> $A", 0), ("<s> $A <|endoftext|>", 1), ("$A", 0)])
def test_each_piece_begins_as_the_base_was_trained(form: str, after: int) -> None:
    tokenizer = tokenizer_of(STYLES["llama2"])
    specials = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<|endoftext|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=form, special_tokens=specials)
    text = words(100, 0)
    bare, whole = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer(text)["input_ids"]
    begin = [specials[0][1]] if "<s>" in form else []
    assert whole == [*begin, *bare, *([specials[1][1]] * after)]
    pieces = [list(piece["input_ids"]) for piece in tokenised(tokenizer, {"text": text}, cutoff=40)]
    assert all(piece[: len(begin)] == begin and len(piece) <= 40 for piece in pieces) and len(pieces) > 2
    assert [token for piece in pieces for token in piece[len(begin) :]] == whole[len(begin) :]
    assert [list(piece["input_ids"]) for piece in tokenised(tokenizer, {"text": text})] == [whole]


def test_what_is_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [USER | {"content": words(60, 1)}, REPLY]
    long, late = {"text": words(100, 2)}, {"messages": chat}
    short, early = {"text": words(5, 3)}, {"messages": [*chat[::-1]]}
    rows = tokenised(tokenizer, long, short, late, early, {"messages": chat}, shortest=20, smallest_total=20)
    assert [row["fate"] for row in rows] == ["kept", "short", "kept", "idle", "kept"]


def test_a_conversation_that_is_too_long_keeps_its_reply(tokenizer: PreTrainedTokenizerBase) -> None:
    """The middle of what is before it goes: the beginning of the document and the question stay."""
    chat = [USER | {"content": f"first {words(300, 1)} question"}, REPLY | {"content": "import os"}]
    (whole,) = tokenised(tokenizer, {"messages": chat})
    (cut,) = tokenised(tokenizer, {"messages": chat}, cutoff=80)
    assert cut["shortened"] and not whole["shortened"] and len(cut["input_ids"]) == 80
    text = tokenizer.decode(cut["input_ids"])
    assert text.startswith("<|im_start|>user\nfirst") and "question<|im_end|>\n<|im_start|>assistant\n" in text
    assert tokenizer.decode(cut["input_ids"][cut["learn"]]) == "import os<|im_end|>"
    assert cut["fate"] == "kept"


def test_shorten() -> None:
    def learn(*lengths: int) -> np.ndarray:
        """Stretches of tokens: those that are not learned and those that are, in turns."""
        return np.concatenate([np.full(length, bool(n % 2)) for n, length in enumerate(lengths)])

    assert shorten(learn(90, 10), 100).tolist() == list(range(100)), "it fits"
    assert shorten(learn(40, 10, 50), 60).tolist() == list(range(60)), "what follows the reply goes first"
    kept = shorten(learn(200, 10, 300), 100)
    assert kept.tolist() == [*range(45), *range(155, 210)], "then the middle of what is before it"
    long_reply = shorten(learn(50, 200), 100)
    assert len(long_reply) == 100 and long_reply[-1] < 249, "a reply beyond the cutoff loses its end"
    assert long_reply[:12].tolist() == list(range(12)), "an eighth of the cutoff stays on either side"
    several = shorten(learn(100, 10, 400, 10), 200)
    assert {*range(100, 110), *range(510, 520)} <= set(several.tolist()), "every reply stays"
    assert set(range(100)) <= set(several.tolist()), "the longest stretch is cut before others"
    for lengths in ((0, 5, 500, 5), (500, 0), (1, 1), (300, 3, 300, 3, 300, 3)):
        for cutoff in (2, 64, 100):
            kept = shorten(learn(*lengths), cutoff)
            assert len(kept) == min(cutoff, sum(lengths)) and (np.diff(kept) > 0).all()


def test_rows_that_cannot_be_tokenised_do_not_stop_the_others(tokenizer: PreTrainedTokenizerBase) -> None:
    half = b'{"text": "half \\ud83d"}', b'{"messages": [{"role": "\\ud83d"}]}', b'{"\\ud83d": 1}'
    rows = tokenised(tokenizer, half[0], {"text": "whole"}, *half[1:])
    assert [row["fate"] for row in rows] == ["bad", "kept", "bad", "bad"]
    assert [row["where"] for row in rows] == [f"rows:{n}" for n in range(4)]
    assert {row["file"] for row in rows} == {"rows"}
    for row in rows:
        row["problem"].encode()


def test_strict_stops(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ahn.AHNError, match="rows:1: text is empty"):
        tokenised(tokenizer, {"text": words(30, 0)}, {"text": ""}, strict=True)


def test_the_key_tells_templates_and_cutoffs_apart() -> None:
    templates = (CHATML, CHATML + " ")
    keys = {RowTokenizer(tokenizer_of(one), cutoff, 0, 0).key() for one in templates for cutoff in (8, 9)}
    assert len(keys) == 4
