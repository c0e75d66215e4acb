"""What became of the rows of a run's data: counted per file, and said once."""

import dataclasses
import logging
from collections import Counter

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
    """Counts of rows and of samples by what became of them, per file, and of what rows hold unused."""

    files: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    unused: Counter[str] = dataclasses.field(default_factory=Counter)
    problems: list[str] = dataclasses.field(default_factory=list)

    def add(self, samples: Dataset) -> None:
        """Count what `RowTokenizer` made."""
        for batch in samples.select_columns(SUMMARY).iter(batch_size=10_000):
            for fate, file, first, shortened, unused in zip(*(batch[name] for name in SUMMARY), strict=True):
                found = {"rows": int(first), "shortened": int(shortened and fate == KEPT), fate: 1}
                self.files.setdefault(file, Counter()).update(found)
                self.unused.update(unused)
        bad = [index for index, fate in enumerate(samples["fate"]) if fate == BAD][: SHOWN - len(self.problems)]
        self.problems += [f"{row['where']}: {row['problem']}" for row in samples.select(bad)]

    def say(self, settings: Settings, what: str) -> None:
        """Say it: one line for all, one for each file where there are several."""
        counts: Counter[str] = sum(self.files.values(), Counter())
        line = ", ".join(self._parts(counts, settings))
        if not counts[KEPT]:
            raise AHNError(f"No sample is left in the {what}: {line}.")
        logger.log(logging.WARNING if counts[BAD] else logging.INFO, "%s: %s.", what, line)
        if len(self.files) > 1:
            troubled = sorted(self.files.items(), key=lambda item: item[1][KEPT] - item[1]["rows"])
            for name, own in troubled[:FILES]:
                logger.info("  %s: %s", name, _row_counts(own))
            if len(troubled) > FILES:
                logger.info("  and %d files more.", len(troubled) - FILES)
        if self.unused:
            unused = ", ".join(f"{name} ({number:,} rows)" for name, number in self.unused.most_common())
            logger.warning("%s: what training does not use: %s.", what, unused)

    def _parts(self, counts: Counter[str], settings: Settings) -> list[str]:
        parts = [f"{counts[KEPT]:,} samples"]
        if counts["shortened"]:
            parts.append(f"{counts['shortened']:,} of them shortened to cutoff_len {settings.cutoff_len:,}")
        if counts[SHORT]:
            parts.append(f"{counts[SHORT]:,} of {settings.shortest} tokens or fewer left out")
        if counts[IDLE]:
            parts.append(
                f"{counts[IDLE]:,} with nothing to learn after their first {settings.smallest_total} tokens left out"
            )
        if counts[BAD]:
            more = " …" if counts[BAD] > len(self.problems) else ""
            parts.append(f"{counts[BAD]:,} bad rows skipped ({'; '.join(self.problems)}{more})")
        return parts


def _row_counts(counts: Counter[str]) -> str:
    parts = [f"{counts['rows']:,} rows", f"{counts[KEPT]:,} samples"]
    for name, words in (("shortened", "shortened"), (BAD, "bad"), (SHORT, "too short"), (IDLE, "nothing to learn")):
        parts += [f"{counts[name]:,} {words}"] if counts[name] else []
    return ", ".join(parts)
