"""Runs tasks with a model: resumable, spread over processes, one result folder for each."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from ahn.errors import AHNError, installed_version
from ahn.evaluation.methods import Evaluated
from ahn.evaluation.prompt import encode
from ahn.evaluation.reader import Generation, Reader
from ahn.evaluation.results import ResultFolder, Shard
from ahn.evaluation.task import Sample, Task
from ahn.evaluation.workers import Worker

PACKAGES = ("ahn", "torch", "transformers", "tokenizers", "jieba")
"""Whose versions can change a score."""
PATIENCE = 0.5
"""Seconds between two looks at what the other processes have done."""


class Watcher:
    """What is told of a run while it goes on; this one ignores it all."""

    def started(self, task: Task, samples: int, done: int) -> None:
        """A task begins: samples of this process, and how many of them an earlier run has done."""

    def read(self, tokens: int, total: int) -> None:
        """So many tokens of a prompt have been read."""

    def answered(self) -> None:
        """A sample is done."""

    def waiting(self) -> None:
        """This process is done, others are not."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A task on its way: its folder, and the indices of its samples in groups that share a context."""

    task: Task
    folder: ResultFolder
    groups: tuple[tuple[int, ...], ...]

    @property
    def samples(self) -> int:
        return sum(map(len, self.groups))

    def share(self, worker: Worker) -> set[int]:
        """Indices of the samples that are a worker's. A group stays together: its context is read once."""
        return {index for group in self.groups[worker.rank :: worker.count] for index in group}


def run(
    tasks: Sequence[Task],
    evaluated: Evaluated,
    out: Path,
    limit: int | None = None,
    worker: Worker | None = None,
    watcher: Watcher | None = None,
    batch: int = 1,
) -> list[dict[str, Any]]:
    """Run tasks and return their results, in order. What earlier runs of the same configuration did is not repeated.

    Args:
        batch: prompts that are answered together, where they have no context in common.
        worker: this process's part; only the first worker waits for the others and returns results.
    """
    worker, watcher = worker or Worker.from_environment(), watcher or Watcher()
    reader = Reader(evaluated.model, watcher.read, evaluated.tokenizer)
    open_jobs: list[Job] = []
    results: dict[str, dict[str, Any]] = {}
    for task in tasks:
        folder = ResultFolder(out, *describe(task, evaluated, limit, batch))
        groups = plan(task, limit) if folder.result is None else ()  # bad data show before there is a folder
        folder.open()
        finished = folder.result
        if finished is not None:
            results[task.name] = finished
            continue
        job = Job(task, folder, groups)
        _answer(job, evaluated, reader, worker, watcher, batch)
        open_jobs.append(job)
        if worker.first:
            _finish(open_jobs, results)
    if not worker.first:
        return []
    while open_jobs:
        watcher.waiting()
        time.sleep(PATIENCE)
        _finish(open_jobs, results)
    return [results[task.name] for task in tasks]


def describe(
    task: Task, evaluated: Evaluated, limit: int | None, batch: int = 1
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything that can change a task's score, and what else is worth knowing."""
    generation = Generation.of(evaluated.model, evaluated.tokenizer, task.max_new_tokens, task.stops)
    settings = task.common_settings() | evaluated.settings | {"limit": limit}
    settings["chat_template"] = task.chat_template and bool(evaluated.tokenizer.chat_template)
    settings["generation"] = dataclasses.asdict(generation) | {"ends": list(generation.ends), "greedy": True}
    settings["task_settings"] = task.settings()
    if batch > 1:  # results from before there was a batch are of one prompt at a time
        settings["batch"] = batch
    settings["versions"] = {name: installed_version(name) for name in PACKAGES}
    return settings, evaluated.about


def plan(task: Task, limit: int | None) -> tuple[tuple[int, ...], ...]:
    """Indices of the samples in groups that share a context. Every sample is looked at, so bad data fail here."""
    groups = []
    for _, group in groupby(enumerate(islice(task.samples(), limit)), key=lambda item: item[1].context):
        indices = []
        for index, sample in group:
            task.score("", sample)  # an answer that cannot be scored, or a missing package, must not cost hours
            indices.append(index)
        groups.append(tuple(indices))
    if not groups:
        raise AHNError(f"{task.name} has no samples.")
    return tuple(groups)


def _answer(job: Job, evaluated: Evaluated, reader: Reader, worker: Worker, watcher: Watcher, batch: int) -> None:
    """Answer what is this worker's and not done."""
    share, done = job.share(worker), job.folder.rows().keys()
    watcher.started(job.task, len(share), len(share & done))
    if share <= done:
        return
    generation = Generation.of(evaluated.model, evaluated.tokenizer, job.task.max_new_tokens, job.task.stops)
    with Shard(job.folder, worker.rank) as shard:
        for group in _batches(_groups(job, share), batch):
            wanted = group.keys() - done
            if wanted:
                for row, timing in _rows(job.task, group, wanted, evaluated, reader, generation):
                    shard.append(row, timing)
                    watcher.answered()


def _groups(job: Job, share: set[int]) -> Iterator[dict[int, Sample]]:
    """Of each group of a worker its samples by their indices."""
    samples = islice(job.task.samples(), job.samples)
    for indices in job.groups:
        group = dict(zip(indices, samples, strict=False))
        if group.keys() <= share:
            yield group


def _batches(groups: Iterator[dict[int, Sample]], batch: int) -> Iterator[dict[int, Sample]]:
    """Samples to answer together: those of a group, or `batch` samples that are each alone in theirs."""
    alone: dict[int, Sample] = {}
    for group in groups:
        if len(group) > 1:
            yield group
            continue
        alone |= group
        if len(alone) == batch:
            yield alone
            alone = {}
    if alone:
        yield alone


def _rows(
    task: Task, group: dict[int, Sample], wanted: set[int], evaluated: Evaluated, reader: Reader, generation: Generation
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows and times of the wanted samples of a group."""
    encoded = {index: encode(sample.prompt, task, evaluated.tokenizer) for index, sample in group.items()}
    prompts = {index: ids for index, (ids, _) in encoded.items()}
    shared = len({sample.context for sample in group.values()}) == 1
    before = time.perf_counter()
    # A batch is answered whole, though an earlier run may have some of it: an answer depends on what stands beside it.
    found = reader.answers(prompts, generation, wanted) if shared else reader.side_by_side(prompts, generation)
    for index, new in found:
        if index not in wanted:
            continue
        sample, now = group[index], time.perf_counter()
        prediction = evaluated.tokenizer.decode(new, skip_special_tokens=True)
        row = {
            "index": index,
            "id": sample.id,
            "prediction": prediction,
            "answers": list(sample.answers),
            "score": task.score(prediction, sample),
            "prompt_tokens": len(prompts[index]),
            "shortened": encoded[index][1],
            "new_tokens": len(new),
            "extra": dict(sample.extra),
        }
        yield row, {"index": index, "seconds": round(now - before, 4)}  # of a batch the first has all
        before = time.perf_counter()


def _finish(jobs: list[Job], results: dict[str, dict[str, Any]]) -> None:
    """Turn jobs that every worker has done into results."""
    for job in list(jobs):
        rows = job.folder.rows()
        if len(rows) == job.samples:
            ordered = [rows[index] for index in sorted(rows)]
            results[job.task.name] = job.folder.finish(ordered, job.task.summary(ordered))
            jobs.remove(job)
