"""RULER's tasks through the chat template: prompts written once, answered greedily by every way."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

import ahn
from ahn.evaluation.prompt import encode
from ahn.evaluation.task import Sample
from ahn.evaluation.tasks import tasks
from ahn.files import write_text
from ahn.measure.method import Method
from ahn.serve.engine.engine import Engine
from ahn.serve.request import GenerationRequest, SamplingOptions

AT_ONCE = 8
"""Answers that are written at the same time."""


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
        model: with an AHN.
        most: prompts of each task; None is all.
    """
    by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in file.read_text("utf-8").splitlines():
        asked = json.loads(line)
        by_task[asked["task"]].append(asked)
    engine = Engine(model, tokenizer, conversations=AT_ONCE, queue=1 << 20)
    engine.start()
    try:
        replies = {name: [engine.submit(_request(one)) for one in asked[:most]] for name, asked in by_task.items()}
        texts = {name: ["".join(delta.text for delta in reply) for reply in some] for name, some in replies.items()}
    finally:
        engine.close()
    found = {}
    for name, asked in by_task.items():
        (task,) = tasks(name, tokenizer=tokenizer)
        samples = [Sample("", "", "", tuple(one["answers"])) for one in asked]
        found[name] = [task.score(text, sample) for text, sample in zip(texts[name], samples, strict=False)]
    return found


def _request(asked: dict[str, Any]) -> GenerationRequest:
    return GenerationRequest(asked["ids"], SamplingOptions(asked["new_tokens"], temperature=0.0), keep=False)


def with_memory(method: Method, model: PreTrainedModel) -> Method:
    """The same way for what wants a model with an AHN: full attention is a window that nothing leaves."""
    if method.config is not None:
        return method
    sinks = 4
    config = ahn.AHNConfig("window_only", model.config.max_position_embeddings - sinks, sinks)
    return dataclasses.replace(method, config=config)
