"""Chats over long texts: what they say of themselves is true, and the evaluation's are not the training's."""

from __future__ import annotations

import itertools
import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import speaking
from transformers import PreTrainedTokenizerBase

from ahn.errors import AHNError
from ahn.measure.texts import Text
from ahn.training.messages import BYTES, FORM, WHERE
from ahn.training.tokenise import KEPT, RowTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))

from chats.items import KINDS
from chats.words import EVALUATION, TRAIN, Split
from chats.writer import ChatWriter, Plan, texts_of

KIND_NAMES = (*KINDS, "quote")
PLAIN = "The ship number {n} came into the harbour on a day in May with {m} barrels of oil and nobody on board saw it. "
TEXTS = [
    Text(f"part-{n}", "".join(PLAIN.format(n=n * 1000 + m, m=m) + "\n" * (m % 7 == 0) for m in range(300)))
    for n in range(12)
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return speaking.tokenizer(speaking.CHATML)


@pytest.fixture(scope="module")
def writers(tokenizer: PreTrainedTokenizerBase) -> dict[Split, ChatWriter]:
    return {"train": ChatWriter(tokenizer, TEXTS, "train"), "evaluation": ChatWriter(tokenizer, TEXTS, "evaluation")}


def chats(writer: ChatWriter, plan: Plan, number: int = 6) -> list[dict[str, Any]]:
    return [writer.write(plan, seed) for seed in range(number)]


def text_of(chat: dict[str, Any]) -> str:
    return str(chat["messages"][0]["content"])


@pytest.mark.parametrize("split", ["train", "evaluation"])
@pytest.mark.parametrize("kind", KIND_NAMES)
def test_questions_and_replies_belong_together(writers: dict[Split, ChatWriter], split: Split, kind: str) -> None:
    for chat in chats(writers[split], Plan(1500, (kind,), most=3)):
        asked = chat["asked"]
        assert len(chat["messages"]) == 2 * len(asked) > 0
        for n, item in enumerate(asked):
            question, reply = chat["messages"][2 * n], chat["messages"][2 * n + 1]
            assert question["role"] == "user" and question["content"].endswith(item["question"])
            assert reply["role"] == "assistant" and item["answer"] in reply["content"]
            assert item["kind"] == kind


@pytest.mark.parametrize("split", ["train", "evaluation"])
def test_the_answer_can_be_read_in_the_text(writers: dict[Split, ChatWriter], split: Split) -> None:
    for kind in ("number", "word", "change", "lookup", "quote"):
        for chat in chats(writers[split], Plan(1500, (kind,), most=3)):
            assert all(item["answer"] in text_of(chat) for item in chat["asked"])


def test_of_a_changed_fact_the_last_value_is_asked(writers: dict[Split, ChatWriter]) -> None:
    for chat in chats(writers["evaluation"], Plan(1500, ("change",), most=1)):
        (item,) = chat["asked"]
        key = " ".join(item["question"].rstrip("?").removesuffix(" mentioned in the text").split()[-2:])
        told = text_of(chat).removesuffix(item["question"])
        stated = [part for part in re.split(r"(?<=[.])\s", told) if key in part]
        assert len(stated) in (2, 3)
        assert [item["answer"] in part for part in stated] == [False] * (len(stated) - 1) + [True]


def test_events_are_counted(writers: dict[Split, ChatWriter]) -> None:
    for chat in chats(writers["evaluation"], Plan(1500, ("count",), most=2)):
        for item in chat["asked"]:
            (key,) = re.findall(r"lit at the (\w+ \w+)\?", item["question"])
            assert text_of(chat).count(f"A lamp was lit at the {key}. ") == int(item["answer"])


def test_a_quotation_goes_on_as_asked(writers: dict[Split, ChatWriter]) -> None:
    for chat in chats(writers["train"], Plan(1500, ("quote",), most=1)):
        (item,) = chat["asked"]
        (start,) = re.findall(r"“(.*?)(?: …)?”", item["question"])
        assert f"{start} {item['answer']}" in text_of(chat)


def test_distances_are_those_asked_for_and_true(
    writers: dict[Split, ChatWriter], tokenizer: PreTrainedTokenizerBase
) -> None:
    longest = max(len(tokenizer(line)["input_ids"]) for line in TEXTS[0].text.splitlines())
    for near, far in ((64, 128), (500, 600)):
        for chat in chats(writers["evaluation"], Plan(1500, ("number",), most=1, near=near, far=far)):
            (item,) = chat["asked"]
            assert near <= item["distance"] <= far + longest, "the next end of a sentence or line farther away"
            after = text_of(chat).rpartition(item["answer"])[2].removesuffix(item["question"])
            # around the seams a few tokens differ
            assert abs(len(tokenizer(after)["input_ids"]) - item["distance"]) <= 30


def test_lengths_are_nearly_used(writers: dict[Split, ChatWriter], tokenizer: PreTrainedTokenizerBase) -> None:
    for chat in chats(writers["train"], Plan(2000)):
        shown = tokenizer.apply_chat_template(chat["messages"], tokenize=False)
        assert 0.85 * 2000 <= len(tokenizer(shown)["input_ids"]) <= 2000


def test_a_seed_says_it_all(writers: dict[Split, ChatWriter], tokenizer: PreTrainedTokenizerBase) -> None:
    again = ChatWriter(tokenizer, TEXTS, "train")
    plan = Plan(1500)
    assert [again.write(plan, seed) for seed in (3, 4)] == [writers["train"].write(plan, seed) for seed in (3, 4)]
    assert again.write(plan, 3) != again.write(plan, 4)


def test_splits_share_nothing() -> None:
    for field in fields(TRAIN):
        if field.name != "digits":
            assert not set(getattr(TRAIN, field.name)) & set(getattr(EVALUATION, field.name)), field.name
    mine, theirs = (texts_of(split, TEXTS) for split in ("train", "evaluation"))
    assert len(mine) + len(theirs) == len(TEXTS) and not {t.name for t in mine} & {t.name for t in theirs}


def test_names_are_given_once_in_a_chat(writers: dict[Split, ChatWriter]) -> None:
    for chat in chats(writers["evaluation"], Plan(2500, ("lookup",), most=8), number=8):
        names = re.findall(r"^(\w+ \w+) \.\.\.\. \d+", text_of(chat), re.MULTILINE)
        assert len(names) == len(set(names)) >= 5


def test_training_reads_them_and_learns_replies_only(
    writers: dict[Split, ChatWriter], tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [json.dumps(chat).encode() for chat in chats(writers["train"], Plan(1500), number=4)]
    read = RowTokenizer(tokenizer, 1500, 32, 64)({BYTES: rows, FORM: ["json"] * 4, WHERE: ["x"] * 4})
    assert read["fate"] == [KEPT] * 4
    for row, ids, learn in zip(rows, read["input_ids"], read["learn"], strict=True):
        learned = tokenizer.decode(list(itertools.compress(ids, learn)))
        assert learned.replace("<|im_end|>", "") == "".join(m["content"] for m in json.loads(row)["messages"][1::2])


def test_wrong_plans_are_refused(writers: dict[Split, ChatWriter], tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(AHNError, match="Unknown kinds riddle"):
        Plan(1000, ("riddle",))
    with pytest.raises(AHNError, match="near is less"):
        Plan(1000, near=1000)
    with pytest.raises(AHNError, match="make it longer"):
        writers["train"].write(Plan(200, most=8, near=100), 1)
    with pytest.raises(AHNError, match="fewer than a chat"):
        ChatWriter(tokenizer, TEXTS[:1], "train").write(Plan(10**7), 0)
    with pytest.raises(AHNError, match="give more"):
        ChatWriter(tokenizer, TEXTS[:0], "train")


def test_a_piece_without_a_sentence_to_quote_is_passed_over(tokenizer: PreTrainedTokenizerBase) -> None:
    prose = "The quick brown fox jumps over the lazy dog and runs far away into the deep dark forest at night. "
    lines = "".join(f"x{n} = {n}\n" for n in range(100))
    writer = ChatWriter(
        tokenizer, [Text(f"t{n}", lines + prose.replace("dog", f"dog {n}")) for n in range(40)], "train"
    )
    for seed in range(8):  # whose first draws do not all meet such a sentence
        assert writer.write(Plan(400, ("quote",), most=1, near=16), seed)["asked"]
    with pytest.raises(AHNError, match="no sentence that is long enough to quote"):
        ChatWriter(tokenizer, [Text(f"t{n}", lines) for n in range(40)], "train").write(
            Plan(400, ("quote",), most=1, near=16), 0
        )
