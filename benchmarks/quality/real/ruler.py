"""RULER's tasks through the chat template: prompts written once, answered greedily by every way."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ahn.evaluation.prompt import encode
from ahn.evaluation.task import Sample
from ahn.evaluation.tasks import tasks
from ahn.files import write_text
from ahn.measure.reading import new_cache

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


@torch.no_grad()
def scores(model: PreTrainedModel, tokenizer: Any, file: Path, most: int | None = None) -> dict[str, list[float]]:
    """Per task the score of each answer, 0 to 1, in the order of the file.

    Args:
        most: prompts of each task; None is all.
    """
    by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in file.read_text("utf-8").splitlines():
        asked = json.loads(line)
        by_task[asked["task"]].append(asked)
    found = {}
    for name, asked in by_task.items():
        (task,) = tasks(name, tokenizer=tokenizer)
        asked = asked[:most]
        groups = (asked[start : start + AT_ONCE] for start in range(0, len(asked), AT_ONCE))
        texts = itertools.chain.from_iterable(_replies(model, tokenizer, group) for group in groups)
        samples = [Sample("", "", "", tuple(one["answers"])) for one in asked]
        found[name] = [task.score(text, sample) for text, sample in zip(texts, samples, strict=True)]
    return found


def _replies(model: PreTrainedModel, tokenizer: Any, asked: list[dict[str, Any]]) -> list[str]:
    """Greedy replies to prompts of one task, which are of about one length.

    As much as all of them have is read without padding, which is faster; what is left of each comes behind padding.
    """
    common = min(len(one["ids"]) for one in asked) - 1
    first = torch.tensor([one["ids"][:common] for one in asked], device=model.device)
    rest = {"input_ids": [one["ids"][common:] for one in asked]}
    padded = tokenizer.pad(rest, padding_side="left", return_tensors="pt").to(model.device)
    cache = new_cache(model, len(asked))
    if common:
        model(first, past_key_values=cache, use_cache=True, logits_to_keep=1)
    ids, mask = padded["input_ids"], F.pad(padded["attention_mask"], (common, 0), value=1)
    most = max(one["new_tokens"] for one in asked)
    said = model.generate(
        torch.cat([first, ids], dim=1), attention_mask=mask, past_key_values=cache, max_new_tokens=most, do_sample=False
    )
    texts: list[str] = tokenizer.batch_decode(said[:, common + ids.shape[1] :], skip_special_tokens=True)
    return texts
