"""LV-Eval (arXiv 2402.05136): eleven question-answering tasks at five lengths, in English and Chinese.

Both profiles are the same, except that the paper's tables are at 128k; the length limit of prompts belongs to the
benchmark's user, 256000 tokens in the paper's scripts.
"""

import re
from collections.abc import Sequence

from ahn.errors import AHNError
from ahn.evaluation import data
from ahn.evaluation.data import DataFile, DataLine
from ahn.evaluation.metrics.lveval import METRIC_OF_FUNCTION
from ahn.evaluation.protocol import load_protocol
from ahn.evaluation.task import Options, Sample, Task, Truncation
from ahn.evaluation.tasks import pick
from ahn.evaluation.tasks.question import QuestionTask, entry

REPOSITORY = "Infinigence/LVEval"
REVISION = "a5390f71127e0709f33dfd73e6ee7fef1a374848"
"""The repository's third commit. Its archives are those of the second; later commits change the card and the loading
script only. Their sha256 could not be had when this was written: what was read is recorded with every result."""
LEVELS = {"16k": 16_000, "32k": 32_000, "64k": 64_000, "128k": 128_000, "256k": 256_000}
"""Length levels and the words (English) or characters (Chinese) that their samples have about."""
TASKS = (
    "hotpotwikiqa_mixup",
    "loogle_SD_mixup",
    "loogle_CR_mixup",
    "loogle_MIR_mixup",
    "multifieldqa_en_mixup",
    "multifieldqa_zh_mixup",
    "factrecall_en",
    "factrecall_zh",
    "cmrc_mixup",
    "lic_mixup",
    "dureader_mixup",
)
LIMIT = 256_000
FIELDS = {
    "input": data.text,
    "context": data.text,
    "answers": data.texts,
    "length": data.number,
    "dataset": data.optional(data.text),
    "answer_keywords": data.optional(data.text),
}


def names() -> list[str]:
    return [f"lveval/{task}/{level}" for task in TASKS for level in LEVELS]


def tasks(parts: Sequence[str], options: Options) -> list[Task]:
    """All, those of a task, those of a level ("lveval/128k"), or one."""
    rest = list(parts)
    levels = (rest.pop(),) if rest and rest[-1] in LEVELS else tuple(LEVELS)
    if len(rest) > 1:
        raise AHNError(f"LV-Eval has no length level {rest[1]!r}; choose one of {', '.join(LEVELS)}.")
    chosen = pick(rest, TASKS, "LV-Eval")
    protocol = load_protocol("lveval", options.protocol_dir)
    return [
        LVEval(
            name=f"lveval/{task}/{level}",
            task=task,
            options=options,
            protocol=protocol,
            prompt=entry(protocol, task, "DATASET_PROMPT"),
            file=DataFile(REPOSITORY, REVISION, f"{task}.zip", f"{task}/{task}_{level}.jsonl"),
            metric=METRIC_OF_FUNCTION[entry(protocol, task, "DATASET_METRIC")],
            max_new_tokens=entry(protocol, task, "DATASET_MAXGEN"),
            truncation=Truncation("halves", LIMIT),
        )
        for task in chosen
        for level in levels
    ]


class LVEval(QuestionTask):
    """One task at one length level."""

    benchmark, fields = "lveval", FIELDS

    def sample(self, number: int, record: DataLine) -> Sample:
        fields = record.fields
        return Sample(
            id=str(number),
            context=data.key_of(fields["context"]),
            prompt=self.fill(context=fields["context"], input=fields["input"]),
            answers=fields["answers"],
            extra={"keywords": fields["answer_keywords"], "length": fields["length"]},
        )

    def check(self, record: DataLine) -> None:
        """A record of another level would silently change what is measured.

        The benchmark's least and greatest length are 11,896 and 387,406 (its README): 0.74 of 16k and 1.51 of 256k. The
        bounds are wider, and leave out the levels beside.
        """
        level = self.name.rpartition("/")[2]
        named = re.search(r"_(\d+k)$", record.fields["dataset"] or "")
        if named and named[1] != level:
            raise AHNError(f"{record.where}: the field 'dataset' says {named[0][1:]}, expected {level}.")
        length, least, most = record.fields["length"], LEVELS[level] * 6 // 10, LEVELS[level] * 16 // 10
        if not least <= length <= most:
            wanted = f"which is not of the level {level} ({least} to {most})"
            raise AHNError(f"{record.where}: the field 'length' is {length}, {wanted}.")
