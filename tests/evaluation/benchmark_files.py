"""Small files in the benchmarks' own formats, with invented content; protocols of our own; a tiny model on disk."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import models
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import ahn
from ahn.checkpoint import save_adapter
from ahn.evaluation.tasks import infinitebench, longbench, lveval

WINDOW, SINKS = 48, 8
STORY = "The lamp of the old harbour was blue. Mira carried seven letters to the mill, and nobody asked why. "


def protocols(directory: Path) -> Path:
    """The three protocols, ours: short prompts that need no download. Every task is in them."""
    ask = {task: f"Read [{task}]: {{context}}\nQ: {{input}}\nA:" for task in (*lveval.TASKS, *longbench.TASKS)}
    functions = dict.fromkeys(lveval.TASKS, "qa_f1_score_with_gold_ans")
    functions |= {"factrecall_en": "qa_f1_score", "cmrc_mixup": "qa_f1_zh_score_with_gold_ans"}
    functions |= {"dureader_mixup": "rouge_zh_score_blacklist"}
    books = {
        style: {task: f"{style} {task}: {{context}} Q: {{{field}}} A:" for task in infinitebench.TASKS.values()}
        for style, field in (("gpt4", "question"), ("yarn_mistral", "question"), ("claude2", "input"))
    }
    write_json(
        directory / "lveval.json",
        {
            "DATASET_PROMPT": {task: ask[task] for task in lveval.TASKS},
            "DATASET_MAXGEN": dict.fromkeys(lveval.TASKS, 6),
            "DATASET_METRIC": functions,
            "ABANDON_WORDS_EN": ["of"],
            "ABANDON_WORDS_ZH": ["的"],
        },
    )
    lengths = dict.fromkeys(longbench.TASKS, 5) | {"qmsum": 512}
    prompts = {task: ask[task] for task in longbench.TASKS}
    write_json(directory / "longbench.json", {"dataset2maxlen.json": lengths, "dataset2prompt.json": prompts})
    write_json(
        directory / "infinitebench.json",
        {"prompts": books, "max_new_tokens": dict.fromkeys(infinitebench.TASKS.values(), 5)},
    )
    return directory


def write_json(file: Path, fields: Mapping[str, Any]) -> None:
    """A finished protocol; its sources are our own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"sources": [], **fields}, ensure_ascii=False), encoding="utf-8")


def lveval_row(number: int, level: str = "16k", **changes: Any) -> dict[str, Any]:
    row = {
        "input": f"What colour was lamp {number}?",
        "context": f"{number} {STORY}",
        "answers": ["blue", "the colour of the sea"],
        "length": lveval.LEVELS[level] - 1000,
        "dataset": f"hotpotwikiqa_mixup_{level}",
        "language": "en",
        "answer_keywords": "blue",
        "confusing_facts": ["The lamp was green."],
    }
    return edited(row, changes)


def longbench_row(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "input": f"Who carried letter {number}?",
        "context": f"{number} {STORY}",
        "answers": ["Mira", "the girl"],
        "length": 4321,
        "dataset": "hotpotqa",
        "language": "en",
        "all_classes": None,
        "_id": f"id{number}",
    }
    return edited(row, changes)


def infinitebench_row(number: int, book: str = "", **changes: Any) -> dict[str, Any]:
    row = {
        "id": number,
        "context": book or 3 * STORY,
        "input": f"Why did she carry {number} letters?",
        "answer": ["nobody asked", "unknown"],
        "options": [],
    }
    return edited(row, changes)


def edited(row: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The row with fields changed; `...` takes one away."""
    return {name: value for name, value in (row | changes).items() if value is not ...}


def json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_lveval(
    directory: Path, rows: Sequence[Mapping[str, Any]] | None = None, task: str = "hotpotwikiqa_mixup"
) -> Path:
    """A task's archive with all its levels; `rows` are those of 16k."""
    with zipfile.ZipFile(directory / f"{task}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for level in lveval.LEVELS:
            default = [lveval_row(number, level, dataset=f"{task}_{level}") for number in range(3)]
            own = rows is not None and level == "16k"
            archive.writestr(f"{task}/{task}_{level}.jsonl", json_lines(rows if own and rows is not None else default))
    return directory


def write_longbench(directory: Path, **tasks: Sequence[Mapping[str, Any]]) -> Path:
    """data.zip with these tasks (names with "_" for "-"), and another one."""
    with zipfile.ZipFile(directory / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for task, rows in ({"hotpotqa": [longbench_row(0), longbench_row(1)]} | tasks).items():
            archive.writestr(f"data/{task.replace('_p', '-p')}.jsonl", json_lines(rows))
        archive.writestr("data/hotpotqa_e.jsonl", json_lines([longbench_row(9)]))
    return directory


def write_infinitebench(directory: Path, rows: Sequence[Mapping[str, Any]], task: str = "en_qa") -> Path:
    (directory / f"{infinitebench.TASKS[task]}.jsonl").write_bytes(json_lines(rows))
    return directory


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Every byte a token, and one that ends a text: lossless for any text, and halves of characters exist."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {character: number for number, character in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=chat_template)


def write_model(directory: Path, chat_template: str | None = "<{{ messages[0]['content'] }}>") -> tuple[Path, Path]:
    """A base model with a tokenizer, and an adapter for it whose every part is at work."""
    base, adapter = directory / "tiny-base", directory / "tiny-adapter"
    model = models.base(vocab_size=257)
    model.save_pretrained(base)
    byte_tokenizer(chat_template).save_pretrained(base)
    model.config._name_or_path = model.name_or_path = str(base)
    config = ahn.AHNConfig("gated_deltanet", window=WINDOW, sinks=SINKS, prefill_chunk_size=40)
    save_adapter(models.awaken(ahn.attach(model, config)), adapter)
    return base, adapter
