"""The next token of each row of a batch, on the device where the logits are.

A row's choice depends on its own logits, options and random numbers alone. Its random numbers come from a generator of
its own, one for each token, so that neighbours that come and go change nothing. The cuts are those of transformers'
processors, in their order: temperature, top-k, top-p, min-p.
"""

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ahn.serve.request import SamplingOptions, TokenLogprobs


@dataclasses.dataclass
class Chosen:
    """What was chosen for one row.

    Attributes:
        token: its id; -1 where there was an error.
        logprobs: of the token, if they were asked for.
        error: a sentence, where logits are not numbers or a processor failed.
    """

    token: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


class Chooser:
    """Options of one row, with what they have to remember.

    Args:
        prompt: (L,) ids of the prompt.
        reply: ids of the reply so far; the list grows.
    """

    def __init__(
        self, options: SamplingOptions, prompt: NDArray[np.integer[Any]], reply: list[int], device: torch.device
    ) -> None:
        self.options, self.prompt, self.reply, self.device = options, prompt, reply, device
        # None: from the system. Python would take -1 and 1 for the same.
        self._random = random.Random(None if options.seed is None else options.seed % (1 << 64))
        self._present: Tensor | None = None
        self._counts: Tensor | None = None
        self._noted = 0
        self._bias = None
        if options.logit_bias:
            places = torch.tensor(list(options.logit_bias), device=device)
            self._bias = places, torch.tensor(list(options.logit_bias.values()), device=device, dtype=torch.float32)

    def draw(self) -> float:
        return self._random.random()

    @property
    def changes_scores(self) -> bool:
        o = self.options
        penalties = o.repetition_penalty != 1 or o.presence_penalty or o.frequency_penalty
        return bool(penalties or self._bias is not None or o.processors)

    def changed(self, scores: Tensor) -> Tensor:
        """Scores (V,) after biases, penalties and the request's own processors."""
        if self._bias is not None:
            scores = scores.index_add(0, *self._bias)
        scores = self._penalised(scores)
        if self.options.processors:
            ids = torch.cat([self._prompt_ids, torch.tensor(self.reply, dtype=torch.long, device=self.device)])[None]
            for processor in self.options.processors:
                scores = processor(ids, scores[None])[0]
        return scores

    @functools.cached_property
    def _prompt_ids(self) -> Tensor:
        return torch.from_numpy(self.prompt.astype(np.int64)).to(self.device)

    def _penalised(self, scores: Tensor) -> Tensor:
        o = self.options
        if o.repetition_penalty == 1 and not o.presence_penalty and not o.frequency_penalty:
            return scores
        present, counts = self._seen(len(scores))
        if o.repetition_penalty != 1:
            weaker = torch.where(scores < 0, scores * o.repetition_penalty, scores / o.repetition_penalty)
            scores = torch.where(present, weaker, scores)
        return scores - o.frequency_penalty * counts - o.presence_penalty * (counts > 0)

    def _seen(self, vocabulary: int) -> tuple[Tensor, Tensor]:
        """(V,) which tokens prompt and reply hold, and how often each is in the reply."""
        if self._present is None or self._counts is None:
            self._present = torch.zeros(vocabulary, dtype=torch.bool, device=self.device)
            self._counts = torch.zeros(vocabulary, device=self.device)
            self._present[self._prompt_ids] = True
        new = torch.tensor(self.reply[self._noted :], dtype=torch.long, device=self.device)
        self._present[new] = True
        self._counts.index_add_(0, new, torch.ones(len(new), device=self.device))
        self._noted = len(self.reply)
        return self._present, self._counts


def choose(logits: Tensor, rows: Sequence[Chooser]) -> list[Chosen]:
    """The next token of each row.

    Args:
        logits: (B, V) of any floating type.
    """
    scores = reported = logits.float()
    broken = ~scores.isfinite().all(-1)
    scores, failed = _changed(scores, rows)
    tokens = scores.argmax(-1)
    drawing = [i for i, row in enumerate(rows) if row.options.temperature > 0]
    if drawing:
        options = [rows[i].options for i in drawing]
        # Rows that failed are drawn from as well, so that none has to be left out of the batch.
        kept = cut(scores[drawing].nan_to_num(0.0, None, float("-inf")), options)
        tokens[drawing] = _drawn(kept, [rows[i].draw() for i in drawing])
    nothing = scores.amax(-1) == float("-inf")
    found = torch.stack([tokens, broken.long(), nothing.long()], dim=1).tolist()  # the device is waited for once
    chosen = []
    for i, (token, bad, none) in enumerate(found):
        error = "The model's scores are not numbers." if bad else failed.get(i)
        error = error or ("No token is allowed here." if none else None)
        chosen.append(Chosen(-1, error=error) if error else Chosen(token))
    wanted = [i for i, row in enumerate(rows) if row.options.logprobs is not None and chosen[i].error is None]
    if wanted:
        counts = [rows[i].options.logprobs or 0 for i in wanted]
        for i, one in zip(
            wanted, logprobs_of(reported[wanted], [chosen[i].token for i in wanted], counts), strict=True
        ):
            chosen[i].logprobs = one
    return chosen


def logprobs_of(scores: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """How probable tokens are.

    Args:
        scores: (n, V) float32, one row for each token.
        counts: how many of the most probable tokens to report beside each.
    """
    logprobs = scores.log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=scores.device)[:, None])[:, 0].tolist()
    top, places = (x.tolist() for x in logprobs.topk(min(max(counts), scores.shape[1])))
    best = [tuple(zip(*pair, strict=True)) for pair in zip(places, top, strict=True)]
    rows = zip(tokens, own, best, counts, strict=True)
    return [TokenLogprobs(token, logprob, ranked[:count]) for token, logprob, ranked, count in rows]


def _changed(scores: Tensor, rows: Sequence[Chooser]) -> tuple[Tensor, dict[int, str]]:
    """Scores after what each row does to its own, and of which rows that failed."""
    changing = [i for i, row in enumerate(rows) if row.changes_scores]
    if not changing:
        return scores, {}
    scores, failed = scores.clone(), {}
    for i in changing:
        try:
            scores[i] = rows[i].changed(scores[i])
        except Exception as error:  # a processor is the request's own
            failed[i] = f"A processor of this request failed: {error}"
    return scores, failed


def cut(scores: Tensor, options: Sequence[SamplingOptions]) -> Tensor:
    """Scores (b, V) below the row's best, divided by the temperatures; -inf for what is cut off.

    The best is 0 at any temperature: near zero, scores themselves would become infinite, and no probabilities.
    """

    def column(number: Callable[[SamplingOptions], float], of: Sequence[int]) -> Tensor:
        numbers = [number(options[i]) for i in of]
        return torch.tensor(numbers, device=scores.device, dtype=scores.dtype)[:, None]

    limits = torch.finfo(scores.dtype)
    scores = scores - scores.amax(-1, keepdim=True).clamp_min(limits.min)
    scores = scores / column(lambda o: o.temperature, range(len(options))).clamp_min(limits.tiny)
    vocabulary = scores.shape[-1]
    if rows := [i for i, o in enumerate(options) if 0 < o.top_k < vocabulary]:
        counts = column(lambda o: o.top_k, rows).long()
        best = scores[rows].topk(int(counts.max())).values
        scores[rows] = _without(scores[rows], scores[rows] < best.gather(1, counts - 1))
    if rows := [i for i, o in enumerate(options) if o.top_p < 1]:
        scores[rows] = _top_p(scores[rows], column(lambda o: o.top_p, rows))
    if rows := [i for i, o in enumerate(options) if o.min_p > 0]:
        share = scores[rows].softmax(-1)
        least = column(lambda o: o.min_p, rows) * share.amax(-1, keepdim=True)
        scores[rows] = _without(scores[rows], share < least)
    return scores


def _top_p(scores: Tensor, p: Tensor) -> Tensor:
    """The fewest most probable tokens that have at least the share p (b, 1), one at least."""
    ordered, places = scores.sort(descending=False)
    gone = ordered.softmax(-1).cumsum(-1) <= 1 - p
    gone[:, -1] = False
    return _without(scores, gone.scatter(1, places, gone))


def _without(scores: Tensor, gone: Tensor) -> Tensor:
    return scores.masked_fill(gone, float("-inf"))


def _drawn(scores: Tensor, draws: Sequence[float]) -> Tensor:
    """(b,) a token for each row of scores (b, V) by a number in [0, 1)."""
    # In float64 a token's share of [0, 1) is its probability, however many there are.
    reached = scores.softmax(-1).double().cumsum(-1)
    wanted = torch.tensor(draws, device=scores.device, dtype=torch.float64)[:, None] * reached[:, -1:]
    last = torch.where(scores > float("-inf"), torch.arange(scores.shape[-1], device=scores.device), 0).amax(-1)
    return torch.searchsorted(reached, wanted, right=True)[:, 0].minimum(last)
