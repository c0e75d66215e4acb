"""Vocabulary and phrasings, in two disjoint halves: a memory must not know the evaluation's words by heart."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ahn.tiny.facts import KEYS, VALUES

Split = Literal["train", "evaluation"]
HELD_OUT = 4
"""Every fourth key and value belongs to the evaluation."""


@dataclasses.dataclass(frozen=True)
class Phrasing:
    """One way to state and to ask. Fields of the strings: {thing}, {key}, {value}, and {old} in `change`."""

    state: str
    change: str
    ask: str
    reply: str


@dataclasses.dataclass(frozen=True)
class Words:
    """Everything that one split draws from.

    Attributes:
        keys: nouns; two of them name what is asked for.
        values: words that are answers.
        numbers, names: things that have a number, or a word.
        phrasings: of facts.
        digits: fewest and most of a number.
        before: said before the text.
        counted: an event, as (sentence in the text, question, reply); fields {key} and, in the reply, {value}.
        listed: heading and entry of a list, and question and reply about one entry.
        quoted: question and reply for the end of a sentence; fields {start} and {value}.
    """

    keys: tuple[str, ...]
    values: tuple[str, ...]
    numbers: tuple[str, ...]
    names: tuple[str, ...]
    phrasings: tuple[Phrasing, ...]
    digits: tuple[int, int]
    before: tuple[str, ...]
    counted: tuple[tuple[str, str, str], ...]
    listed: tuple[tuple[str, str, str, str], ...]
    quoted: tuple[tuple[str, str], ...]


TRAIN = Words(
    keys=tuple(word for n, word in enumerate(KEYS) if n % HELD_OUT),
    values=tuple(word for n, word in enumerate(VALUES) if n % HELD_OUT),
    numbers=("access code", "locker number", "account number", "phone extension", "serial number", "room number"),
    names=("code word", "nickname", "emblem", "password", "favourite thing", "call sign"),
    phrasings=(
        Phrasing(
            "The {thing} of the {key} is {value}.",
            "The {thing} of the {key} is no longer {old}: it is {value} now.",
            "What is the {thing} of the {key}?",
            "The {thing} of the {key} is {value}.",
        ),
        Phrasing(
            "Please remember that the {key} has the {thing} {value}.",
            "Please note that the {key} has got a new {thing}, {value}.",
            "Which {thing} does the {key} have?",
            "The {key} has the {thing} {value}.",
        ),
        Phrasing(
            "For the {key}, they chose {value} as its {thing}.",
            "For the {key}, they later replaced {old} by {value} as its {thing}.",
            "What did they choose as the {thing} for the {key}?",
            "They chose {value}.",
        ),
        Phrasing(
            "Note: {key}, {thing}: {value}.",
            "Note: {key}, {thing}, changed: {value}.",
            "What do the notes give as the {thing} of the {key}?",
            "{value}",
        ),
        Phrasing(
            "Somebody had written “{value}” beside the {key}, which was its {thing}.",
            "Somebody had crossed out “{old}” beside the {key} and written “{value}”, which was its new {thing}.",
            "Tell me the {thing} that was written beside the {key}.",
            "It was {value}.",
        ),
        Phrasing(
            "When asked about the {key}, he said that its {thing} was {value}.",
            "When asked about the {key} again, he said that its {thing} had become {value}.",
            "According to him, what was the {thing} of the {key}?",
            "Its {thing} was {value}.",
        ),
    ),
    digits=(3, 8),
    before=(
        "Here is a text. I will ask you about it afterwards.",
        "Read this carefully; questions follow.",
        "Please read the following pages and then answer my questions.",
        "Text:",
    ),
    counted=(
        (
            "The bell of the {key} rang.",
            "How many times did the bell of the {key} ring in the text?",
            "It rang {value} times.",
        ),
        ("A letter for the {key} arrived.", "How many letters for the {key} arrived?", "{value} letters arrived."),
    ),
    listed=(
        (
            "Inventory of the house:",
            "- {key}: {value}",
            "In the inventory, how many are there of the {key}?",
            "{value}",
        ),
        (
            "Keys and their hooks:",
            "{key} = hook {value}",
            "On which hook hangs the key of the {key}?",
            "On hook {value}.",
        ),
    ),
    quoted=(
        ("How does the sentence that begins with “{start}” go on?", "{value}"),
        ("Complete this sentence of the text word for word: “{start} …”", "{value}"),
    ),
)

EVALUATION = Words(
    keys=tuple(KEYS[::HELD_OUT]),
    values=tuple(VALUES[::HELD_OUT]),
    numbers=("special magic number", "ticket number"),
    names=("special magic word", "secret sign"),
    phrasings=(
        Phrasing(
            "The {thing} for the {key} is: {value}.",
            "Correction: the {thing} for the {key} is now: {value}.",
            "What is the {thing} for the {key} mentioned in the text?",
            "The {thing} for the {key} mentioned in the text is {value}.",
        ),
        Phrasing(
            "It was agreed that {value} should be the {thing} given to the {key}.",
            "It was agreed that from then on {value} should be the {thing} given to the {key}.",
            "Which {thing} was given to the {key}?",
            "The {key} was given {value}.",
        ),
    ),
    digits=(6, 6),
    before=("Some facts are hidden in this text. Keep them in mind, you will be asked about them.",),
    counted=(
        (
            "A lamp was lit at the {key}.",
            "How often does the text say that a lamp was lit at the {key}?",
            "It says so {value} times.",
        ),
    ),
    listed=(("Prices today:", "{key} .... {value}", "What is today's price of the {key}?", "Its price is {value}."),),
    quoted=(("What are the words that follow “{start}” in the text, up to the end of the sentence?", "{value}"),),
)

WORDS: dict[Split, Words] = {"train": TRAIN, "evaluation": EVALUATION}
