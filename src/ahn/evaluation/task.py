"""What a benchmark's task is: samples with prompts and answers, how they are read and generated, and how they score.

A task knows nothing of models. `ahn.evaluation.runner` runs any of them, `ahn.evaluation.tasks` finds them by name.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ahn.errors import AHNError
from ahn.evaluation.metrics import task_score
from ahn.files import expanded

PROFILES = ("official", "paper")

Row = Mapping[str, Any]
"""A sample's result, as it stands in `predictions.jsonl`: index (its place in `Task.samples`), id, prediction, answers,
score (0..1), prompt_tokens, new_tokens, and extra (the sample's)."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        id: unique in its task, and the same in every run.
        context: key of sharing: what consecutive samples with an equal one have in common is read once. Any short
            string, such as a hash of the text.
        prompt: the whole prompt, before truncation and chat template.
        answers: one or more.
        extra: JSON types. What the score needs besides the answers, and what results are grouped by (length, depth).
    """

    id: str
    context: str
    prompt: str
    answers: tuple[str, ...]
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Truncation:
    """How a prompt with more than `limit` tokens is shortened, before the chat template (see `evaluation.prompt.kept`).

    Attributes:
        keep: "halves" keeps first and last half, decoded one by one (LV-Eval, LongBench); "middle-cut" the same,
            decoded as one (InfiniteBench); "last" keeps the last `limit` - `max_new_tokens` (the paper's LongBench).
        limit: in tokens of the evaluated model.
    """

    keep: Literal["halves", "middle-cut", "last"]
    limit: int


class Task(ABC):
    """One task of a benchmark in one profile.

    Attributes:
        name: such as "longbench/hotpotqa": what `ahn eval` is given and a result folder is called.
        profile: "official" (the benchmark's own protocol) or "paper" (what the AHN paper's scripts did).
        truncation: None leaves prompts as they are.
        chat_template: whether the prompt becomes a user's message, if the tokenizer has a chat template.
        stops: generation also ends at the last token of each of these texts, but not before a first token.
    """

    name: str
    profile: str
    max_new_tokens: int
    truncation: Truncation | None = None
    chat_template: bool = True
    stops: tuple[str, ...] = ()

    @abstractmethod
    def samples(self) -> Iterator[Sample]:
        """Every sample, always in the same order, those of one context together."""

    @abstractmethod
    def score(self, prediction: str, sample: Sample) -> float:
        """Score of a generated text in [0, 1]."""

    def summary(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The task's figures, JSON types: `score` in percent, and what else the task tells apart."""
        return {"score": task_score(row["score"] for row in rows)}

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All of the task that a score depends on, as JSON types. Not what `common_settings` has already."""

    def common_settings(self) -> dict[str, Any]:
        """The attributes, as JSON types."""
        return {
            "task": self.name,
            "profile": self.profile,
            "max_new_tokens": self.max_new_tokens,
            "truncation": None if self.truncation is None else dataclasses.asdict(self.truncation),
            "chat_template": self.chat_template,
            "stops": list(self.stops),
        }


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user may choose of a task; each task takes what concerns it.

    Attributes:
        data_dir: local files in place of the Hub's, under the same names.
        max_length: tokens of a prompt; None takes the profile's limit.
        tokenizer: of the evaluated model, for generated tasks, whose lengths are counted in its tokens.
        haystack: text file that generated tasks hide things in; None takes their own.
        lengths, depths: of generated tasks: prompt lengths in tokens and depths in percent; empty takes their own.
        samples: of generated tasks, for each length and depth; None takes their own number.
    """

    profile: str = "official"
    data_dir: Path | None = None
    protocol_dir: Path | None = None
    max_length: int | None = None
    tokenizer: Any = None
    haystack: Path | None = None
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = ()
    samples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise AHNError(f"Unknown profile {self.profile!r}; choose one of {', '.join(PROFILES)}.")
        for name in ("data_dir", "protocol_dir"):
            folder = getattr(self, name)
            if folder is not None and not expanded(folder).is_dir():
                raise AHNError(f"{name} {folder} is no folder.")
        for name in ("max_length", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AHNError(f"{name} must be 1 or more, got {value}.")
        if any(length < 1 for length in self.lengths) or any(not 0 <= depth <= 100 for depth in self.depths):
            raise AHNError(f"Lengths must be 1 or more and depths 0 to 100, got {self.lengths} and {self.depths}.")
