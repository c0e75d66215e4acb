"""LongBench (arXiv 2308.14508): 21 tasks on documents of some thousand words.

official: the middle is cut out beyond the model's limit (31500 tokens for models of 32k). paper: the last tokens of
32000, six tasks, summaries of 500 tokens instead of 512.
"""

import re
from collections.abc import Sequence
from typing import Any

from ahn.errors import AHNError
from ahn.evaluation import data
from ahn.evaluation.data import DataFile, DataLine
from ahn.evaluation.metrics.longbench import METRIC_OF_TASK, PARAGRAPH, PARAGRAPH_CHINESE
from ahn.evaluation.protocol import load_protocol
from ahn.evaluation.task import Options, Sample, Task, Truncation
from ahn.evaluation.tasks import pick
from ahn.evaluation.tasks.question import QuestionTask, entry

REPOSITORY = "zai-org/LongBench"
REVISION = "5e628be450b7e67fb7ae6e201bd6d8f7056f7672"
ARCHIVE = "data.zip"
SHA256 = "cb45b11a4133c6bc1d6a44b0f8e701335ff1e543195db1103472e575857f7f64"
TASKS = tuple(METRIC_OF_TASK)
PAPER_TASKS = ("dureader", "hotpotqa", "musique", "narrativeqa", "qmsum", "triviaqa")
OFFICIAL = Truncation("halves", 31_500)
PAPER = Truncation("last", 32_000)
PAPER_MOST_NEW_TOKENS = 500
WITHOUT_TEMPLATE = frozenset({"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"})
"""Few-shot prompts and code, which are continued (pred.py)."""
ENDS_WITH_LINE = frozenset({"samsum"})
"""Official only: generation ends with the first line (pred.py); the paper's script has no such case."""
FIELDS = {
    "_id": data.text,
    "input": data.text,
    "context": data.text,
    "answers": data.texts,
    "length": data.number,
    "all_classes": data.optional(data.texts),
}

ANSWERS = {"lb.retrieval": PARAGRAPH, "lb.retrieval_zh": PARAGRAPH_CHINESE}
"""Metric -> what its answers must look like."""


def names() -> list[str]:
    return [f"longbench/{task}" for task in TASKS]


def tasks(parts: Sequence[str], options: Options) -> list[Task]:
    """All of the profile (the paper's are six), or the one that is named."""
    chosen = PAPER_TASKS if options.profile == "paper" and not parts else pick(parts, TASKS, "LongBench")
    protocol = load_protocol("longbench", options.protocol_dir)
    return [_task(task, options, protocol) for task in chosen]


def _task(task: str, options: Options, protocol: dict[str, Any]) -> Task:
    paper = options.profile == "paper"
    new_tokens = entry(protocol, task, "dataset2maxlen.json")
    return LongBench(
        name=f"longbench/{task}",
        task=task,
        options=options,
        protocol=protocol,
        prompt=entry(protocol, task, "dataset2prompt.json"),
        # The archive's digest is pinned for the Hub's copy only: own files in its format may stand in for it.
        file=DataFile(REPOSITORY, REVISION, ARCHIVE, f"data/{task}.jsonl", None if options.data_dir else SHA256),
        metric=METRIC_OF_TASK[task],
        max_new_tokens=min(new_tokens, PAPER_MOST_NEW_TOKENS) if paper else new_tokens,
        truncation=PAPER if paper else OFFICIAL,
        chat_template=task not in WITHOUT_TEMPLATE,
        stops=("\n",) if task in ENDS_WITH_LINE and not paper else (),
    )


class LongBench(QuestionTask):
    """One task."""

    benchmark, fields = "longbench", FIELDS

    def sample(self, number: int, record: DataLine) -> Sample:
        fields = record.fields
        return Sample(
            id=fields["_id"],
            context=data.key_of(fields["context"]),
            prompt=self.fill(context=fields["context"], input=fields["input"]),
            answers=fields["answers"],
            extra={"classes": fields["all_classes"], "length": fields["length"]},
        )

    def check(self, record: DataLine) -> None:
        """What the task's metric needs besides a prediction must be there."""
        if self.metric == "lb.classification" and record.fields["all_classes"] is None:
            raise AHNError(f"{record.where}: the field 'all_classes' must name the classes of {self.name}.")
        pattern = ANSWERS.get(self.metric, "")
        for answer in record.fields["answers"]:
            if not re.search(pattern, answer):
                raise AHNError(f"{record.where}: the answer {answer!r} in 'answers' must match {pattern!r}.")
