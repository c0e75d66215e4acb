"""`Part`: attention over some of the keys, with what it counts for where several are joined."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass
class Part:
    """Attention of m queries over some keys: of all n queries, or of the first m; the others see none of these keys.

    Attributes:
        out: (B, H, m, P).
        score: (B, H, m) float32, of float64 queries float64: log-sum-exp of the scores.
        reversed: the queries are in reverse order.
    """

    out: Tensor
    score: Tensor
    reversed: bool = False

    def queries(self, start: int, stop: int) -> Part:
        """Of some of the queries, where they are in order."""
        return Part(self.out[:, :, start:stop], self.score[:, :, start:stop])
