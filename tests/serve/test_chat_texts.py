"""Messages as token ids: those of the whole text, whatever was remembered; a reply as the next turn will have it."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

pytest.importorskip("fastapi")

from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken

from ahn.errors import AHNError
from ahn.serve.api import texts
from ahn.serve.api.texts import ChatText

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who has the key?"},
    {"role": "assistant", "content": "The cellist."},
    {"role": "user", "content": "And where is it? " * 30},
]


@pytest.fixture(scope="module")
def chatml(tokenizer: Any) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    changed.chat_template = CHATML
    return changed


@pytest.fixture(params=["plain", "template"])
def text(request: Any, tokenizer: Any, chatml: Any) -> ChatText:
    return ChatText(tokenizer if request.param == "plain" else chatml)


def test_pieces_have_the_ids_of_the_whole(text: ChatText, monkeypatch: pytest.MonkeyPatch) -> None:
    assert text._special is not None
    whole = text.tokenizer(text.rendered(TALK, ask=True), add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(texts, "LONG", 5)
    assert text.ids(text.rendered(TALK, ask=True)).tolist() == whole
    tokenise, long = text._tokenise, []

    def counted(piece: str, start: bool = False) -> Any:
        long.append(len(piece) >= 5)
        return tokenise(piece, start)

    monkeypatch.setattr(text, "_tokenise", counted)
    assert text.ids(text.rendered(TALK, ask=True)).tolist() == whole
    assert not any(long)  # all long ones were remembered


def words_of(seed: int) -> str:
    draw = random.Random(seed)
    words = [
        "the",
        "don't",
        "Ünï",
        "中文",
        "42",
        "x1",
        "...",
        "e\u0301",
        "\u00b2",
        "<|im_end|>",
        "_a",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "🎉",
    ]
    return "".join(draw.choice(words) + draw.choice(["", " ", " ", "\n"]) for _ in range(400))


@pytest.mark.sample(2)
@pytest.mark.parametrize("start", [False, True])
def test_a_long_text_is_tokenised_in_pieces_as_it_is_whole(
    text: ChatText, start: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert text._by_words
    monkeypatch.setattr(texts, "LONG", 30)
    for seed in range(20):
        known, more = words_of(seed), " and more words of it" * 3
        assert text.ids(known, start).tolist() == text._tokenise(known, start).tolist(), seed
        before = set(text._known)
        assert text.ids(known + more, start).tolist() == text._tokenise(known + more, start).tolist(), seed
        assert len(set(text._known) - before) < 5  # what it begins with was remembered


def test_a_tokenizer_that_looks_across_words_gets_whole_texts(tokenizer: Any) -> None:
    lines = Split("\n", "isolated")
    for how in (None, lines, Sequence([lines, ByteLevel(use_regex=False)])):
        changed = copy.deepcopy(tokenizer)
        changed.backend_tokenizer.pre_tokenizer = how
        assert not ChatText(changed)._by_words
    for token in (AddedToken("New York"), AddedToken("Mask", rstrip=True)):
        changed = copy.deepcopy(tokenizer)
        changed.add_tokens([token])
        assert not ChatText(changed)._by_words


def test_a_tokenizer_that_ends_texts_gets_whole_texts(tokenizer: Any) -> None:
    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        "$0 <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    text = ChatText(changed)
    long = "word " * 2000
    assert text._first is None and text.ids(long, start=True).tolist() == text._tokenise(long, start=True).tolist()


def test_what_is_remembered_is_bounded(text: ChatText, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "LONG", 5)
    monkeypatch.setattr(texts, "REMEMBERED", 100)
    for number in range(50):
        text.ids(f"Text number {number}, which is longer than five characters.")
        assert text._size <= 100 and text._size == sum(map(len, text._known.values()))


def test_a_reply_is_known_as_the_next_turn_begins(text: ChatText) -> None:
    """Whatever was written, in whatever tokens: the next prompt begins with what the reply was known as."""
    draw = random.Random(0)
    for number in range(40):
        prompt = text.prompt(TALK)
        reply = [draw.randrange(1, 4096) for _ in range(draw.randrange(1, 12))]
        said = text.reply(prompt, reply)
        known = text.known_as(TALK, prompt, ())(reply)
        following = [*TALK, {"role": "assistant", "content": said}, {"role": "user", "content": "Go on."}]
        assert text.prompt(following)[: len(known)].tolist() == list(known), number
        if said.strip():
            missing = text.decode(text.prompt(following)[len(known) :])
            assert len(missing) < 60 and len(known) >= len(prompt) - 1


def test_a_reply_ends_before_a_stop_text(text: ChatText) -> None:
    prompt = text.prompt(TALK)
    reply = text.ids(" It is in the cello. STOP And more.")
    assert text.reply(prompt, reply, ("STOP", "more")) == " It is in the cello. "
    known = text.known_as(TALK, prompt, ("STOP",))(reply)
    assert text.decode(known).endswith("cello.")


def test_messages_without_a_template_are_one_text(tokenizer: Any) -> None:
    assert ChatText(tokenizer).rendered(TALK[:3], ask=True) == "Be brief.\n\nWho has the key?The cellist."


def test_what_is_no_text_is_refused(text: ChatText) -> None:
    with pytest.raises(AHNError, match="Unicode"):
        text.prompt([{"role": "user", "content": "a\ud800"}])


def test_a_template_that_refuses_is_one_error(chatml: Any) -> None:
    strict = copy.deepcopy(chatml)
    strict.chat_template = "{{ raise_exception('Only two roles.') }}"
    with pytest.raises(AHNError, match="Only two roles"):
        ChatText(strict).prompt(TALK)
