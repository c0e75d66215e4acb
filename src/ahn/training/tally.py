"""What became of the rows of a run's data: counted per file, and said once."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

from datasets import Dataset

from ahn.errors import AHNError
from ahn.training.settings import Settings
from ahn.training.tokenise import BAD, IDLE, KEPT, SHORT

logger = logging.getLogger("ahn")

SHOWN = 5  # bad rows that are named
FILES = 20  # files whose counts are said
SUMMARY = ["fate", "file", "first", "shortened", "unused"]


@dataclasses.dataclass
class Tally:
    """Counts of samples by what became of them, over all files and per file, and of what rows hold unused."""

    fates: Counter[str] = dataclasses.field(default_factory=Counter)
    files: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    shortened: int = 0
    unused: Counter[str] = dataclasses.field(default_factory=Counter)
    problems: list[str] = dataclasses.field(default_factory=list)

    def add(self, samples: Dataset) -> None:
        """Count what `RowTokenizer` made."""
        for batch in samples.select_columns(SUMMARY).iter(batch_size=10_000):
            for values in zip(*(batch[name] for name in SUMMARY), strict=True):
                self._count(dict(zip(SUMMARY, values, strict=True)))
        if self.fates[BAD]:
            bad = [index for index, fate in enumerate(samples["fate"]) if fate == BAD][: SHOWN - len(self.problems)]
            self.problems += [f"{row['where']}: {row['problem']}" for row in samples.select(bad)]

    def _count(self, sample: dict[str, Any]) -> None:
        file = self.files.setdefault(sample["file"], Counter())
        cut = int(sample["shortened"] and sample["fate"] == KEPT)
        self.fates[sample["fate"]] += 1
        self.shortened += cut
        file.update({"rows": int(sample["first"]), "shortened": cut, sample["fate"]: 1})
        self.unused.update(sample["unused"])

    def say(self, settings: Settings, what: str) -> None:
        """Say it: one line for all, one for each file where there are several."""
        line = ", ".join(self._parts(settings))
        if not self.fates[KEPT]:
            raise AHNError(f"No sample is left in the {what}: {line}.")
        logger.log(logging.WARNING if self.fates[BAD] else logging.INFO, "%s: %s.", what, line)
        if len(self.files) > 1:
            troubled = sorted(self.files.items(), key=lambda item: item[1][KEPT] - item[1]["rows"])
            for name, counts in troubled[:FILES]:
                logger.info("  %s: %s", name, _row_counts(counts))
            if len(troubled) > FILES:
                logger.info("  and %d files more.", len(troubled) - FILES)
        if self.unused:
            logger.warning("%s: what training does not use: %s.", what, _listed(self.unused.most_common()))

    def _parts(self, settings: Settings) -> list[str]:
        fates = self.fates
        parts = [f"{fates[KEPT]:,} samples"]
        if self.shortened:
            parts.append(f"{self.shortened:,} of them shortened to cutoff_len {settings.cutoff_len:,}")
        if fates[SHORT]:
            parts.append(f"{fates[SHORT]:,} of {settings.shortest} tokens or fewer left out")
        if fates[IDLE]:
            parts.append(
                f"{fates[IDLE]:,} with nothing to learn after their first {settings.smallest_total} tokens left out"
            )
        if fates[BAD]:
            more = " …" if fates[BAD] > len(self.problems) else ""
            parts.append(f"{fates[BAD]:,} bad rows skipped ({'; '.join(self.problems)}{more})")
        return parts


def _row_counts(counts: Counter[str]) -> str:
    parts = [f"{counts['rows']:,} rows", f"{counts[KEPT]:,} samples"]
    for name, words in (("shortened", "shortened"), (BAD, "bad"), (SHORT, "too short"), (IDLE, "nothing to learn")):
        parts += [f"{counts[name]:,} {words}"] if counts[name] else []
    return ", ".join(parts)


def _listed(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} ({number:,} rows)" for name, number in counts)
