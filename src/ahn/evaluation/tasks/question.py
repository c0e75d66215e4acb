"""What downloaded benchmarks have in common: a prompt from the protocol, filled from a record, scored by a metric."""

import dataclasses
import functools
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from ahn.errors import AHNError
from ahn.evaluation import metrics
from ahn.evaluation.data import DataFile, DataLine, DataLines, Field
from ahn.evaluation.metrics.clean import clean_prediction
from ahn.evaluation.protocol import protocol_digest
from ahn.evaluation.task import Options, Sample, Task, Truncation


@dataclasses.dataclass(eq=False)
class QuestionTask(Task):
    """A task of a benchmark with a protocol.

    Attributes:
        task: the benchmark's own name of it.
        prompt: with fields in braces.
        metric: one of `ahn.evaluation.metrics.METRICS`.
        truncation: as in `Task`; `options.max_length` takes the place of its limit.
    """

    benchmark: ClassVar[str]
    fields: ClassVar[Mapping[str, Field]]
    """Of a record, with their checks."""

    name: str
    task: str
    options: Options
    protocol: Mapping[str, Any]
    prompt: str
    file: DataFile
    metric: str
    max_new_tokens: int
    truncation: Truncation
    chat_template: bool = True
    stops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.profile = self.options.profile
        self.truncation = Truncation(self.truncation.keep, self.options.max_length or self.truncation.limit)

    @functools.cached_property
    def data(self) -> DataLines:
        """The file, located when it is first needed."""
        return DataLines(self.file, self.options.data_dir)

    @abstractmethod
    def sample(self, number: int, record: DataLine) -> Sample:
        """The sample of the record that is `number` records after the first."""

    def check(self, record: DataLine) -> None:
        """Raises AHNError for a record that is not of this task, or lacks what its metric needs."""

    def records(self) -> Iterator[tuple[int, DataLine]]:
        """Number and record of each sample."""
        for number, record in enumerate(self.data.records(self.fields)):
            self.check(record)
            yield number, record

    def fill(self, **fields: str) -> str:
        """The prompt with a record's texts in it."""
        try:
            return self.prompt.format(**fields)
        except (KeyError, IndexError) as error:
            raise AHNError(
                f"The protocol's prompt of {self.name} asks for {error}, but there are {', '.join(fields)}."
            ) from None

    def samples(self) -> Iterator[Sample]:
        for number, record in self.records():
            yield self.sample(number, record)

    def score(self, prediction: str, sample: Sample) -> float:
        return metrics.score(
            self.metric,
            clean_prediction(prediction, self.benchmark, self.task, self.profile),
            sample.answers,
            sample.extra.get("keywords"),
            protocol=self.protocol,
            classes=sample.extra.get("classes") or (),
        )

    def settings(self) -> dict[str, Any]:
        return {
            "protocol": protocol_digest(self.protocol),
            "prompt": self.prompt,
            "metric": self.metric,
            "data": self.data.settings(),
        }


def entry(protocol: Mapping[str, Any], task: str, *fields: str) -> Any:
    """What a protocol says of a task, under these fields."""
    table: Any = protocol
    for field in (*fields, task):
        if field not in table:
            raise AHNError(f"The protocol says nothing of {task} in {' / '.join(fields)}.")
        table = table[field]
    return table
