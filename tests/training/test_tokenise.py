"""Rows of every form to token ids, with exactly the assistant's tokens to be learned."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tiny_run import CHATML, words
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import ahn
from ahn.training.records import BadRowError, decode, normalise
from ahn.training.tokenise import RowTokenizer, render

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one  two\n"},
    {"role": "assistant", "content": "  def f():\n    return 1"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "import os"},
]
THINKING = (  # like Qwen3's: the last reply gets an empty block of thoughts, earlier ones lose theirs
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|endoftext|>\n"
    "{% endfor %}"
)
TRIMMING = CHATML.replace("m.content", "m.content | trim")
UPPER = CHATML.replace("m.content", "m.content | upper")
REFUSING = "{{ raise_exception('only users may speak') }}"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(ahn.tiny.path())
    tokenizer.chat_template = CHATML
    return tokenizer


def tokenised(tokenizer: PreTrainedTokenizerBase, *rows: Any, **settings: Any) -> list[dict[str, Any]]:
    chosen = {"cutoff": 4096, "shortest": 0, "smallest_total": 0} | settings
    batch = {"bytes": [json.dumps(row).encode() for row in rows], "form": ["json"] * len(rows)}
    batch["where"] = [f"rows:{n}" for n in range(len(rows))]
    found = RowTokenizer(tokenizer, **chosen)(batch)
    return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]


@pytest.mark.parametrize("template", [CHATML, THINKING, TRIMMING])
def test_the_assistants_words_are_learned_and_nothing_else(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = template
    text, spans = render(CHAT, tokenizer)
    assert text == tokenizer.apply_chat_template(CHAT, tokenize=False)
    replies = [message["content"] for message in CHAT if message["role"] == "assistant"]
    shown = [reply.strip() if template == TRIMMING else reply for reply in replies]
    assert [text[first:last] for first, last in spans] == [f"{reply}<|endoftext|>" for reply in shown]
    (row,) = tokenised(tokenizer, {"messages": CHAT})
    assert tokenizer.decode(row["input_ids"]) == text
    assert tokenizer.decode(row["input_ids"][row["learn"]]) == "".join(f"{reply}<|endoftext|>" for reply in shown)


@pytest.mark.parametrize(
    ("template", "words"), [(UPPER, "rewrites what a reply says"), (REFUSING, "only users may speak")]
)
def test_templates_that_do_not_fit(template: str, words: str, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = template
    (row,) = tokenised(tokenizer, {"messages": CHAT})
    assert row["fate"] == "bad" and words in row["problem"]


def test_conversations_need_a_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ahn.AHNError, match="no chat template"):
        tokenised(tokenizer, {"messages": CHAT})


USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, REPLY], "id": 3}, [USER, REPLY]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [USER, REPLY]),
        ({"messages": [USER | {"content": [{"type": "text", "text": "q"}]}, REPLY]}, [USER, REPLY]),
        ({"prompt": "q", "response": "a"}, [USER, REPLY]),
        ({"question": "q", "answer": "a", "text": "x"}, [USER, REPLY]),
        ({"instruction": "do", "input": "this", "output": "a"}, [USER | {"content": "do\nthis"}, REPLY]),
        ({"system": "s", "prompt": "q", "completion": "a"}, [{"role": "system", "content": "s"}, USER, REPLY]),
        ({"text": "plain"}, "plain"),
        ("plain", "plain"),
    ],
)
def test_forms(row: Any, expected: Any) -> None:
    assert normalise(row) == expected


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (3, "a int instead of an object"),
        ({}, "it has nothing"),
        ({"content": "x"}, "it has content"),
        ({"messages": "hello"}, "not a list of messages"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": ["hello"]}, "a message is not an object"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role 'wizard'"),
        ({"messages": [{"content": "x"}]}, "unknown role None"),
        ({"messages": [USER]}, "no assistant's turn"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "content is not text"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "content is empty"),
        ({"messages": [USER | {"content": [{"type": "image"}]}, REPLY]}, "something other than text"),
        ({"prompt": "q", "response": 7}, "response is not text"),
        ({"text": ["a"]}, "text is not text"),
        ({"text": ""}, "text is empty"),
    ],
)
def test_bad_rows(row: Any, words: str) -> None:
    with pytest.raises(BadRowError, match=words):
        normalise(row)


@pytest.mark.parametrize(
    ("content", "form", "words"),
    [(b"{oops", "json", "not JSON"), (b"\xff\xfe", "text", "not UTF-8 at byte 0"), (b'{"a": "\xe9"}', "json", "UTF-8")],
)
def test_bytes_that_cannot_be_read(content: bytes, form: str, words: str) -> None:
    with pytest.raises(BadRowError, match=words):
        decode({"bytes": content, "form": form, "where": "x:1"})


def test_long_texts_become_pieces(tokenizer: PreTrainedTokenizerBase) -> None:
    text = words(120, 0)
    ids = tokenizer(text)["input_ids"]
    pieces = tokenised(tokenizer, {"text": text}, cutoff=50, shortest=20)
    joined = [token for piece in pieces for token in piece["input_ids"]]
    assert [len(piece["input_ids"]) for piece in pieces[:-1]] == [50] * (len(pieces) - 1)
    assert len(ids) - len(joined) <= 20 and joined == ids[: len(joined)], "only a short rest is left out"
    assert all(piece["learn"].all() for piece in pieces)


def test_what_is_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [USER | {"content": words(60, 1)}, REPLY]
    long, late = {"text": words(100, 2)}, {"messages": chat}
    short, early = {"text": words(5, 3)}, {"messages": [*chat[::-1]]}
    rows = tokenised(tokenizer, long, short, late, early, {"messages": chat}, shortest=20, smallest_total=20)
    assert [row["fate"] for row in rows] == ["kept", "short", "kept", "idle", "kept"]
    (cut,) = tokenised(tokenizer, late, cutoff=30, shortest=20, smallest_total=20)
    assert cut["fate"] == "idle", "its reply was cut away"


def test_strict_stops(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ahn.AHNError, match="rows:1: text is empty"):
        tokenised(tokenizer, {"text": words(30, 0)}, {"text": ""}, strict=True)
