"""RULER's question answering: a question's own paragraphs among those of others, from two data sets on this machine."""

import dataclasses
import functools
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ahn.errors import AHNError
from ahn.evaluation.tasks.generated import Problem
from ahn.files import expanded

FILES = {"qa_1": "dev-v2.0.json", "qa_2": "hotpot_dev_distractor_v1.json"}
"""Task -> its file: SQuAD 2.0 and HotpotQA, as their authors publish them."""
INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
MESSAGE = (
    INSTRUCTION + "\n\nThe following are given documents.\n\n{context}\n\n" + INSTRUCTION + "\n\nQuestion: {query}"
)
PREFIX = " Answer:"


@dataclasses.dataclass(frozen=True)
class Question:
    """Indices of paragraphs: `needed` hold the answer, `related` are of the same article."""

    text: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Corpus:
    """All paragraphs and questions of a data set, and its file's digest."""

    sha256: str
    paragraphs: list[str]
    questions: list[Question]

    def make(self, index: int, rng: random.Random, size: int) -> Problem:
        """A question with `size` paragraphs besides those that it needs, related ones first."""
        question = self.questions[index % len(self.questions)]
        related = list(question.related)
        rng.shuffle(related)
        taken = set(question.needed + question.related)
        chosen = [*question.needed, *related[:size]]
        others = rng.sample(range(len(self.paragraphs)), min(size + len(taken), len(self.paragraphs)))
        chosen += [n for n in others if n not in taken][: max(0, size - len(related))]
        rng.shuffle(chosen)
        context = "\n\n".join(f"Document {n}:\n{self.paragraphs[place]}" for n, place in enumerate(chosen, 1))
        return Problem(MESSAGE.format(context=context, query=question.text), PREFIX, question.answers)


def load(task: str, directory: Path | None) -> Corpus:
    """The data set of a task."""
    if directory is None:
        raise AHNError(f"ruler/{task} is made from {FILES[task]}: download it and name its directory with --data-dir.")
    path = expanded(directory) / FILES[task]
    if not path.is_file():
        raise AHNError(f"{path} is missing: --data-dir must hold {FILES[task]} for ruler/{task}.")
    return _read(task, path)


@functools.cache
def _read(task: str, path: Path) -> Corpus:
    try:
        raw = path.read_bytes()
        corpus = Corpus(hashlib.sha256(raw).hexdigest(), *_READERS[task](json.loads(raw)))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AHNError(f"{path} is not the data set of ruler/{task}: {type(error).__name__}: {error}.") from error
    if not corpus.questions:
        raise AHNError(f"{path} holds no question that can be answered.")
    return corpus


def _squad(data: Any) -> tuple[list[str], list[Question]]:
    articles = [[paragraph["context"] for paragraph in article["paragraphs"]] for article in data["data"]]
    paragraphs = sorted({context for article in articles for context in article})
    place = {context: n for n, context in enumerate(paragraphs)}
    questions = []
    for article, contexts in zip(data["data"], articles, strict=True):
        for paragraph in article["paragraphs"]:
            own = place[paragraph["context"]]
            related = tuple(sorted({place[context] for context in contexts} - {own}))
            for qa in paragraph["qas"]:
                if qa["answers"] and not qa["is_impossible"]:
                    answers = tuple(str(answer["text"]) for answer in qa["answers"])
                    questions.append(Question(qa["question"], answers, (own,), related))
    return paragraphs, questions


def _hotpot(data: Any) -> tuple[list[str], list[Question]]:
    given = [[f"{title}\n{''.join(sentences)}" for title, sentences in item["context"]] for item in data]
    paragraphs = sorted({paragraph for some in given for paragraph in some})
    place = {paragraph: n for n, paragraph in enumerate(paragraphs)}
    questions = [
        Question(item["question"], (str(item["answer"]),), tuple(dict.fromkeys(place[p] for p in some)))
        for item, some in zip(data, given, strict=True)
    ]
    return paragraphs, questions


_READERS: dict[str, Callable[[Any], tuple[list[str], list[Question]]]] = {"qa_1": _squad, "qa_2": _hotpot}
