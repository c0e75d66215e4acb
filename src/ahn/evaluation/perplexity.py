"""Perplexity of a long document by position, with what the cache and the work took (arXiv 2510.07318, figure 3).

The document is read once, chunk by chunk through the cache, so any length needs the memory of one chunk. A result
folder gets `positions.jsonl` (figure 3c and d: a line a bucket of tokens) and `cost.jsonl` (figure 3a and b: FLOPs and
cache by length, computed from the configuration).
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import ahn
from ahn.config import AHNConfig
from ahn.evaluation.documents import LongDocument
from ahn.evaluation.methods import Evaluated, of_base
from ahn.evaluation.reader import not_numbers
from ahn.evaluation.results import conclude, open_folder
from ahn.measure import peak
from ahn.measure.clock import synchronize
from ahn.measure.reading import bytes_of_cache, new_cache
from ahn.measure.reading import losses as read_losses

CHUNK = 512
"""Tokens read at once, and so rows of logits that exist."""
BUCKET = 1024
"""Tokens that a point of the curves stands for."""
COST_LENGTHS = tuple(1 << n for n in range(10, 21))
"""1 Ki to 1 Mi tokens."""


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Some consecutive tokens of a document.

    Attributes:
        start, stop: their positions; `loss` is their mean loss in nats, each predicted from all before it.
        peak_bytes: the most that was held meanwhile beyond the model, on its device; None where it cannot be measured.
    """

    start: int
    stop: int
    loss: float
    cache_bytes: int
    peak_bytes: int | None
    seconds: float


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    ids: Sequence[int],
    bucket: int = BUCKET,
    chunk: int = CHUNK,
    advance: Callable[[int], Any] = lambda tokens: None,
) -> tuple[Tensor, list[Bucket]]:
    """Read a document of L tokens, 2 or more.

    Args:
        bucket, chunk: tokens; a chunk ends with its bucket.
        advance: called with the number of tokens of every chunk.

    Returns:
        The loss of each token but the first, (L - 1,) float32 on the CPU, and the buckets.

    Raises:
        AHNError: the model's scores are not numbers.
    """
    tokens = torch.tensor(ids, device=model.device)
    cache = new_cache(model)
    losses = torch.empty(len(ids) - 1)
    buckets = []
    for start in range(0, len(ids), bucket):
        stop = min(start + bucket, len(ids))
        held = bytes_of_cache(cache)
        with peak.measure(model.device) as peaked:
            before = time.perf_counter()
            for first, logits, found in read_losses(model, cache, tokens, start, stop, chunk):
                losses[first : first + len(found)] = found.cpu()
                advance(len(logits))
            synchronize(model.device)
            seconds = time.perf_counter() - before
        most = None if peaked.growth is None else held + peaked.growth
        # A token's loss is known once the one before it was read, so this bucket's losses are complete.
        mean = float(losses[max(0, start - 1) : stop - 1].mean())
        if math.isnan(mean) and stop > 1:
            raise not_numbers(model)
        buckets.append(Bucket(start, stop, mean, bytes_of_cache(cache), most, round(seconds, 4)))
    return losses, buckets


def run(
    evaluated: Evaluated,
    document: LongDocument,
    out: Path,
    bucket: int = BUCKET,
    advance: Callable[[int], Any] = lambda tokens: None,
) -> dict[str, Any]:
    """Measure a document with a method and write a result folder; one that is there already is not measured again."""
    folder = open_folder(out, "perplexity", evaluated, document, {"bucket": bucket, "chunk": CHUNK})
    if folder.result is not None:
        return folder.result
    with peak.exact_allocator():
        measure(evaluated.model, document.ids[: 2 * CHUNK])  # first calls are slow and take memory for good
        losses, buckets = measure(evaluated.model, document.ids, bucket, advance=advance)
    lines = {"positions.jsonl": [dataclasses.asdict(one) for one in buckets], "cost.jsonl": costs(evaluated.model)}
    return conclude(folder, lines, summary(losses, buckets, evaluated.model))


def summary(losses: Tensor, buckets: Sequence[Bucket], model: PreTrainedModel) -> dict[str, Any]:
    """The figures of a document: losses in nats over all of it and beyond sinks + window, cache, peak and speed."""
    config: AHNConfig | None = getattr(model, "ahn_config", None)
    beyond = losses[config.lossless - 1 :] if config is not None else losses[:0]
    peaks = [one.peak_bytes for one in buckets if one.peak_bytes is not None]
    found: dict[str, Any] = {"tokens": len(losses) + 1, "loss": float(losses.double().mean())}
    found["loss_beyond"] = float(beyond.double().mean()) if len(beyond) else None
    found |= {"cache_bytes": buckets[-1].cache_bytes, "peak_bytes": max(peaks, default=None)}
    return found | {"tokens_per_second": round((len(losses) + 1) / sum(one.seconds for one in buckets), 1)}


def costs(model: PreTrainedModel) -> list[dict[str, int]]:
    """FLOPs to read a prompt and bytes of the cache at its end, by its length, for a model as it is in use."""
    config: AHNConfig | None = getattr(model, "ahn_config", None)
    rows = []
    for length in COST_LENGTHS:
        both = ahn.cost(model.config, config or of_base(model), length, model.dtype)
        usage = both.full if config is None else both.ahn
        rows.append({"length": length, "flops": usage.model_flops, "cache_bytes": usage.cache_bytes})
    return rows
