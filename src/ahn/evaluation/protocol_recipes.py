"""The benchmarks with a protocol: which files at which commit, what is taken from them, what must be there."""

import ast
import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ahn.errors import AHNError
from ahn.evaluation.metrics.lveval import METRIC_OF_FUNCTION
from ahn.evaluation.protocol_sources import Source, assigned, entries

Protocol = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How one benchmark's protocol comes about.

    Attributes:
        build: their texts, in that order -> the protocol's fields besides `sources`.
        check: (protocol of a user's own, what to call it) -> nothing, or an AHNError that says what is wrong with it.
        digest: `ahn.evaluation.protocol.protocol_digest` of the outcome.
    """

    sources: tuple[Source, ...]
    build: Callable[[Sequence[str]], Protocol]
    check: Callable[[Protocol, str], None]
    digest: str


def build_lveval(texts: Sequence[str]) -> Protocol:
    """From config.py and metrics.py; the functions in `DATASET_METRIC` become their names."""
    config, metrics = map(assigned, texts)
    functions = entries(config["DATASET_METRIC"])
    return {
        "DATASET_MAXGEN": ast.literal_eval(config["DATASET_MAXGEN"]),
        "DATASET_PROMPT": ast.literal_eval(config["DATASET_PROMPT"]),
        "DATASET_METRIC": {task: ast.unparse(function) for task, function in functions.items()},
        "ABANDON_WORDS_EN": ast.literal_eval(metrics["ABANDON_WORDS_EN"]),
        "ABANDON_WORDS_ZH": ast.literal_eval(metrics["ABANDON_WORDS_ZH"]),
    }


def check_lveval(protocol: Protocol, where: str) -> None:
    """Every task needs a length, a prompt and a metric of ours; stop words are lists of strings."""
    _check_tables(protocol, where, DATASET_PROMPT=PROMPT, DATASET_MAXGEN=LENGTH, DATASET_METRIC=METRIC)
    for field in ("ABANDON_WORDS_EN", "ABANDON_WORDS_ZH"):
        words = _field(protocol, field, where)
        if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
            raise AHNError(f"{where}: {field} must be a list of strings.")


def build_longbench(texts: Sequence[str]) -> Protocol:
    """From dataset2maxlen.json and dataset2prompt.json, as they are."""
    return dict(zip(("dataset2maxlen.json", "dataset2prompt.json"), map(json.loads, texts), strict=True))


def check_longbench(protocol: Protocol, where: str) -> None:
    """Every task needs a length and a prompt."""
    _check_tables(protocol, where, **{"dataset2prompt.json": PROMPT, "dataset2maxlen.json": LENGTH})


BOOK_TASKS = ("longbook_qa_eng", "longbook_qa_chn")
BOOK_TOKENS = 40  # `DATA_NAME_TO_MAX_NEW_TOKENS` in src/eval_utils.py
BOOK_STYLES = ("gpt4", "yarn_mistral", "claude2")  # the models that the benchmark has prompts for


def build_infinitebench(texts: Sequence[str]) -> Protocol:
    """From src/prompt.py: the prompts of the questions on books, for each model style."""
    (prompts,) = map(assigned, texts)
    styles = {style: entries(prompts[f"{style}_templates"]) for style in BOOK_STYLES}
    return {
        "prompts": {
            style: {task: ast.literal_eval(found[task]) for task in BOOK_TASKS} for style, found in styles.items()
        },
        "max_new_tokens": dict.fromkeys(BOOK_TASKS, BOOK_TOKENS),
    }


def check_infinitebench(protocol: Protocol, where: str) -> None:
    """Every style needs a prompt for every task with a length."""
    _check_tables(protocol, where, prompts=STYLE)
    for style, prompts in protocol["prompts"].items():
        name = f"prompts[{style!r}]"
        _check_tables(protocol | {name: prompts}, where, max_new_tokens=LENGTH, **{name: PROMPT})


class Kind(NamedTuple):
    """What the values of a table must be, and how a message says so."""

    fits: Callable[[Any], bool]
    words: str


def _is_prompt(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        return "context" in [field for _, field, _, _ in string.Formatter().parse(value)]
    except ValueError:  # unbalanced braces
        return False


LENGTH = Kind(lambda value: type(value) is int and value > 0, "a number of tokens, 1 or more")
PROMPT = Kind(_is_prompt, "a text with {context} in it and balanced braces")
METRIC = Kind(METRIC_OF_FUNCTION.__contains__, f"one of {', '.join(METRIC_OF_FUNCTION)}")
STYLE = Kind(lambda value: isinstance(value, dict), "an object of prompts by task")


def _field(protocol: Mapping[str, Any], field: str, where: str) -> Any:
    if field not in protocol:
        raise AHNError(f"{where}: the field {field!r} is missing.")
    return protocol[field]


def _check_tables(protocol: Mapping[str, Any], where: str, **kinds: Kind) -> None:
    """Fields that are objects of one kind of value by task, all of the same tasks."""
    for name, kind in kinds.items():
        table = _field(protocol, name, where)
        if not isinstance(table, dict) or not table:
            raise AHNError(f"{where}: {name} must be an object with one entry or more.")
        for key, value in table.items():
            if not kind.fits(value):
                raise AHNError(f"{where}: {name}[{key!r}] must be {kind.words}.")
    first, *others = kinds
    for other in others:
        if different := sorted(protocol[first].keys() ^ protocol[other].keys()):
            raise AHNError(
                f"{where}: {first} and {other} must be of the same tasks, but differ in {', '.join(different)}."
            )


LVEVAL = ("infinigence/LVEval", "63e7ae939bd347c76b2cdb1cebfb216faca26897")
LONGBENCH = ("THUDM/LongBench", "2e00731f8d0bff23dc4325161044d0ed8af94c1e")
INFINITEBENCH = ("OpenBMB/InfiniteBench", "88b3daa6989da2fbe0077170d7a3c84c25d5ae58")

RECIPES: dict[str, Recipe] = {
    "lveval": Recipe(
        sources=(
            Source(*LVEVAL, "config.py", "7c278132c6cd744e3a57dc87947a20d23d66f6928b9b7f37b0d1bf42e43df8e6"),
            Source(*LVEVAL, "metrics.py", "74156ade81b9884673fe4dde4f6f3472c5bd9e569add6cd16b1aa4e30e2fc5df"),
        ),
        build=build_lveval,
        check=check_lveval,
        digest="9f5b7b5d9064bd82fc7fa28e15061560479ee662141d7f199fa1e61d8eaee1a5",
    ),
    "longbench": Recipe(
        sources=(
            Source(
                *LONGBENCH,
                "LongBench/config/dataset2maxlen.json",
                "72966b3c0933e214591637fb085798c5e687ebff4ddaab5d99bbc31120532022",
            ),
            Source(
                *LONGBENCH,
                "LongBench/config/dataset2prompt.json",
                "56d22ad4f382169c2b8a11ff4c982a4a1bea096c8152b0f0b85b64686b157c30",
            ),
        ),
        build=build_longbench,
        check=check_longbench,
        digest="fa248e9df8ba7b6294b37253e4acdfdd8ed2256b51a923bb521b253a6ff59a80",
    ),
    "infinitebench": Recipe(
        sources=(
            Source(*INFINITEBENCH, "src/prompt.py", "d49a6891d6bc61522bb428d66a07b092a6bb6bc195aa0fe103eddd6bb39c7f10"),
        ),
        build=build_infinitebench,
        check=check_infinitebench,
        digest="a79d362ff7007bbeabd9194d48a9ad41d1cd3f2347887d1cf0cb5f6193e95342",
    ),
}
