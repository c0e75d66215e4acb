"""RULER's counting of words: the common ones of a list, and the frequent ones of a coded text."""

import itertools
import math
import random
import string
from collections.abc import Callable

from ahn.evaluation.tasks.generated import WORDS, Problem
from ahn.tiny.facts import KEYS, VALUES

LISTED = (*KEYS, *VALUES, *random.Random(0).sample(WORDS, len(WORDS)))
"""What lists are made of: nouns as far as they go, then pairs of them."""
NOUNS = len(KEYS) + len(VALUES)
COMMON = 10
MOST_UNCOMMON = len(LISTED) - COMMON
SHORT = 4096
"""Below this length words are repeated less often."""
CWE_MESSAGE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"

FWE_MESSAGE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?"
)
FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
NOISE_WORD = "..."
CODED_LETTERS = 6
TOKENS_A_WORD = 50
"""A coded vocabulary has a word for every so many tokens of the prompt."""
ZETA_2 = math.pi**2 / 6
"""Normalises the Zipf distribution with exponent 2."""


def common_words(length: int) -> Callable[[random.Random, int], Problem]:
    """Makes problems of common words for prompts of `length` tokens; the size is the number of uncommon ones."""
    often, seldom, example = (30, 3, (30, 10, 3)) if length >= SHORT else (6, 1, (10, 3, 1))

    def make(rng: random.Random, size: int) -> Problem:
        shown, shown_words = _list(rng, *example)
        listed, words = _list(rng, size, often, seldom)
        solved = f"{CWE_MESSAGE.format(context=shown)}{CWE_PREFIX} {_numbered(shown_words)}\n"
        return Problem(solved + CWE_MESSAGE.format(context=listed), CWE_PREFIX, tuple(words))

    return make


def _list(rng: random.Random, uncommon: int, often: int, seldom: int) -> tuple[str, list[str]]:
    """A shuffled, numbered list of words, and those that are common in it."""
    count = COMMON + uncommon
    words = rng.sample(LISTED[: max(NOUNS, count)], count)
    listed = words[:COMMON] * often + words[COMMON:] * seldom
    rng.shuffle(listed)
    return _numbered(listed), words[:COMMON]


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def frequent_words(length: int) -> Callable[[random.Random, int], Problem]:
    """Makes coded texts for prompts of `length` tokens; the size is about their number of words."""
    vocabulary = max(4, length // TOKENS_A_WORD)

    def make(rng: random.Random, size: int) -> Problem:
        coded: dict[str, None] = {}
        while len(coded) < vocabulary:
            coded["".join(rng.choices(string.ascii_lowercase, k=CODED_LETTERS))] = None
        ranked = [NOISE_WORD, *list(coded)[1:]]
        counts = (int(size / (ZETA_2 * rank**2)) for rank in range(1, vocabulary + 1))
        text = list(itertools.chain.from_iterable([word] * n for word, n in zip(ranked, counts, strict=True)))
        rng.shuffle(text)
        return Problem(FWE_MESSAGE.format(context=" ".join(text)), FWE_PREFIX, tuple(ranked[1:4]))

    return make
