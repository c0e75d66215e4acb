"""Tasks of `ahn eval` answered in a study's ways; their result folders make a report."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ahn.checkpoint.directory import Checkpoint
from ahn.evaluation import methods, runner
from ahn.evaluation.methods import Evaluated
from ahn.evaluation.results import ResultFolder
from ahn.evaluation.tasks import tasks

from .ways import Way


def evaluated(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: str, way: Way) -> Evaluated:
    """A model that reads in this way, as `ahn eval` describes it.

    Args:
        base: directory of the model.
    """
    forgets = way.config is not None and way.adapter is None and not way.config.quantized
    method = "full" if way.config is None else "window" if forgets else "ahn"
    used = [Checkpoint.open(Path(part)) for part in (base, way.adapter) if part is not None]
    return methods.of_loaded(method, model, tokenizer, base, used, way.name)


def scores(
    reading: Evaluated, spec: str, haystack: Path, out: Path, samples: int, batch: int
) -> dict[str, list[float]]:
    """Per task the score of each answer, 0 to 1. What an earlier run answered is not asked again.

    Args:
        spec: a benchmark, a task, or one length of it.
        haystack: file of the text in which things are hidden.
        out: folder of the result folders.
        samples: of each task.
        batch: prompts answered together.
    """
    found = tasks(spec, tokenizer=reading.tokenizer, samples=samples, haystack=haystack)
    runner.run(found, reading, out, batch=batch)
    folders = {task.name: ResultFolder(out, *runner.describe(task, reading, None, batch)) for task in found}
    return {name: [row["score"] for _, row in sorted(folder.rows().items())] for name, folder in folders.items()}
