"""Of a conversation, what the model must say is learned and nothing else, whatever the template does with it."""

from __future__ import annotations

from typing import Any

import pytest
from templates import CHATML, QWEN3, STYLES, tokenizer_of

from ahn.errors import AHNError
from ahn.training.messages import BadRowError
from ahn.training.records import normalise
from ahn.training.replies import Renderer, common_prefix
from ahn.training.tokenise import RowTokenizer

CHAT = [
    {"role": "user", "content": "one  two\n"},
    {"role": "assistant", "content": "def f():\n    return 1"},
    {"role": "user", "content": "again <s> assistant"},
    {"role": "assistant", "content": "import os"},
]
REPLIES = ["def f():\n    return 1", "import os"]


def shown(style: str, row: Any) -> tuple[str, list[str], tuple[str, ...]]:
    """The text, what is learned of it by characters, and what the template leaves out."""
    tokenizer = tokenizer_of(STYLES[style])
    found = Renderer(tokenizer)(normalise(row).content)
    return found.text, [found.text[first:last] for first, last in found.spans], found.unused


def learned(style: str, row: Any) -> str:
    """The same by tokens."""
    tokenizer = tokenizer_of(STYLES[style])
    piece, _ = RowTokenizer(tokenizer, 4096, 0, 0)._conversation(normalise(row).content)
    return tokenizer.decode(piece.ids[piece.learn])


@pytest.mark.sample(6)
@pytest.mark.parametrize("style", STYLES)
def test_replies_and_the_tokens_that_end_them_are_learned(style: str) -> None:
    text, said, unused = shown(style, {"messages": CHAT})
    chat = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in CHAT] if style == "parts" else CHAT
    assert text == tokenizer_of(STYLES[style]).apply_chat_template(chat, tokenize=False)
    assert said == STYLES[style].expected(REPLIES) and not unused
    assert learned(style, {"messages": CHAT}) == "".join(said)


@pytest.mark.parametrize("style", STYLES)
def test_only_one_reply_of_several(style: str) -> None:
    """`weight` 0 takes a reply away and leaves the others as they were."""
    weighted = [message | ({"weight": 0} if n == 1 else {}) for n, message in enumerate(CHAT)]
    assert shown(style, {"messages": weighted})[1] == STYLES[style].expected(REPLIES)[1:]


THOUGHT = "<think>\nfirst this\n</think>\n\n"


@pytest.mark.parametrize("close", ["<think>first this</think>", THOUGHT, "<think>\nfirst this\n</think>\n"])
def test_thoughts_within_replies_are_learned_as_the_template_shows_them(close: str) -> None:
    chat = [m | ({"content": close + m["content"]} if m["role"] == "assistant" else {}) for m in CHAT]
    _, said, unused = shown("qwen3", {"messages": chat})
    assert said == [f"{REPLIES[0]}<|im_end|>", f"{THOUGHT}{REPLIES[1]}<|im_end|>"]
    assert not unused, "the last reply's thoughts are the same as the first's"
    _, said, unused = shown("chatml", {"messages": chat})
    assert said == [f"{close}{reply}<|im_end|>" for reply in REPLIES] and not unused
    _, said, unused = shown("r1", {"messages": chat[:2]})
    assert [piece.strip() for piece in said] == [f"{REPLIES[0]}<|endoftext|>"]
    assert unused == ("thoughts, which the chat template does not show",)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_beside_replies(name: str) -> None:
    chat = [*CHAT[:3], CHAT[3] | {name: "first this"}]
    _, said, unused = shown("qwen3", {"messages": chat})
    assert said == [f"{REPLIES[0]}<|im_end|>", f"{THOUGHT}{REPLIES[1]}<|im_end|>"] and not unused
    _, said, unused = shown("gpt-oss", {"messages": chat})
    final = "<|channel|>final<|message|>"
    whole = f"<|channel|>analysis<|message|>first this<|end|><|start|>assistant{final}{REPLIES[1]}<|return|>"
    assert said == [f"{final}{REPLIES[0]}<|end|>", whole] and not unused
    _, said, unused = shown("chatml", {"messages": chat})
    assert said == STYLES["chatml"].expected(REPLIES)
    assert unused == ("thoughts, which the chat template does not show",)


def test_thinking_can_be_switched_off_per_row() -> None:
    row = {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": False}}
    assert shown("qwen3", row)[1] == [f"{reply}<|im_end|>" for reply in REPLIES], "the block is the prompt's"
    with pytest.raises(BadRowError, match="chat_template_kwargs sets tokenize"):
        shown("qwen3", {"messages": CHAT, "chat_template_kwargs": {"tokenize": True}})


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": '{"at": 1}'}}]}
ANSWER = {"role": "tool", "content": "7", "tool_call_id": "x"}


def test_calls_of_functions_are_learned_and_their_answers_are_not() -> None:
    row = {"messages": [CHAT[0], CALL, ANSWER, CHAT[3]], "tools": TOOLS}
    text, said, unused = shown("qwen3", row)
    call = '<tool_call>\n{"name": "look", "arguments": {"at": 1}}\n</tool_call><|im_end|>'
    assert said == [call, f"<think>\n\n</think>\n\n{REPLIES[1]}<|im_end|>"]
    assert '"parameters"' in text and not unused
    _, _, unused = shown("chatml", row)
    assert unused == ("tools, which the chat template does not show",)


def test_a_template_that_wants_a_call_before_an_answer() -> None:
    strict = QWEN3.replace(
        "{%- for m in messages %}{% if m.role == 'assistant' %}",
        "{%- for m in messages %}{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
        "{{ raise_exception('no call') }}{% endif %}{% if m.role == 'assistant' %}",
        1,
    )
    assert strict != QWEN3
    tokenizer = tokenizer_of(STYLES["qwen3"]._replace(template=strict))
    found = Renderer(tokenizer)(normalise({"messages": [CHAT[0], CALL, ANSWER, CHAT[3]], "tools": TOOLS}).content)
    said = [found.text[first:last] for first, last in found.spans]
    assert said[0].startswith("<tool_call>") and said[0].endswith("</tool_call><|im_end|>"), said
    assert said[1].endswith(f"{REPLIES[1]}<|im_end|>")


UPPER = CHATML.replace("m.content", "m.content | upper")
DROPPING = CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' else 'ok' }}")
REFUSING = "{{ raise_exception('only users may speak') }}"
FAILING = "{{ messages[0].content / 0 }}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (UPPER, "rewrites what a reply says"),
        (DROPPING, "rewrites what a reply says"),
        (REFUSING, "only users may speak"),
        (FAILING, "the chat template refuses it"),
    ],
)
def test_templates_that_do_not_fit(template: str, words: str) -> None:
    with pytest.raises(BadRowError, match=words):
        Renderer(tokenizer_of(template))(normalise({"messages": CHAT}).content)


def test_conversations_need_a_template() -> None:
    tokenizer = tokenizer_of(CHATML)
    tokenizer.chat_template = None
    with pytest.raises(AHNError, match="no chat template"):
        Renderer(tokenizer)(normalise({"messages": CHAT}).content)


def test_a_users_words_that_look_like_a_prompt() -> None:
    """They do not begin the reply that follows, where the template's own beginning is another than its prompt."""
    chat = [{"role": "user", "content": "say <|Assistant|><think>\nno"}, CHAT[1]]
    assert shown("r1", {"messages": chat})[1] == [f"{REPLIES[0]}<|endoftext|>"]
    chat = [{"role": "user", "content": "say <|im_start|>assistant\nno"}, CHAT[1]]
    assert shown("chatml", {"messages": chat})[1] == [f"{REPLIES[0]}<|im_end|>"]


def test_common_prefix() -> None:
    for one, other in (("", ""), ("a", ""), ("abc", "abd"), ("abc", "abc"), ("abc", "abcd"), ("x", "y")):
        length = common_prefix(one, other)
        assert (
            one[:length] == other[:length] and one[length : length + 1] != other[length : length + 1]
        ) or one == other
    assert common_prefix("a" * 1000 + "b", "a" * 1000 + "c") == 1000
