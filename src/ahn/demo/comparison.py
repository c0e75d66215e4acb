"""Read every document in every way, and sum it up: perplexity beyond the window, the gap won back, facts, cost."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ahn.demo.documents import Document
from ahn.demo.methods import FULL, WINDOW_ONLY
from ahn.demo.reading import CHUNK, Reading, read
from ahn.measure import peak
from ahn.measure.intervals import wilson
from ahn.measure.method import Method
from ahn.tiny.facts import Fact


@dataclasses.dataclass(frozen=True)
class Result:
    """One method over all documents.

    Attributes:
        is_memory: it keeps something of what leaves the window.
        loss: nats per token of the real text beyond the window; `perplexity` is its exponential.
        gap_won_back: 0 is sinks + window, 1 is full attention; None when those two do not differ.
        facts_recalled, facts_asked: facts stated beyond the window; `facts_interval` is the share's 95 % interval.
        peak_bytes: above what the process (or GPU) held before; None where it cannot be measured.
        loss_by_position: mean loss of every `bin` tokens of the documents, from their beginning; None for an empty bin.
        loss_by_document: the same of each document.
        cache_by_position: (tokens read, bytes).
    """

    name: str
    is_memory: bool
    loss: float
    perplexity: float
    gap_won_back: float | None
    facts_recalled: int
    facts_asked: int
    facts_interval: tuple[float, float] | None
    cache_bytes: int
    peak_bytes: int | None
    tokens_per_second: float
    loss_by_position: list[float | None]
    loss_by_document: list[list[float | None]]
    cache_by_position: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Recall:
    """One asked fact and the token that each method guessed for its value."""

    document: Document
    fact: Fact
    guesses: dict[str, int]

    def right(self, method: str) -> bool:
        """Whether this method guessed the value."""
        return self.guesses[method] == self.document.text.ids[self.fact.answer]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All methods over all documents.

    Attributes:
        quantized: tokens before the window that are seen at a few bits per number, of the methods that have any; 0 if
            none has.
        bits: how many of keys and values, in words.
        tokens_compared: over which losses and perplexities are taken.
        bin: tokens an entry of `Result.loss_by_position`.
    """

    window: int
    sinks: int
    quantized: int
    bits: str
    length: int
    documents: Sequence[Document]
    tokens_compared: int
    bin: int
    results: list[Result]
    recalls: list[Recall]

    def as_data(self) -> dict[str, Any]:
        """JSON types: everything but texts and single facts."""
        names = ("window", "sinks", "quantized", "bits", "length", "tokens_compared", "bin")
        numbers = {name: getattr(self, name) for name in names}
        documents = [document.name for document in self.documents]
        return numbers | {"documents": documents, "results": [dataclasses.asdict(result) for result in self.results]}

    @property
    def best_memory(self) -> Result:
        """The memory with the smallest loss."""
        return min((result for result in self.results if result.is_memory), key=lambda result: result.loss)

    def longest_recall(self, memory: str) -> Recall | None:
        """Of the facts that this memory recalled and sinks + window did not, the one stated longest ago."""
        won = [recall for recall in self.recalls if recall.right(memory) and not recall.right(WINDOW_ONLY)]
        return max(won, key=lambda recall: recall.fact.distance, default=None)


def compare(
    model: PreTrainedModel,
    methods: Sequence[Method],
    documents: Sequence[Document],
    advance: Callable[[str, int], Any] = lambda name, tokens: None,
) -> Comparison:
    """Read every document with every method.

    Args:
        methods: full attention, sinks + window, and at least one memory.
        documents: at least one; all of one length.
    """
    configs = [method.config for method in methods if method.config is not None]
    config, coarse = configs[0], max(configs, key=lambda config: config.quantized)
    length = len(documents[0].text.ids)
    real = [_real(document) for document in documents]
    beyond = torch.arange(length - 1) >= config.lossless
    counted = [mask & beyond for mask in real]
    facts = [document.facts_beyond(config.window, config.sinks) for document in documents]
    texts = [
        (document.text.ids, [fact.answer for fact in some]) for document, some in zip(documents, facts, strict=True)
    ]
    measured: dict[str, tuple[Method, list[Reading], int | None]] = {}
    with peak.exact_allocator():
        for method in methods:
            with method.on(model):
                read(model, texts[0][0][: 2 * CHUNK])  # first calls are slow and take memory for good
                with peak.measure(model.device) as peaked:
                    first = read(model, *texts[0], partial(advance, method.name))
            measured[method.name] = (method, [first], peaked.growth)
    for method, readings, _ in measured.values():
        with method.on(model):
            readings += [read(model, *text, partial(advance, method.name)) for text in texts[1:]]
    losses = {
        name: float(torch.cat([r.losses[mask] for r, mask in zip(readings, counted, strict=True)]).double().mean())
        for name, (_, readings, _) in measured.items()
    }
    recalls = [
        Recall(document, fact, {name: readings[n].guesses[m] for name, (_, readings, _) in measured.items()})
        for n, document in enumerate(documents)
        for m, fact in enumerate(facts[n])
    ]
    results = [
        _result(method, readings, peak_bytes, recalls, losses, partial(_by_position, size=config.lossless), real)
        for method, readings, peak_bytes in measured.values()
    ]
    tokens = int(sum(mask.sum() for mask in counted))
    return Comparison(
        window=config.window,
        sinks=config.sinks,
        quantized=coarse.quantized,
        bits=coarse.tier_label,
        length=length,
        documents=documents,
        tokens_compared=tokens,
        bin=config.lossless,
        results=results,
        recalls=recalls,
    )


def _real(document: Document) -> Tensor:
    """(L - 1,) True where the predicted token is of the real text, not of a fact."""
    real = torch.ones(len(document.text.ids) - 1, dtype=torch.bool)
    real[torch.tensor(document.text.inserted, dtype=torch.long) - 1] = False
    return real


def _result(
    method: Method,
    readings: Sequence[Reading],
    peak_bytes: int | None,
    recalls: Sequence[Recall],
    losses: dict[str, float],
    by_position: Callable[[Sequence[Reading], Sequence[Tensor]], list[float | None]],
    real: Sequence[Tensor],
) -> Result:
    loss, full, window = (losses[name] for name in (method.name, FULL, WINDOW_ONLY))
    recalled = sum(recall.right(method.name) for recall in recalls)
    timed = readings[1:] or readings  # measuring the peak slows the first one down
    return Result(
        name=method.name,
        is_memory=method.trainable or (method.config is not None and method.config.quantized > 0),
        loss=loss,
        perplexity=math.exp(loss),
        gap_won_back=(window - loss) / (window - full) if window > full else None,
        facts_recalled=recalled,
        facts_asked=len(recalls),
        facts_interval=wilson(recalled, len(recalls)) if recalls else None,
        cache_bytes=readings[0].cache_bytes[-1][1],
        peak_bytes=peak_bytes,
        tokens_per_second=sum(len(reading.losses) + 1 for reading in timed) / sum(reading.seconds for reading in timed),
        loss_by_position=by_position(readings, real),
        loss_by_document=[by_position([reading], [mask]) for reading, mask in zip(readings, real, strict=True)],
        cache_by_position=[(0, 0), *readings[0].cache_bytes],
    )


def _by_position(readings: Sequence[Reading], real: Sequence[Tensor], size: int) -> list[float | None]:
    """Mean loss of every `size` positions over all documents, from their beginnings."""
    losses = torch.stack([reading.losses for reading in readings]).split(size, dim=1)
    masks = torch.stack(list(real)).split(size, dim=1)
    return [float(loss[mask].mean()) if mask.any() else None for loss, mask in zip(losses, masks, strict=True)]
