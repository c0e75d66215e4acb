"""InfiniteBench (arXiv 2402.13718): questions on whole novels, in English and Chinese.

official: the prompts of the benchmark's script for open models, 40 new tokens, the middle cut out beyond 128 × 1024
tokens, F1 over words or characters. paper: one English prompt for both, 256 new tokens, the last 128000 tokens kept,
ROUGE-L.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from ahn.evaluation import data
from ahn.evaluation.data import DataFile, DataLine
from ahn.evaluation.protocol import load_protocol
from ahn.evaluation.task import Options, Row, Sample, Task, Truncation
from ahn.evaluation.tasks import pick
from ahn.evaluation.tasks.question import QuestionTask, entry

REPOSITORY = "xinrongzhang2022/InfiniteBench"
REVISION = "90f0394333616266d9fe85824ceaf505093cbaa5"
TASKS = {"en_qa": "longbook_qa_eng", "zh_qa": "longbook_qa_chn"}
"""Our name -> the benchmark's."""
METRICS = {"en_qa": "ib.f1_en", "zh_qa": "ib.f1_zh"}
PAPER_METRICS = {"en_qa": "lb.rouge", "zh_qa": "lb.rouge_zh"}
"""The AHN paper's scripts score with LongBench's ROUGE-L."""
OFFICIAL = Truncation("middle-cut", 128 * 1024)
PAPER = Truncation("last", 128_000)
PAPER_NEW_TOKENS = 256
FIELDS = {"id": data.number, "context": data.text, "input": data.text, "answer": data.texts}


def names() -> list[str]:
    return [f"infinitebench/{task}" for task in TASKS]


def tasks(parts: Sequence[str], options: Options) -> list[Task]:
    """Both, or the one that is named."""
    chosen = pick(parts, tuple(TASKS), "InfiniteBench")
    protocol = load_protocol("infinitebench", options.protocol_dir)
    return [_task(name, TASKS[name], options, protocol) for name in chosen]


def _task(name: str, task: str, options: Options, protocol: dict[str, Any]) -> Task:
    paper = options.profile == "paper"
    style, prompt_of = ("gpt4", TASKS["en_qa"]) if paper else ("yarn_mistral", task)
    return InfiniteBench(
        name=f"infinitebench/{name}",
        task=task,
        options=options,
        protocol=protocol,
        prompt=entry(protocol, prompt_of, "prompts", style),
        file=DataFile(REPOSITORY, REVISION, f"{task}.jsonl"),
        metric=(PAPER_METRICS if paper else METRICS)[name],
        max_new_tokens=PAPER_NEW_TOKENS if paper else entry(protocol, task, "max_new_tokens"),
        truncation=PAPER if paper else OFFICIAL,
    )


class InfiniteBench(QuestionTask):
    """One of the two. Questions on one book come together, whatever their order in the file, so it is read once."""

    benchmark, fields = "infinitebench", FIELDS

    def records(self) -> Iterator[tuple[int, DataLine]]:
        books: dict[str, list[tuple[int, DataLine]]] = {}
        for number, record in enumerate(self.data.records(self.fields)):
            questions = books.setdefault(record.fields["context"], [])
            if questions:  # a book is in memory once, however often the file has it
                record.fields["context"] = questions[0][1].fields["context"]
            questions.append((number, record))
        for questions in books.values():
            yield from questions

    def sample(self, number: int, record: DataLine) -> Sample:
        fields = record.fields
        return Sample(
            id=str(fields["id"]),
            context=data.key_of(fields["context"]),
            prompt=self.fill(context=fields["context"], question=fields["input"], input=fields["input"]),
            answers=fields["answer"],
        )

    def summary(self, rows: Sequence[Row]) -> dict[str, Any]:
        if self.profile == "paper":
            return super().summary(rows)
        scores = [row["score"] for row in rows]
        return {"score": 100 * sum(scores) / len(scores)}  # the benchmark does not round
