"""A chat model reads a book beyond its trained length, and answers for facts put into pages of it."""

import dataclasses
import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ahn.demo.figure import kind
from ahn.demo.reading import read
from ahn.measure.method import Method
from ahn.measure.parts import render
from ahn.measure.plots import DASHED, MUTED, WIDTH, colours, finish, new_figure, plain_numbers
from ahn.measure.reading import chunk_size, in_chunks, new_cache
from ahn.tiny.facts import KEYS

FACT = "The special magic number for the {key} is: {value}."
QUESTION = "{text}\n\nWhat is the special magic number for the {key} mentioned in the text?"
REPLY = "The special magic number for the {key} mentioned in the text is"
DIGITS = 6
DEPTH = 0.25
"""Where a fact stands in its pages: far before the window at their end."""
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclasses.dataclass(frozen=True)
class BookQuestion:
    """Token ids of a chat up to the reply's first words, and the tokens that have to follow."""

    ids: list[int]
    answer: list[int]


@dataclasses.dataclass(frozen=True)
class BookResult:
    """One way to read.

    Attributes:
        perplexity: of every `bin` tokens of the book, from its beginning.
        cache_bytes: after as many tokens.
        found, asked: questions answered with every digit right.
    """

    name: str
    perplexity: list[float]
    cache_bytes: list[int]
    found: int
    asked: int
    seconds: float


def make_questions(tokenizer: PreTrainedTokenizerBase, text: str, count: int, length: int) -> list[BookQuestion]:
    """Chats about different pages of a text, each with one fact in it.

    Args:
        text: at least `count` times `length` tokens long.
    """
    rng = random.Random(0)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    questions = []
    for n in range(count):
        pages = text[offsets[n * length][0] : offsets[(n + 1) * length - 1][1]]
        sentences = SENTENCE_END.split(pages)
        key, value = " ".join(rng.sample(KEYS, 2)), str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS))
        sentences.insert(round(DEPTH * len(sentences)), FACT.format(key=key, value=value))
        message = {"role": "user", "content": QUESTION.format(text=" ".join(sentences), key=key)}
        shown = render(tokenizer, [message], ask=True) + REPLY.format(key=key)
        whole = tokenizer(f"{shown} {value}", add_special_tokens=False, verbose=False)["input_ids"]
        ids = tokenizer(shown, add_special_tokens=False, verbose=False)["input_ids"]
        questions.append(BookQuestion(whole[: len(ids)], whole[len(ids) :]))
    return questions


@torch.inference_mode()
def answers(model: PreTrainedModel, question: BookQuestion, advance: Callable[[int], Any]) -> bool:
    """Whether every token of the answer is the most probable one, given those before it."""
    cache, ids = new_cache(model), [*question.ids, *question.answer]
    start, wanted, done = len(question.ids) - 1, len(question.answer), 0
    for last, _ in in_chunks(model, cache, ids, 0, start, chunk_size(model)):
        advance(last - done)
        done = last
    ((_, logits),) = in_chunks(model, cache, ids, start, start + wanted, size=wanted, logits=wanted)
    advance(wanted)
    return logits.argmax(-1).tolist() == question.answer


def read_book(
    model: PreTrainedModel,
    methods: Sequence[Method],
    ids: Sequence[int],
    questions: Sequence[BookQuestion],
    bin_size: int,
    advance: Callable[[str, int], Any] = lambda name, tokens: None,
) -> list[BookResult]:
    """Read the book and the questions in every way.

    Args:
        ids: the book, a multiple of `bin_size` tokens.
    """
    results = []
    for method in methods:

        def step(tokens: int, name: str = method.name) -> None:
            advance(name, tokens)

        with method.on(model):
            reading = read(model, ids, advance=step)
            found = sum(answers(model, question, step) for question in questions)
        sizes = dict(reading.cache_bytes)
        perplexity = [math.exp(float(part.double().mean())) for part in reading.losses.split(bin_size)]
        ends = range(bin_size, len(ids) + 1, bin_size)
        cache = [sizes[end] for end in ends]
        results.append(BookResult(method.name, perplexity, cache, found, len(questions), reading.seconds))
    return results


def book_figure(results: Sequence[BookResult], bin_size: int, trained: int, title: str) -> Figure:
    """Perplexity and cache by position, with a line where the trained length ends."""
    figure, (text, cache) = new_figure(2, f"{title}: 1 text, every {bin_size:,} tokens")
    own = colours({result.name: kind(result.name) for result in results})
    for result in results:
        style = {"color": own[result.name], "linewidth": WIDTH, "label": result.name}
        ends = [(n + 1) * bin_size for n in range(len(result.perplexity))]
        text.plot([end - bin_size / 2 for end in ends], result.perplexity, **style)
        cache.plot(ends, [size / 2**20 for size in result.cache_bytes], **style)
    text.set_yscale("log")
    plain_numbers(text)
    text.set_title("Perplexity (lower is better)", fontsize=10, loc="left")
    cache.set_title("Cache (MiB)", fontsize=10, loc="left")
    cache.set_ylim(bottom=0)
    for axis in (text, cache):
        axis.set_xlim(0, ends[-1])
        label = f"{trained:,} tokens: the trained length"
        axis.axvline(trained, color=MUTED, linestyle=DASHED, linewidth=1, label=label)
        axis.set_xlabel("position in the book (tokens)")
    finish(figure, [text, cache])
    return figure
