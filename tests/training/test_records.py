"""Rows of every layout to conversations: LLaMA-Factory's, TRL's, OpenAI's; what is refused and what is left unused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ahn.training.messages import BYTES, FORM, WHERE, BadRowError, printable
from ahn.training.records import Conversation, decode, normalise

SYSTEM = {"role": "system", "content": "s"}
USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
EARLIER = [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def messages(row: Any) -> list[dict[str, Any]]:
    content = normalise(row).content
    assert isinstance(content, Conversation)
    return content.messages


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, REPLY]}, [USER, REPLY]),
        ({"conversations": SHAREGPT}, [USER, REPLY]),
        ([USER, REPLY], [USER, REPLY]),
        (SHAREGPT, [USER, REPLY]),
        ({"messages": json.dumps([USER, REPLY])}, [USER, REPLY]),  # as tables hold it
        ({"messages": [USER | {"role": "User"}, REPLY | {"role": "ASSISTANT"}]}, [USER, REPLY]),
        ({"conversations": SHAREGPT, "system": "s"}, [SYSTEM, USER, REPLY]),
        ({"conversations": SHAREGPT, "system": ""}, [USER, REPLY]),
        ({"messages": [SYSTEM, USER, REPLY], "system": "another"}, [SYSTEM, USER, REPLY]),
        ({"messages": [SYSTEM | {"role": "developer"}, USER, REPLY]}, [SYSTEM, USER, REPLY]),
        ({"messages": [USER | {"content": [{"type": "text", "text": "q"}]}, REPLY]}, [USER, REPLY]),
        ({"messages": [USER | {"content": [{"type": "input_text", "text": "q"}]}, REPLY]}, [USER, REPLY]),
        ({"messages": [USER, {"role": "assistant", "content": None, "refusal": "a"}]}, [USER, REPLY]),
        ({"prompt": "q", "response": "a"}, [USER, REPLY]),
        ({"question": "q", "answer": "a", "text": "x"}, [USER, REPLY]),
        ({"input": "q", "output": "a"}, [USER, REPLY]),
        ({"instruction": "", "input": "q", "output": "a"}, [USER, REPLY]),
        ({"instruction": "do", "input": "this", "output": "a"}, [USER | {"content": "do\nthis"}, REPLY]),
        ({"instruction": "q", "input": "", "output": "a", "history": []}, [USER, REPLY]),
        ({"instruction": "q", "output": "a", "history": [["q0", "a0"]]}, [*EARLIER, USER, REPLY]),
        ({"instruction": "q", "output": "a", "history": EARLIER, "system": "s"}, [SYSTEM, *EARLIER, USER, REPLY]),
        ({"instruction": "do", "context": "this", "response": "a"}, [USER | {"content": "do\nthis"}, REPLY]),
        ({"context": "long", "question": "q", "answer": "a"}, [USER | {"content": "long\n\nq"}, REPLY]),
        ({"document": "long", "prompt": "q", "completion": "a"}, [USER | {"content": "long\n\nq"}, REPLY]),
        ({"system": "s", "prompt": "q", "completion": "a"}, [SYSTEM, USER, REPLY]),
        ({"prompt": [USER], "completion": [REPLY]}, [USER, REPLY]),
        ({"prompt": [SYSTEM, USER], "response": "a"}, [SYSTEM, USER, REPLY]),
        ({"prompt": [USER], "chosen": [REPLY], "rejected": [REPLY]}, [USER, REPLY]),
        ({"prompt": "q", "chosen": [USER, REPLY], "rejected": [USER]}, [USER, REPLY]),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, [USER, REPLY]),
        ({"prompt": "q", "completion": "a", "label": True}, [USER, REPLY]),
        ({"messages": [USER, REPLY], "images": [], "tools": "", "id": None}, [USER, REPLY]),
    ],
)
def test_forms(row: Any, expected: Any) -> None:
    assert messages(row) == expected


@pytest.mark.parametrize(("row", "text"), [({"text": "plain"}, "plain"), ("plain", "plain")])
def test_plain_text(row: Any, text: str) -> None:
    assert normalise(row).content == text


@pytest.mark.parametrize(
    ("row", "learned"),
    [
        ({"messages": [USER, REPLY, USER, REPLY]}, [False, True, False, True]),
        ({"messages": [USER, REPLY | {"weight": 0}, USER, REPLY | {"weight": 1}]}, [False, False, False, True]),
        ({"messages": [USER, REPLY | {"weight": 0.0}, USER, REPLY]}, [False, False, False, True]),
        ({"prompt": [USER, REPLY, USER], "completion": [REPLY]}, [False, False, False, True]),
        ({"prompt": [USER, REPLY, USER], "chosen": [REPLY]}, [False, False, False, True]),
        ({"instruction": "q", "output": "a", "history": [["q0", "a0"]]}, [False, True, False, True]),
    ],
)
def test_which_turns_are_learned(row: Any, learned: list[bool]) -> None:
    content = normalise(row).content
    assert isinstance(content, Conversation) and content.learned == learned


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": '{"at": 1}'}}]},
        {"role": "assistant", "tool_calls": [{"name": "look", "arguments": {"at": 1}}]},
        {"role": "assistant", "function_call": {"name": "look", "arguments": '{"at": 1}'}},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": 1}}'},
    ],
)
def test_calls_of_functions(message: Any) -> None:
    answer = {"from": "observation", "value": "7"} if "from" in message else {"role": "tool", "content": {"n": 7}}
    found = messages({"messages": [USER, message, answer, REPLY]})
    assert found[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert found[2] == {"role": "tool", "content": "7" if "from" in message else '{"n": 7}'}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [TOOL["function"]], json.dumps([TOOL["function"]])])
def test_tools(tools: Any) -> None:
    for name in ("tools", "functions"):
        content = normalise({"messages": [USER, REPLY], name: tools}).content
        assert isinstance(content, Conversation) and content.tools == [TOOL]


@pytest.mark.parametrize(
    "thoughts",
    [
        {"reasoning_content": "t"},
        {"reasoning": "t"},
        {"thinking": "t"},
        {"content": [{"type": "thinking", "thinking": "t"}, "a"]},
    ],
)
def test_thoughts(thoughts: Any) -> None:
    names = {"reasoning_content": "t", "reasoning": "t", "thinking": "t"}
    assert messages({"messages": [USER, REPLY | thoughts]})[1] == REPLY | names


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (3, "3 instead of an object"),
        ([{"role": "user"}], "no assistant's turn to learn from"),
        ([1, 2], "a message is not an object"),
        ([], "messages is not a list of messages"),
        ({}, "it has nothing"),
        ({"content": "x"}, "it has content"),
        ({"messages": "hello"}, "messages is not JSON"),
        ({"messages": '{"role": "user"}'}, "not a list of messages"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": ["hello"]}, "a message is not an object"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role 'wizard'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"messages": [{"content": "x"}]}, "unknown role None"),
        ({"messages": [USER]}, "no assistant's turn"),
        ({"messages": [USER, REPLY | {"weight": 0}]}, "no assistant's turn"),
        ({"messages": [USER, REPLY | {"weight": 0.5}]}, r"weight 0.5: a reply is learned \(1\) or not \(0\)"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "content is not text"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "content is empty"),
        ({"messages": [USER | {"content": [{"type": "image_url"}]}, REPLY]}, r"other than text \(image_url\)"),
        ({"messages": [USER | {"content": [{"type": "text", "text": 3}]}, REPLY]}, "part's text is not text"),
        ({"messages": [USER, REPLY], "images": ["a.png"]}, "holds images; only text"),
        ({"instruction": "q", "output": "a", "videos": ["a.mp4"]}, "holds videos; only text"),
        ({"messages": [USER, REPLY], "tools": "{oops"}, "tools is not JSON"),
        ({"messages": [USER, REPLY], "tools": [3]}, "tools is not a list of functions"),
        ({"messages": [USER, REPLY], "chat_template_kwargs": 3}, "chat_template_kwargs is not an object"),
        ({"messages": [USER, REPLY | {"tool_calls": [{"arguments": {}}]}]}, "has no name"),
        ({"messages": [USER, REPLY | {"tool_calls": "look"}]}, "tool_calls is not a list"),
        ({"conversations": [{"from": "function_call", "value": "look!"}]}, "function_call is not JSON"),
        ({"instruction": "q", "output": "a", "history": "hi"}, "history is not a list"),
        ({"instruction": "q", "output": "a", "history": [["q0"]]}, "history is not a list of pairs"),
        ({"prompt": "q", "completion": "a", "label": False}, "not wanted"),
        ({"prompt": "q", "response": 7}, "response is not text"),
        ({"text": ["a"]}, "text is not text"),
        ({"text": ""}, "text is empty"),
        ({"text": "a\0b"}, "text holds a NUL character"),
        ({"text": "a\ud83d"}, r"half of a surrogate pair, '\\ud83d'"),
        ({"messages": [USER, REPLY | {"name": "\udc00"}]}, "half of a surrogate pair"),
        ({"messages": [USER, REPLY], "tools": [{"name": "\udc00"}]}, "half of a surrogate pair"),
    ],
)
def test_bad_rows(row: Any, words: str) -> None:
    with pytest.raises(BadRowError, match=words):
        normalise(row)


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"messages": [USER, REPLY], "id": 3, "tools": []}, ("id",)),
        ({"messages": [SYSTEM, USER, REPLY], "system": "another"}, ("system",)),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ("rejected",)),
        ({"messages": [USER, REPLY], "context": "long"}, ("context",)),
        ({"messages": [USER, REPLY | {"b": 1, "a": []}]}, ("a of messages", "b of messages")),
        ({"instruction": "q", "input": "", "output": "a", "history": [], "kto_tag": True}, ()),
        ({"text": "x", "url": "y"}, ("url",)),
        ("x", ()),
    ],
)
def test_what_a_row_holds_besides(row: Any, unused: tuple[str, ...]) -> None:
    assert normalise(row).unused == unused


@pytest.mark.parametrize(
    ("content", "form", "words"),
    [
        (b"{oops", "json", "not JSON"),
        (b"[" * 100_000, "json", "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "json", "not JSON"),
        (b'{"text": "a\0b"}', "json", "not JSON"),
        (b"\xff\xfea\0", "text", "not UTF-8 at byte 0, it looks like UTF-16"),
        (b'{"a": "\xe9"}', "json", "not UTF-8"),
    ],
)
def test_bytes_that_cannot_be_read(content: bytes, form: str, words: str) -> None:
    with pytest.raises(BadRowError, match=words):
        decode({BYTES: content, FORM: form, WHERE: "x:1"})


def test_a_byte_order_mark_is_no_text() -> None:
    assert decode({BYTES: b"\xef\xbb\xbfhello", FORM: "text", WHERE: "x"}) == {"text": "hello"}
    assert decode({BYTES: b'\xef\xbb\xbf{"text": "x"}', FORM: "json", WHERE: "x:1"}) == {"text": "x"}


def test_nulls_that_tables_fill_in_are_nothing() -> None:
    row = {"messages": [USER | {"tool_calls": None}], "tools": [TOOL | {"x": None}], WHERE: "a:1", "system": None}
    assert decode(row) == {"messages": [USER], "tools": [TOOL]}


def test_printable() -> None:
    assert printable("a\x1b[2J\ud800\n") == "a\\x1b[2J\\ud800\\n"
    assert printable("x" * 400) == "x" * 300 + "…"
