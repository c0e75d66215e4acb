"""RULER's tasks through the chat template: prompts written once, answered greedily by every way."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ahn.evaluation.prompt import encode
from ahn.evaluation.reader import Generation, Reader
from ahn.evaluation.task import Sample
from ahn.evaluation.tasks import tasks
from ahn.files import write_text

AT_ONCE = 34
"""Prompts that are read, and answers that are written, at the same time: a third of a hundred."""


def write_prompts(tokenizer: Any, file: Path, length: int, samples: int) -> dict[str, Any]:
    """Prompts of the tasks that need no data set, of that many tokens with their answers, one JSON line each."""
    lines = []
    for task in tasks("ruler", tokenizer=tokenizer, lengths=(length,), samples=samples):
        for sample in task.samples():
            ids, _ = encode(sample.prompt, task, tokenizer)
            said = {"task": task.name, "ids": ids, "new_tokens": task.max_new_tokens, "answers": sample.answers}
            lines.append(json.dumps(said))
    write_text(file, "\n".join(lines) + "\n")
    return {"prompts": len(lines), "length": length}


def scores(model: PreTrainedModel, tokenizer: Any, file: Path, most: int | None = None) -> dict[str, list[float]]:
    """Per task the score of each answer, 0 to 1, in the order of the file.

    Args:
        most: prompts of each task; None is all.
    """
    by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in file.read_text("utf-8").splitlines():
        asked = json.loads(line)
        by_task[asked["task"]].append(asked)
    reader, found = Reader(model, tokenizer=tokenizer), defaultdict(list)
    for name, asked in by_task.items():
        (task,) = tasks(name, tokenizer=tokenizer)
        asked = asked[:most]
        generation = Generation.of(model, tokenizer, asked[0]["new_tokens"], task.stops)
        for start in range(0, len(asked), AT_ONCE):
            prompts = {start + row: one["ids"] for row, one in enumerate(asked[start : start + AT_ONCE])}
            for number, ids in reader.side_by_side(prompts, generation):
                sample = Sample("", "", "", tuple(asked[number]["answers"]))
                found[name].append(task.score(tokenizer.decode(ids, skip_special_tokens=True), sample))
    return found
