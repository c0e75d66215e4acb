"""The benchmarks with a protocol: which files at which commit, what is taken from them, what must be there."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ahn.errors import AHNError
from ahn.evaluation.metrics.lveval import METRIC_OF_FUNCTION
from ahn.evaluation.protocol_sources import Source, SourceText, function_names, literal, literal_entries
from ahn.files import json_object

Protocol = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How one benchmark's protocol comes about.

    Attributes:
        sources: the benchmark's files.
        build: their texts, in that order -> the protocol's fields besides `sources`.
        check: (protocol, what to call it) -> nothing, or an AHNError that says what is wrong with its fields.
        digest: `ahn.evaluation.protocol.protocol_digest` of the outcome.
    """

    sources: tuple[Source, ...]
    build: Callable[[Sequence[SourceText]], Protocol]
    check: Callable[[Protocol, str], None]
    digest: str


def build_lveval(texts: Sequence[SourceText]) -> Protocol:
    """From config.py and metrics.py; the functions in `DATASET_METRIC` become their names."""
    config, metrics = texts
    return {
        "DATASET_MAXGEN": literal(config, "DATASET_MAXGEN"),
        "DATASET_PROMPT": literal(config, "DATASET_PROMPT"),
        "DATASET_METRIC": function_names(config, "DATASET_METRIC"),
        "ABANDON_WORDS_EN": literal(metrics, "ABANDON_WORDS_EN"),
        "ABANDON_WORDS_ZH": literal(metrics, "ABANDON_WORDS_ZH"),
    }


def check_lveval(protocol: Protocol, where: str) -> None:
    """Every task needs a length, a prompt and a metric of ours; stop words are lists of strings."""
    tasks = _table(protocol, "DATASET_PROMPT", where, _is_prompt, PROMPT)
    lengths = _table(protocol, "DATASET_MAXGEN", where, _is_length, LENGTH)
    metrics = _table(protocol, "DATASET_METRIC", where, METRIC_OF_FUNCTION.__contains__, METRIC)
    _same_tasks(where, DATASET_PROMPT=tasks, DATASET_MAXGEN=lengths, DATASET_METRIC=metrics)
    for field in ("ABANDON_WORDS_EN", "ABANDON_WORDS_ZH"):
        words = _field(protocol, field, where)
        if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
            raise AHNError(f"{where}: {field} must be a list of strings.")


def build_longbench(texts: Sequence[SourceText]) -> Protocol:
    """From dataset2maxlen.json and dataset2prompt.json, as they are."""
    lengths, prompts = texts
    return {
        "dataset2maxlen.json": json_object(lengths.content, lengths.where),
        "dataset2prompt.json": json_object(prompts.content, prompts.where),
    }


def check_longbench(protocol: Protocol, where: str) -> None:
    """Every task needs a length and a prompt."""
    lengths = _table(protocol, "dataset2maxlen.json", where, _is_length, LENGTH)
    prompts = _table(protocol, "dataset2prompt.json", where, _is_prompt, PROMPT)
    _same_tasks(where, **{"dataset2prompt.json": prompts, "dataset2maxlen.json": lengths})


BOOK_TASKS = ("longbook_qa_eng", "longbook_qa_chn")
BOOK_TOKENS = 40  # `DATA_NAME_TO_MAX_NEW_TOKENS` in src/eval_utils.py
BOOK_STYLES = ("gpt4", "yarn_mistral", "claude2")  # the models that the benchmark has prompts for


def build_infinitebench(texts: Sequence[SourceText]) -> Protocol:
    """From src/prompt.py: the prompts of the questions on books, for each model style."""
    (prompts,) = texts
    return {
        "prompts": {style: literal_entries(prompts, f"{style}_templates", BOOK_TASKS) for style in BOOK_STYLES},
        "max_new_tokens": dict.fromkeys(BOOK_TASKS, BOOK_TOKENS),
    }


def check_infinitebench(protocol: Protocol, where: str) -> None:
    """Every style needs a prompt for every task with a length."""
    lengths = _table(protocol, "max_new_tokens", where, _is_length, LENGTH)
    styles = _table(protocol, "prompts", where, lambda value: isinstance(value, dict), "an object of prompts by task")
    for style in styles:
        prompts = _table(styles, style, f"{where}: prompts", _is_prompt, PROMPT)
        _same_tasks(where, **{"max_new_tokens": lengths, f"prompts[{style!r}]": prompts})


LENGTH = "a number of tokens, 1 or more"
PROMPT = "a text with {context} in it and balanced braces"
METRIC = f"one of {', '.join(METRIC_OF_FUNCTION)}"


def _is_length(value: object) -> bool:
    return type(value) is int and value > 0


def _is_prompt(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        return any(field == "context" for _, field, _, _ in string.Formatter().parse(value))
    except ValueError:  # unbalanced braces
        return False


def _field(protocol: Mapping[str, Any], field: str, where: str) -> Any:
    if field not in protocol:
        raise AHNError(f"{where}: the field {field!r} is missing.")
    return protocol[field]


def _table(
    protocol: Mapping[str, Any], field: str, where: str, valid: Callable[[Any], bool], what: str
) -> dict[str, Any]:
    """A field that is an object of one kind of value by task."""
    table = _field(protocol, field, where)
    if not isinstance(table, dict) or not table:
        raise AHNError(f"{where}: {field} must be an object with one entry or more.")
    for key, value in table.items():
        if not valid(value):
            raise AHNError(f"{where}: {field}[{key!r}] must be {what}.")
    return table


def _same_tasks(where: str, **tables: Mapping[str, Any]) -> None:
    (name, first), *others = tables.items()
    for other, table in others:
        if different := sorted(first.keys() ^ table.keys()):
            raise AHNError(
                f"{where}: {name} and {other} must be of the same tasks, but differ in {', '.join(different)}."
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
