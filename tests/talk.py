"""A conversation that knows what every row has read, so that it can be compared with forwards of the rows alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from golden import relative_error
from models import VOCABULARY, positions
from torch import Tensor
from transformers import PreTrainedModel

from ahn import AHNCache


class Talk:
    """Reads random tokens with a cache, as many for each row as asked, the rest padding on the left.

    Attributes:
        cache: of the conversation; a test may change it and put another in its place.
        rows: real tokens of each row.
        mask: (B, columns).
    """

    def __init__(self, model: PreTrainedModel, batch: int, seed: int = 0, explicit: bool = True) -> None:
        self.model, self.explicit = model, explicit
        self.cache = AHNCache.for_model(model)
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        self.mask = torch.zeros(batch, 0, dtype=torch.long)
        self._logits: list[list[Tensor]] = [[] for _ in range(batch)]
        self._random = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def read(self, counts: Sequence[int], **options: Any) -> Any:
        """One forward over counts[row] new tokens of each row; returns its output."""
        width, batch = max(counts), len(counts)
        ids = torch.randint(2, VOCABULARY, (batch, width), generator=self._random)
        real = (torch.arange(width) >= width - torch.tensor(counts)[:, None]).long()
        self.mask = torch.cat([self.mask, real], dim=1)
        # Unpadded conversations do without a mask, as most callers would.
        if not bool(self.mask.all()):
            options["attention_mask"] = self.mask
        if self.explicit:
            options["position_ids"] = positions(self.mask)[:, -width:]
        given = {name: x.to(self.model.device) if isinstance(x, Tensor) else x for name, x in options.items()}
        out = self.model((ids * real).to(self.model.device), past_key_values=self.cache, **given)
        for row, count in enumerate(counts):
            self.rows[row] += ids[row, width - count :].tolist()
            self._logits[row].append(out.logits[row, width - count :].float().cpu())
        return out

    def steps(self, count: int) -> None:
        """So many single tokens of every row."""
        for _ in range(count):
            self.read([1] * len(self.rows))

    def choose(self, rows: list[int]) -> None:
        """The batch now consists of these of its rows; the cache is the caller's to change."""
        self.rows, self._logits = ([list(x[row]) for row in rows] for x in (self.rows, self._logits))
        self.mask = self.mask[rows]

    def crop(self, columns: int) -> None:
        """Forget the last columns."""
        self.cache.crop(-columns)
        gone = self.mask[:, self.mask.shape[1] - columns :].sum(1).tolist()
        self.mask = self.mask[:, : self.mask.shape[1] - columns]
        for row, count in enumerate(gone):
            kept = len(self.rows[row]) - count
            self.rows[row], self._logits[row] = self.rows[row][:kept], [torch.cat(self._logits[row])[:kept]]

    @torch.no_grad()
    def error(self, reference: PreTrainedModel | None = None) -> float:
        """Largest relative error of a row's logits so far, against an uncached forward of the row alone.

        Where one layer scores tokens for all, which takes a cache, against all of the row at once.

        Args:
            reference: the model of that forward; None takes the conversation's own.
        """
        reference, errors = reference or self.model, [0.0]
        cached = getattr(getattr(reference, "ahn_config", None), "score_layer", None) is not None
        for own, logits in zip(self.rows, self._logits, strict=True):
            if own:
                expected = reference(torch.tensor([own], device=reference.device), use_cache=cached).logits[0]
                errors.append(relative_error(torch.cat(logits), expected.float().cpu()))
        return float("nan") if any(map(math.isnan, errors)) else max(errors)

    def check(self, tolerance: float) -> None:
        """Every logit so far is that of an uncached forward of the row alone."""
        assert self.error() < tolerance
